"""A run's folder, read back and shown."""

from dynajax.report.page import Run, headline, label, read_run, reward_fit, series, write_report

__all__ = ["Run", "headline", "label", "read_run", "reward_fit", "series", "write_report"]
