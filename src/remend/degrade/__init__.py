"""Make degraded students: what damaged models look like, under control."""

from remend.degrade.quantize import METHODS, quantize

__all__ = ["METHODS", "quantize"]
