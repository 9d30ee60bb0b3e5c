"""Grade a model on tasks: answers or answer letters, kept with every grade; see job.py."""

from remend.evaluation.job import evaluate
from remend.evaluation.plan import parse_data, parse_tasks

__all__ = ["evaluate", "parse_data", "parse_tasks"]
