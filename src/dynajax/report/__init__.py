"""A run's folder, read back and shown."""

from dynajax.report.run import Run, label, model_free, read_run, series
from dynajax.report.run_report import headline, reward_fit, write_report

__all__ = [
    "Run",
    "headline",
    "label",
    "model_free",
    "read_run",
    "reward_fit",
    "series",
    "write_report",
]
