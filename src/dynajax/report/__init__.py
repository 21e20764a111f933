"""Read run directories and write reports, figures and comparisons of them."""

from dynajax.report.run import Run, label, model_free_label, read_run, series
from dynajax.report.run_report import headline, late_reward_r2, write_report

__all__ = [
    "Run",
    "headline",
    "label",
    "late_reward_r2",
    "model_free_label",
    "read_run",
    "series",
    "write_report",
]
