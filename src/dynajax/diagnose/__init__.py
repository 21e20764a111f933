"""Why synthetic data fails on a task: before training (`offline`), and of a run."""
