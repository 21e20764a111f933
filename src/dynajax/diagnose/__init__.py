"""Diagnose synthetic data: of a task before training (`offline`), and of a run (`online`)."""
