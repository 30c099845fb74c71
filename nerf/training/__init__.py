"""A training run: processes, checkpoints, logs, recovery. Nothing here knows of rays or text."""
