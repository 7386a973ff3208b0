"""Launchers start the workers of a sweep: here, in a SLURM cluster, or by a command."""
