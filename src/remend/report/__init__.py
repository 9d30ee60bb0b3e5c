"""The report: one self-contained HTML page made from a run's files alone."""

from remend.report.recovery import write_report

__all__ = ["write_report"]
