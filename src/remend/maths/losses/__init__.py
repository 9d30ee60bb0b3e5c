"""Divergences between the teacher's and the student's next-token distributions, and their sums chunk by chunk."""

from remend.maths.losses.chunked import (
    Head,
    chunk_rows,
    chunked_cross_entropy_sum,
    chunked_divergence_sum,
    chunked_truncated_sum,
)
from remend.maths.losses.divergences import direction, divergence, truncated_divergence

__all__ = [
    "Head",
    "chunk_rows",
    "chunked_cross_entropy_sum",
    "chunked_divergence_sum",
    "chunked_truncated_sum",
    "direction",
    "divergence",
    "truncated_divergence",
]
