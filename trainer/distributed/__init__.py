"""Ranks and process groups, random numbers, the agreed stop."""
