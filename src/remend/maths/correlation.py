"""Correlation of two measures over the checkpoints of several runs: pooled, within and between runs. numpy only.

The three answer different questions and can differ in sign (Simpson 1951, JRSS B 13:238):

pooled   all points as they are. It mixes the other two.
within   does a run's x move with its y? Points are centred in their run, so runs' levels play no part (Bland & Altman
         1995, BMJ 310:446; Bakdash & Marusich 2017, Front. Psychol. 8:456).
between  do runs of higher mean x have higher mean y? The unit is the run.

Checkpoints of one run are autocorrelated: each is trained from the one before. What shuffles or resamples single points
takes them for independent, and gives p-values that are too small and intervals that are too narrow. So within runs
there is a second p-value, by circular shifts, and from RUNS_TO_RESAMPLE runs on, intervals resample whole runs.

Legend: N points, G runs, K points of one block, R resamples or rearrangements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remend.errors import InputError
from remend.maths.intervals import Array, Interval, percentile_interval, resampled

Block = NDArray[np.intp]
Level = Literal["pooled", "within", "between"]

LEVELS: tuple[Level, ...] = ("pooled", "within", "between")

RUNS_TO_RESAMPLE = 8
"""Runs from which on intervals resample whole runs: of fewer there are few distinct resamples to have ends."""

POINTS_FOR_INTERVAL = 5
"""With fewer points most resamples hold two or three distinct ones, whose correlation is near ±1 whatever the truth."""

RESAMPLES = 2_000
"""Bootstrap samples of an interval."""

CONFIDENCE = 0.95

TIE = 1e-9
"""Rearrangements whose coefficient is so near to the observed one are as extreme as it, rounding aside."""

FLAT = 1e-12
"""A spread below this share of the values' size is rounding."""


@dataclass(frozen=True)
class Correlation:
    """A correlation coefficient and how sure it is.

    Attributes:
        coefficient: −1 to 1; None where there is none, and `reason` says why.
        low, high: 95% percentile bootstrap interval; None with too few points or runs.
        p_value: two-sided, by permutation of what `level` takes for exchangeable: points (pooled), points within their
            run (within), runs (between). The first two take checkpoints for independent.
        n: pairs that the coefficient is of: points, or runs where the level is between.
        runs: that they come from.
        shift_p_value: two-sided, by circular shifts within runs, which keep each series' autocorrelation. Only for
            the level within, and for one run alone.
        resampled: what the interval resamples: runs, or points within their run (then it is too narrow).
        reason: why there is no coefficient.
    """

    coefficient: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    runs: int = 1
    shift_p_value: float | None = None
    resampled: Literal["runs", "points"] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Sample:
    """Pairs, the blocks that are centred each for itself, and the runs in their order."""

    x_N: Array
    y_N: Array
    blocks: list[Block]
    runs: list[Block]


def spearman(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    level: Level = "pooled",
    permutations: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("x", "y"),
) -> Correlation:
    """Rank correlation: does one rise whenever the other does? (Spearman 1904, Am. J. Psychol. 15:72.)

    Tied values share their average rank. Within runs, ranks are taken in each run and divided by its number of points,
    so that a run of 20 points weighs as two of 10. For the rest see `pearson`.
    """
    sample = _sample(x, y, groups, level, permutations, seed)
    return _correlation(sample, level, True, permutations, seed, names)


def pearson(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    level: Level = "pooled",
    permutations: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("x", "y"),
) -> Correlation:
    """Linear correlation: do the points lie on a line? (Pearson 1895, Proc. R. Soc. London 58:240.)

    Within runs it is the correlation of what is left after taking off each run's means, so runs with a larger spread
    weigh more; that is the repeated-measures correlation of Bakdash & Marusich 2017.

    p-values: the share of rearrangements of y whose coefficient is as large in size. All of them are gone through when
    they number `permutations` or fewer (which includes the one observed); else as many are drawn, and (1 + as extreme)
    / (1 + drawn) is never zero and never too small (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39). The null
    is independence, not merely no correlation.

    Circular shifts move y along its run and put the end before the beginning. They keep the autocorrelation but for
    that seam, and are exact only for series without a trend (Harris 2020, arXiv 2012.06862, on such tests): two curves
    that both rise because training goes on pass them whatever the reason (Yule 1926, J. R. Stat. Soc. 89:1).

    The interval is a percentile bootstrap. With RUNS_TO_RESAMPLE runs or more it draws whole runs (Field & Welsh 2007,
    JRSS B 69:369), which assumes that runs are independent of each other and nothing about the points in one; with
    fewer it draws points within their run, which takes these for independent. Between runs only the first is possible.

    Args:
        x, y: a pair a point, any float type, computed in float64; a run's points in the order of training.
        groups: the run of each point; None is one run.
        level: pooled, within or between (see the top of this module).
        permutations: rearrangements to draw.
        seed: of rearrangements and resamples.
        names: of x and y, for the reason.

    Returns:
        A Correlation; without coefficient where the input is constant or too small (pooled: 3 points; within: 2 points
        more than runs, of the runs with two or more; between: 3 runs).

    Raises:
        InputError: x, y and groups of different lengths, not finite, an unknown level, groups missing, permutations
            below 1 or seed below 0.
    """
    sample = _sample(x, y, groups, level, permutations, seed)
    return _correlation(sample, level, False, permutations, seed, names)


def _sample(
    x: ArrayLike, y: ArrayLike, groups: Sequence[object] | None, level: str, permutations: int, seed: int
) -> _Sample:
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise InputError(f"x has the shape {x_N.shape} and y {y_N.shape}; allowed are two lists of one length")
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise InputError("x or y holds NaN or an infinite value; leave such points out")
    if groups is not None and len(groups) != x_N.size:
        raise InputError(f"{len(groups)} groups for {x_N.size} points; give the run of each point")
    if level not in LEVELS:
        raise InputError(f'level is "{level}"; allowed: {", ".join(LEVELS)}')
    if level != "pooled" and groups is None:
        raise InputError(f"the level {level} needs groups: the run of each point")
    if permutations < 1 or seed < 0:
        raise InputError(f"permutations is {permutations} and seed {seed}; allowed are 1 or more, and 0 or more")
    labels = list(groups) if groups is not None else [0] * x_N.size
    runs = [np.array([i for i, at in enumerate(labels) if at == run], dtype=np.intp) for run in dict.fromkeys(labels)]
    if level == "between":
        x_G, y_G = (np.array([values[run].mean() for run in runs], dtype=np.float64) for values in (x_N, y_N))
        return _Sample(x_G, y_G, [np.arange(len(runs))], [np.array([g]) for g in range(len(runs))])
    if level == "within":
        runs = [run for run in runs if run.size > 1]  # one point has nothing to vary with
    return _Sample(x_N, y_N, runs if level == "within" else [np.arange(x_N.size)], runs)


def _correlation(
    sample: _Sample, level: Level, ranked: bool, permutations: int, seed: int, names: tuple[str, str]
) -> Correlation:
    n, runs = sum(block.size for block in sample.blocks), len(sample.runs)
    reason = _obstacle(sample, level, names)
    if reason:
        return Correlation(None, None, None, None, n, runs, reason=reason)
    x_N, y_N = (_unit(values, sample.blocks, ranked) for values in (sample.x_N, sample.y_N))
    coefficient = float(np.clip(x_N @ y_N, -1.0, 1.0))
    shuffles, shifts, draws = (np.random.default_rng([seed, stream]) for stream in range(3))
    p_value = _shuffle_p(x_N, y_N, sample.blocks, permutations, shuffles)
    in_order = level == "within" or (level == "pooled" and runs == 1)
    shift_p = _shift_p(x_N, y_N, sample.runs, permutations, shifts) if in_order else None
    whole = runs >= RUNS_TO_RESAMPLE
    ends = None
    if n >= POINTS_FOR_INTERVAL and (whole or level != "between"):
        ends = _interval(sample, ranked, whole, draws)
    low, high = ends or (None, None)
    resampled: Literal["runs", "points"] | None = None if ends is None else "runs" if whole else "points"
    return Correlation(coefficient, low, high, p_value, n, runs, shift_p, resampled)


def _obstacle(sample: _Sample, level: Level, names: tuple[str, str]) -> str | None:
    """Why there can be no coefficient, or None."""
    n, runs = sum(block.size for block in sample.blocks), len(sample.runs)
    if level == "between" and runs < 3:
        return f"{runs} run{'s' * (runs != 1)}; a correlation between runs needs 3 or more"
    if level == "pooled" and n < 3:
        return f"{n} point{'s' * (n != 1)}; a correlation needs 3 or more"
    if level == "within" and n - runs < 2:
        have = f"{n} points in {runs} run{'s' * (runs != 1)} of two or more"
        return f"{have}; a correlation within runs needs at least 2 more points than runs"
    where = {"pooled": "at every point", "within": "all along each run", "between": "on average in every run"}[level]
    for name, values_N in zip(names, (sample.x_N, sample.y_N), strict=True):
        parts = [values_N[block] for block in sample.blocks]
        if all(np.ptp(part) <= FLAT * np.abs(part).max() for part in parts):
            return f"{name} is the same {where}"
    return None


def _ranks(values_K: Array, weights_RK: Array) -> Array:
    """Average ranks, as shares of the sample, in R samples that hold point i weights_RK[:, i] times: [R, K]."""
    _, place_K = np.unique(values_K, return_inverse=True)
    order = np.argsort(place_K, kind="stable")
    starts = np.flatnonzero(np.diff(place_K[order], prepend=-1))
    counts = np.add.reduceat(weights_RK[:, order], starts, axis=1)
    ranks = np.cumsum(counts, axis=1) - counts + (counts + 1) / 2
    shares: Array = ranks[:, place_K] / np.maximum(weights_RK.sum(axis=1, keepdims=True), 1)
    return shares


def _unit(values_N: Array, blocks: Sequence[Block], ranked: bool) -> Array:
    """Values (or ranks) centred in each block, of length 1 over all: two such have their correlation as dot product."""
    centred_N = np.zeros_like(values_N)
    for block in blocks:
        part = values_N[block]
        part = _ranks(part, np.ones((1, block.size)))[0] if ranked else part
        centred_N[block] = part - part.mean()
    largest = np.abs(centred_N).max()  # before squares are taken, which could vanish
    unit: Array = centred_N / largest / np.linalg.norm(centred_N / largest)
    return unit


def _shuffle_p(x_N: Array, y_N: Array, blocks: Sequence[Block], permutations: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of x·y by permutations within blocks."""

    def every() -> list[Array]:
        return [np.array(list(itertools.permutations(y_N[block]))) @ x_N[block] for block in blocks]

    def of_block(block: Block) -> Array:
        x_K, y_K = x_N[block], y_N[block]
        return resampled(
            lambda shuffled_RK: shuffled_RK @ x_K,
            lambda rows: rng.permuted(np.tile(y_K, (rows, 1)), axis=1),
            permutations,
            units=block.size,
        )

    def drawn() -> Array:
        return reduce(np.add, map(of_block, blocks))

    return _p_value(float(x_N @ y_N), [math.factorial(b.size) for b in blocks], permutations, every, drawn)


def _shift_p(x_N: Array, y_N: Array, runs: Sequence[Block], permutations: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of x·y by circular shifts within runs, each run by its own."""
    by_shift = [np.array([x_N[run] @ np.roll(y_N[run], shift) for shift in range(run.size)]) for run in runs]

    def drawn() -> Array:
        totals_R = np.zeros(permutations)
        for sums in by_shift:
            totals_R += sums[rng.integers(0, sums.size, size=permutations)]
        return totals_R

    return _p_value(float(x_N @ y_N), [run.size for run in runs], permutations, lambda: by_shift, drawn)


def _p_value(
    observed: float,
    counts: Sequence[int],
    permutations: int,
    every: Callable[[], list[Array]],
    drawn: Callable[[], Array],
) -> float:
    """Share of rearrangements as extreme: of all, where each block's `counts` multiply to few enough, else of some."""
    bar = abs(observed) - TIE
    if math.prod(counts) <= permutations:
        totals_R = reduce(lambda total, sums: (total[:, None] + sums).ravel(), every())
        return float(np.mean(np.abs(totals_R) >= bar))
    return (1 + int(np.sum(np.abs(drawn()) >= bar))) / (1 + permutations)


def _interval(sample: _Sample, ranked: bool, whole: bool, rng: np.random.Generator) -> Interval | None:
    """Percentile bootstrap interval; None when most resamples are constant."""
    x_N, y_N = sample.x_N, sample.y_N
    if not ranked:  # on one scale, so that a resample without spread can be told
        x_N, y_N = (_unit(values, sample.blocks, False) for values in (x_N, y_N))
    values_R = resampled(
        lambda weights_RN: _coefficients(x_N, y_N, weights_RN, sample.blocks, ranked),
        lambda count: _weights(sample, whole, count, rng),
        RESAMPLES,
        units=x_N.size,
    )
    known_R = values_R[np.isfinite(values_R)]
    return percentile_interval(known_R, CONFIDENCE) if known_R.size >= RESAMPLES / 2 else None


def _weights(sample: _Sample, whole: bool, count: int, rng: np.random.Generator) -> Array:
    """How often each point is in each of `count` resamples: [R, N]."""
    runs, weights_RN = sample.runs, np.zeros((count, sample.x_N.size))
    if whole:
        times_RG = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=count)
    for at, run in enumerate(runs):
        shares_K = np.full(run.size, 1 / run.size)
        weights_RN[:, run] = times_RG[:, [at]] if whole else rng.multinomial(run.size, shares_K, size=count)
    return weights_RN


def _coefficients(x_N: Array, y_N: Array, weights_RN: Array, blocks: Sequence[Block], ranked: bool) -> Array:
    """Coefficient in each of R weighted samples; NaN where x or y does not vary."""
    xy, xx, yy = (np.zeros(weights_RN.shape[0]) for _ in range(3))
    for block in blocks:
        w_RK = weights_RN[:, block]
        total_R1 = np.maximum(w_RK.sum(axis=1, keepdims=True), 1)
        x_RK, y_RK = (_ranks(v[block], w_RK) if ranked else v[block][None] for v in (x_N, y_N))
        x_RK = x_RK - (w_RK * x_RK).sum(axis=1, keepdims=True) / total_R1
        y_RK = y_RK - (w_RK * y_RK).sum(axis=1, keepdims=True) / total_R1
        xy += (w_RK * x_RK * y_RK).sum(axis=1)
        xx += (w_RK * x_RK * x_RK).sum(axis=1)
        yy += (w_RK * y_RK * y_RK).sum(axis=1)
    flat = (xx <= FLAT) | (yy <= FLAT)
    size = np.sqrt(np.where(flat, 1.0, xx) * np.where(flat, 1.0, yy))
    return np.where(flat, np.nan, np.clip(xy / size, -1.0, 1.0))
