"""The run folder: paths, status, history and lock; heartbeats; what a run began with; sweeps."""
