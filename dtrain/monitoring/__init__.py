"""Following a run through what its ranks leave in the run folder."""
