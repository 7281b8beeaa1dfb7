"""A function of another process, called on each rank: how it gets there, is run, and is answered."""
