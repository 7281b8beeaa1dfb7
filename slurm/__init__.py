"""Slurm: what is submitted, how, and what became of it. Through Slurm's own commands alone."""
