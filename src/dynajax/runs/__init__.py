"""What a run writes: its folder, logs, checkpoints and films."""
