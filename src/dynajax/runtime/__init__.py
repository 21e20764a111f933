"""Learners as jitted programs on devices, in one process or several."""
