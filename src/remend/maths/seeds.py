"""How sure is a mean over seeds and items: of other items, of other seeds, and of both.

Every seed meets the same items, so a value is y_si = µ + a_s + b_i + e_si, with seeds, items and the rest at random.
The three variances are estimated by the mean squares of the two-way table (Searle, Casella & McCulloch 1992, Variance
Components, chapter 4), and degrees of freedom are Satterthwaite's (1946, Biometrics Bull. 2:110).

A two-level bootstrap (seeds first, then items) asks the same question. With three seeds its percentiles are too near:
of three there are ten distinct draws, and none says how far a fourth seed might lie. tests/maths/test_seeds.py has the
coverage of both.

Legend: S seeds, N items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from remend.errors import InputError
from remend.maths.intervals import Array, Interval, student_t

FLAT = 1e-12
"""A standard error below it is rounding."""


@dataclass(frozen=True)
class Certainty:
    """A mean over seeds and items, in the unit of its values, and how sure it is.

    Attributes:
        value: the mean.
        seeds, items: how many there are.
        over_items: interval for other items and these seeds; None where all items are alike, or there is one.
        over_seeds: interval for other seeds and these items; None with one seed, or where all seeds are alike.
        over_both: interval for other seeds and other items; None with one seed, or where nothing varies.
        error: standard error that `over_both` goes by, and with one seed `over_items`; None where there is neither.
        degrees: of freedom of it.
        p_value: two-sided, of a mean of zero by that error; 1 where nothing varies and the mean is zero.
        least: the smallest mean that such an error lets be found with the power asked for.
    """

    value: float
    seeds: int
    items: int
    over_items: Interval | None
    over_seeds: Interval | None
    over_both: Interval | None
    error: float | None
    degrees: float | None
    p_value: float | None
    least: float | None

    @property
    def interval(self) -> Interval | None:
        """Over both where there are several seeds, else over items."""
        return self.over_both if self.seeds > 1 else self.over_items


def certainty(values: ArrayLike, *, level: float = 0.95, power: float = 0.8) -> Certainty:
    """The mean of values [S, N], one row a seed and one column an item, with its intervals.

    Args:
        values: paired differences, or what a ratio is linearised to (`gap_values`); any float type, taken as float64.
        level: of confidence; a test rejects below 1 − level.
        power: of `least`.

    Returns:
        A Certainty. The error over both is √(v_s + v_i − v_e), where v_s is the variance of the seeds' means over S,
        v_i that of the items' means over N, and v_e that of the rest over S·N, which the other two hold once each. It
        is never taken for smaller than the error over items, which holds for one seed too.

    Raises:
        InputError: not a table, empty, or not finite; level or power not between 0 and 1.
    """
    values_SN = np.asarray(values, dtype=np.float64)
    if values_SN.ndim != 2 or values_SN.size == 0 or not np.isfinite(values_SN).all():
        raise InputError(
            f"values have the shape {values_SN.shape}; allowed is a table of finite numbers, a row a seed and a column "
            "an item"
        )
    for share in (level, power):
        if not 0 < share < 1:
            raise InputError(f"level or power is {share}; allowed is a share between 0 and 1, such as 0.95")
    seeds, items = values_SN.shape
    mean = float(values_SN.mean())
    by_seed_S, by_item_N = values_SN.mean(axis=1), values_SN.mean(axis=0)
    of_items, of_seeds = _variance(by_item_N), _variance(by_seed_S)
    error, degrees = _error(values_SN, of_seeds, of_items)
    over_items = _interval(mean, of_items, items - 1, level)
    return Certainty(
        value=mean,
        seeds=seeds,
        items=items,
        over_items=over_items,
        over_seeds=_interval(mean, of_seeds, seeds - 1, level),
        over_both=_interval(mean, error**2, degrees, level) if seeds > 1 else None,
        error=error if error > FLAT else None,
        degrees=degrees if error > FLAT else None,
        p_value=_p_value(mean, error, degrees),
        least=least_difference(error, degrees, level=level, power=power) if error > FLAT else None,
    )


def _variance(means: Array) -> float:
    """Of a mean of independent means."""
    return float(means.var(ddof=1)) / means.size if means.size > 1 else 0.0


def _error(values_SN: Array, of_seeds: float, of_items: float) -> tuple[float, float]:
    """Standard error over both, and its degrees of freedom."""
    seeds, items = values_SN.shape
    if seeds == 1:
        return math.sqrt(of_items), items - 1
    rest_SN = values_SN - values_SN.mean(axis=1, keepdims=True) - values_SN.mean(axis=0) + values_SN.mean()
    free = (seeds - 1) * max(items - 1, 1)
    of_rest = float((rest_SN**2).sum()) / free / values_SN.size
    total = max(of_items, of_seeds + of_items - of_rest)
    parts = [(of_seeds, seeds - 1), (of_items, max(items - 1, 1)), (of_rest, free)]
    spread = sum(part**2 / count for part, count in parts)
    return math.sqrt(total), total**2 / spread if spread > 0 else float(items - 1)


def _interval(mean: float, variance: float, degrees: float, level: float) -> Interval | None:
    if math.sqrt(variance) <= FLAT or degrees <= 0:
        return None
    half = _quantile((1 + level) / 2, degrees) * math.sqrt(variance)
    return mean - half, mean + half


def _p_value(mean: float, error: float, degrees: float) -> float | None:
    from scipy.special import stdtr  # a fifth of a second

    if error <= FLAT or degrees <= 0:
        return 1.0 if abs(mean) <= FLAT else None
    return min(1.0, 2 * float(stdtr(degrees, -abs(mean) / error)))


def _quantile(share: float, degrees: float) -> float:
    """Of Student's t, one-sided; degrees of freedom may be a fraction."""
    return student_t(2 * share - 1, degrees)


def least_difference(error: float, degrees: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest mean that a two-sided test finds with this power: (t(1 − α/2) + t(power)) · error.

    As arXiv 2411.00640 has it for many items, with Student's t for few seeds. `error` is in the unit of the result.
    """
    return (_quantile((1 + level) / 2, degrees) + _quantile(power, degrees)) * error


def planned_error(items: int, seeds: int, *, of_items: float, of_seeds: float) -> tuple[float, float]:
    """Standard error and degrees of freedom of a mean that is still to be measured.

    Args:
        items, seeds: how many there will be.
        of_items: standard deviation over items, taken for the same at every seed, so that more seeds don't lower it. Of
            paired grades it is √(share of items that flip), since a difference is −1, 0 or 1.
        of_seeds: standard deviation of the seeds' means.

    Raises InputError for fewer than 2 items, no seed, or a negative spread.
    """
    if items < 2 or seeds < 1 or min(of_items, of_seeds) < 0:
        raise InputError(
            f"got {items} items, {seeds} seeds and spreads of {of_items} and {of_seeds}; allowed: 2 items, 1 seed, "
            "and spreads of 0 or more"
        )
    parts = [(of_items**2 / items, items - 1)]
    if seeds > 1:
        parts.append((of_seeds**2 / seeds, seeds - 1))
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / count for part, count in parts)
    return math.sqrt(total), total**2 / spread if spread else items - 1


def gap_values(degraded: ArrayLike, recovered: ArrayLike) -> Array:
    """What a gap closed is linearised to, [S, N]: values whose mean is 1 − Σ recovered / Σ degraded, for `certainty`.

    Args:
        degraded, recovered: [S, N], a prompt's divergence summed over its tokens, of each seed on the same prompts.

    The delta method of a ratio: g + (1 − g) · (d_i − d̄)/d̄ − (r_i − r̄)/d̄, d and r a prompt's sums and g the gap closed
    of all. Raises InputError for tables of other shapes, or without damage.
    """
    before_SN, after_SN = (np.asarray(sums, dtype=np.float64) for sums in (degraded, recovered))
    if before_SN.ndim != 2 or before_SN.shape != after_SN.shape or before_SN.size == 0:
        raise InputError(f"degraded has the shape {before_SN.shape} and recovered {after_SN.shape}; give equal tables")
    damage = float(before_SN.mean())
    if damage <= 0:
        raise InputError("the degraded model's divergence is zero: there is no damage to close")
    left = float(after_SN.mean()) / damage
    values_SN: Array = (1 - left) + (left * (before_SN - damage) - (after_SN - left * damage)) / damage
    return values_SN


def by_cluster(values: ArrayLike, clusters: Sequence[object]) -> Array:
    """Values [S, G] of clusters of items that stand or fall together, with the same mean of each seed.

    Args:
        values: [S, N].
        clusters: the name of each item's cluster, N of them.

    A cluster's value is its items' sum of deviations from the mean of all, times G / N, and that mean.
    """
    values_SN = np.asarray(values, dtype=np.float64)
    if values_SN.ndim != 2 or len(clusters) != values_SN.shape[1]:
        raise InputError(f"there are {len(clusters)} cluster names for values of the shape {values_SN.shape}")
    _, which_N = np.unique([str(name) for name in clusters], return_inverse=True)
    count = int(which_N.max()) + 1
    mean = values_SN.mean()
    sums_SG = np.zeros((values_SN.shape[0], count))
    for at, row_N in enumerate(values_SN - mean):
        sums_SG[at] = np.bincount(which_N, weights=row_N, minlength=count)
    scaled_SG: Array = sums_SG * count / values_SN.shape[1] + mean
    return scaled_SG
