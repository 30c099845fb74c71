"""A run, whatever it trains: processes, checkpoints, logs, recovery. No rays, no text."""
