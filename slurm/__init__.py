"""Slurm: submitting runs and following them, through Slurm's own commands only."""
