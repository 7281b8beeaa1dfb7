"""What a job's ranks run with `python -m`."""
