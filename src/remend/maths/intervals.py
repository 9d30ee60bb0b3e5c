"""Intervals of confidence: what resampling and Student's t need. numpy, and scipy where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Picks = NDArray[np.int64]
Interval = tuple[float, float]
Sample = TypeVar("Sample")

CELLS = 2_000_000
"""Numbers drawn at once, so that 10,000 resamples of 10,000 items need 16 MB and not 800."""


def resampled(
    statistic: Callable[[Sample], Array], draw: Callable[[int], Sample], resamples: int, *, units: int
) -> Array:
    """Values of a statistic over resamples: the one loop of every bootstrap and of every drawn permutation.

    Args:
        statistic: takes R samples as `draw` gives them and returns a value, or a row of values, for each.
        draw: makes that many samples: `with_replacement` of items, or counts from a generator's multinomial.
        resamples: how many in all.
        units: numbers in one sample; samples are drawn in parts of at most CELLS numbers.
    """
    size = max(1, CELLS // units)
    return np.concatenate([statistic(draw(min(size, resamples - at))) for at in range(0, resamples, size)])


def with_replacement(items: int, seed: int) -> Callable[[int], Picks]:
    """A `draw` for `resampled`: which of the items are in each of R samples of their own number, [R, items]."""
    generator = np.random.default_rng(seed)
    return lambda rows: generator.integers(0, items, size=(rows, items))


def percentile_interval(values: ArrayLike, level: float) -> Interval:
    """The middle `level` of a statistic's resamples, ends interpolated linearly (Efron 1979)."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def student_t(level: float, degrees: float) -> float:
    """Two-sided quantile of Student's t: |T| is below it with the chance `level`, between 0 and 1."""
    from scipy.special import stdtrit  # a fifth of a second

    return float(stdtrit(degrees, (1 + level) / 2))
