"""Declares and checks flags, nothing else."""
