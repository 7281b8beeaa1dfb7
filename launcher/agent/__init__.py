"""One node's part of a run: it starts the ranks, watches them, and says why the run ended."""
