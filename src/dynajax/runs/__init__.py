"""Files that a run writes: run directory, logs, checkpoints, policies and videos."""
