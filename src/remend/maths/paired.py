"""Paired statistics of models on the same items: intervals, tests, and what n items can show.

Scores lie in [0, 1], one an item, and two models' scores are given in the same order of items. A difference is always
the later minus the earlier, so that exchanging the two changes signs and nothing else, to the last bit.

Legend: N items, G units that are drawn (clusters, else the items), K distinct units, C columns, R resamples, M and J
counts of flips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remend.errors import InputError
from remend.maths.intervals import Array, Interval, resampled, student_t

Clusters = Sequence[object] | NDArray[np.generic] | None
"""The name of each item's cluster, or None where every item stands alone."""

EXACT_FLIPS = 1_000
"""Expected flips up to which power is counted out; beyond, the usual formula is short of it by 1.1% or less."""

TINY = 1e-12
"""A spread below it is rounding."""


class Score(TypedDict):
    """A mean of scores, its interval, and the name of the method that gave the interval."""

    score: float
    interval: Interval
    method: str


def wilson(correct: float, n: int, level: float = 0.95) -> Interval:
    """Interval of a share of n independent items (Wilson 1927, JASA 22:209), never empty and never beyond [0, 1].

    Raises InputError unless 0 ≤ correct ≤ n, n ≥ 1 and 0 < level < 1.
    """
    z = _z(level)
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"{correct} correct of {n} items; allowed: 1 or more items, and 0 to all of them correct")
    low, high = _wilson(correct / n, n, z)
    return 0.0 if correct == 0 else low, 1.0 if correct == n else high


def _wilson(share: float, n: float, z: float) -> Interval:
    """For any number of items: scipy has it for whole ones, and clusters are worth a fraction of their items."""
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(scores: ArrayLike, clusters: Clusters = None) -> float:
    """Standard error of a mean of N scores, cluster-robust where clusters are given.

    √(G/(G−1) · Σ_g (Σ_{i in g} (s_i − s̄))²) / N: arXiv 2411.00640, with the usual correction for G clusters
    (Cameron & Miller 2015, J. Human Resources 50:317). Raises InputError with fewer than 2 clusters or items.
    """
    (scores_N,) = _vectors(scores)
    totals_G = _units(scores_N - scores_N.mean(), clusters)[:, 0]
    count = totals_G.size
    if count < 2:
        raise InputError(f"got {count} {'item' if clusters is None else 'cluster'}; a standard error needs 2 or more")
    return math.sqrt(count / (count - 1) * float(totals_G @ totals_G)) / scores_N.size


def t_interval(scores: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval of a mean of N scores: ± t(N−1) standard errors. It is not cut to [0, 1]."""
    (scores_N,) = _vectors(scores)
    error = standard_error(scores_N)
    half = _t(level, scores_N.size - 1) * error
    return float(scores_N.mean()) - half, float(scores_N.mean()) + half


def clustered_interval(scores: ArrayLike, clusters: Clusters, level: float = 0.95) -> Interval:
    """Wilson's interval of as many independent items as have the cluster-robust standard error, with t(G−1) for z.

    Clusters are items that stand or fall together: questions on one text, translations of one problem. With few of them
    it covers more than the t interval of a share (Dean & Pagano 2015, J. Surv. Stat. Methodol. 3:484; simulated in
    tests/maths/test_paired.py). Scores lie in [0, 1], not all the same.
    """
    (scores_N,) = _vectors(scores)
    mean, error = float(scores_N.mean()), standard_error(scores_N, clusters)
    alone = mean * (1 - mean) / error**2
    return _wilson(mean, alone, _t(level, len(_units(scores_N, clusters)) - 1))


def score_interval(scores: ArrayLike, clusters: Clusters = None, level: float = 0.95) -> Score:
    """{score, interval, method} of a mean: Wilson's where all are 0 or 1 or in clusters, else Student's t.

    Without any spread there is no standard error to go by; then a cluster counts as one item of Wilson's.
    """
    (scores_N,) = _vectors(scores)
    score, units = float(scores_N.mean()), len(_units(scores_N, clusters))
    if clusters is None and is_binary(scores_N):
        return {"score": score, "interval": wilson(int(scores_N.sum()), units, level), "method": "Wilson"}
    if units < 2 or standard_error(scores_N, clusters) < TINY:
        return {"score": score, "interval": wilson(score * units, units, level), "method": "Wilson of clusters"}
    if clusters is not None:
        return {"score": score, "interval": clustered_interval(scores_N, clusters, level), "method": "clustered Wilson"}
    low, high = t_interval(scores_N, level)
    return {"score": score, "interval": (max(0.0, low), min(1.0, high)), "method": "t"}


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of b items that flipped one way and c the other: twice the tail of Binomial(b + c, ½).

    McNemar 1947, Psychometrika 12:153, in its exact form.
    """
    from scipy.special import bdtr  # a fifth of a second

    if b < 0 or c < 0:
        raise InputError(f"got {b} and {c} flips; allowed are counts, 0 or more")
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def paired_share_interval(gained: int, lost: int, n: int, level: float = 0.95) -> Interval:
    """Interval of the difference of two shares on the same n items, of which `gained` turned right and `lost` wrong.

    Bonett & Price 2012 (J. Educ. Behav. Stat. 37:479): one flip each way is added, then Wald's. It has a width where
    nothing flipped, and excludes zero wherever `mcnemar_exact` is below 0.05.
    """
    if min(gained, lost) < 0 or n < max(1, gained + lost):
        raise InputError(f"got {gained} and {lost} flips of {n} items; allowed: counts that are no more than the items")
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre, half = up - down, _z(level) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    seed: int = 0,
    resamples: int = 10_000,
    *,
    level: float = 0.95,
    clusters: Clusters = None,
) -> Interval:
    """Percentile interval of mean(b) − mean(a), drawing items (whole clusters where given) with both their scores.

    Efron 1979; pairing as in arXiv 2411.00640. Percentiles are order statistics, rounded outwards.
    Raises InputError for scores that are no pairs, and for a level, seed or number of resamples that can't be.
    """
    a_N, b_N = _vectors(a, b)
    return _percentiles(_resampled_means(b_N - a_N, clusters, seed, resamples)[:, 0], level)


def sign_flip(differences: ArrayLike, seed: int = 0, resamples: int = 10_000, *, clusters: Clusters = None) -> float:
    """Two-sided p-value of a mean difference of zero: by chance each unit could as well have had the other sign.

    Fisher's paired randomisation test; on differences of −1, 0 and 1 it is the exact McNemar test. All 2^G signs are
    tried where they are no more than `resamples`, else that many are drawn and p is (hits + 1) / (resamples + 1).
    """
    (differences_N,) = _vectors(differences)
    _require_draws(seed, resamples)
    totals_G = _units(differences_N, clusters)[:, 0]
    totals_G = totals_G[np.abs(totals_G) > 1e-12]  # a difference of zero has no sign
    if totals_G.size == 0:
        return 1.0
    limit = abs(totals_G.sum()) - 1e-9 * np.abs(totals_G).sum()
    if totals_G.size < 60 and 2**totals_G.size <= resamples:
        codes_R = np.arange(2**totals_G.size)[:, None]
        signs_RG = 1.0 - 2.0 * ((codes_R >> np.arange(totals_G.size)) & 1)
        return float(np.mean(np.abs(signs_RG @ totals_G) >= limit))
    generator = np.random.default_rng(seed)

    def signs(rows: int) -> Array:
        return 1.0 - 2.0 * generator.integers(0, 2, size=(rows, totals_G.size), dtype=np.int8).astype(np.float64)

    sums_R = resampled(lambda signs_RG: signs_RG @ totals_G, signs, resamples, units=totals_G.size)
    hits = int(np.count_nonzero(np.abs(sums_R) >= limit))
    return (hits + 1) / (resamples + 1)


def paired_test(
    a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = 10_000, *, clusters: Clusters = None
) -> tuple[str, float]:
    """Name and p-value of the test that fits: exact McNemar for 0 and 1 without clusters, else random sign flips."""
    a_N, b_N = _vectors(a, b)
    if clusters is None and is_binary(a_N) and is_binary(b_N):
        return "exact McNemar", mcnemar_exact(int((b_N > a_N).sum()), int((b_N < a_N).sum()))
    name = "sign flips of clusters" if clusters is not None else "sign flips"
    return name, sign_flip(b_N - a_N, seed, resamples, clusters=clusters)


def is_binary(scores: Array) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def holm(p_values: ArrayLike) -> Array:
    """p-values adjusted for being several, in their order (Holm 1979, Scand. J. Statist. 6:65)."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):  # NaN is neither
        raise InputError(f"p-values are {p.tolist()}; allowed is a list of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def minimum_detectable_effect(n: int, discordant: float, power: float = 0.8, level: float = 0.95) -> float | None:
    """Smallest difference of two shares that the exact McNemar test on n items finds with this power.

    Args:
        n: items.
        discordant: share of items that flip, either way. A difference above it flips as many as it needs.
        power: chance to find it; 0.8 is Cohen's convention.
        level: of confidence; the test rejects below 1 − level. One test: Holm's adjustment would need more.

    Returns:
        A difference from 0 to 1, or None where not even flipping every item would be found.

    The power is counted out over all outcomes, since on 48 items the usual formula (Connor 1987, Biometrics 43:207;
    used here where more than EXACT_FLIPS flips are expected) promises what the exact test, which is conservative,
    does not hold.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise InputError(f"got n {n} and a share {discordant} of flips; allowed: 1 or more items, a share from 0 to 1")
    _require_share(level)
    _require_share(power)
    low, high = 0.0, 1.0
    if _power(n, 1.0, 1.0, 1 - level) < power:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        if _power(n, max(discordant, middle), middle, 1 - level) < power:
            low = middle
        else:
            high = middle
    return high


def detectable_difference(error: float, power: float = 0.8, level: float = 0.95) -> float:
    """Smallest mean difference found with this power, its standard error being `error` (arXiv 2411.00640)."""
    _require_share(power)
    return (_z(level) + NormalDist().inv_cdf(power)) * error


@dataclass(frozen=True)
class GapClosed:
    """Share of a loss that was won back, with the loss; `value` and `interval` are None where `reason` says why."""

    value: float | None
    interval: Interval | None
    gap: float
    gap_interval: Interval
    reason: str | None


def gap_closed(
    reference: ArrayLike,
    degraded: ArrayLike,
    recovered: ArrayLike,
    seed: int = 0,
    resamples: int = 10_000,
    *,
    level: float = 0.95,
    clusters: Clusters = None,
) -> GapClosed:
    """(recovered − degraded) / (reference − degraded) of mean scores, with a percentile interval paired over items.

    The three scores of an item (a cluster) are drawn together. Where the loss itself is not distinguishable from zero
    (its interval includes zero, or `paired_test` does not reject) or is a gain, no ratio is given. A resample without
    a loss counts as minus infinity for the low end and as infinity for the high one, which can only widen.
    """
    reference_N, degraded_N, recovered_N = _vectors(reference, degraded, recovered)
    columns_NC = np.column_stack([recovered_N - degraded_N, reference_N - degraded_N])
    won, lost = (float(mean) for mean in columns_NC.mean(axis=0))
    won_R, lost_R = _resampled_means(columns_NC, clusters, seed, resamples).T
    low, high = _percentiles(lost_R, level)
    chance = paired_test(reference_N, degraded_N, seed, resamples, clusters=clusters)[1]
    shown = f"{100 * lost:.1f} points ({level:.0%} {100 * low:.1f} to {100 * high:.1f}; p {chance:.2g})"
    if chance >= 1 - level or low <= 0 <= high:
        reason = f"the loss of {shown} is not distinguishable from zero on {reference_N.size} items"
        return GapClosed(None, None, lost, (low, high), reason)
    if lost < 0:
        return GapClosed(None, None, lost, (low, high), f"there is no loss to win back: it is {shown}, a gain")
    lossy_R = lost_R > 0
    ratios_R = np.divide(won_R, lost_R, out=np.zeros_like(won_R), where=lossy_R)
    below, _ = _percentiles(np.where(lossy_R, ratios_R, -np.inf), level)
    _, above = _percentiles(np.where(lossy_R, ratios_R, np.inf), level)
    return GapClosed(won / lost, (below, above), lost, (low, high), None)


def _vectors(*scores: ArrayLike) -> list[Array]:
    try:
        arrays = [np.asarray(values, dtype=np.float64) for values in scores]
    except (TypeError, ValueError) as error:
        raise InputError(f"scores are no list of numbers: {error}") from None
    if any(values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() for values in arrays):
        raise InputError("scores must be one finite number an item, for 1 item or more")
    if len({values.size for values in arrays}) > 1:
        counts = ", ".join(str(values.size) for values in arrays)
        raise InputError(f"there are {counts} scores; paired statistics need as many of each, in the same order")
    return arrays


def _units(columns: Array, clusters: Clusters) -> Array:
    """What is drawn, [G, C + 1]: each cluster's sums (an item's values) and its number of items."""
    columns_NC = columns[:, None] if columns.ndim == 1 else columns
    columns_NC = np.column_stack([columns_NC, np.ones(len(columns_NC))])
    if clusters is None:
        return columns_NC
    names = [str(name) for name in clusters]
    if len(names) != len(columns_NC):
        raise InputError(f"there are {len(names)} cluster names for {len(columns_NC)} scores; give one an item")
    _, which_N = np.unique(names, return_inverse=True)
    units_GC = np.zeros((int(which_N.max()) + 1, columns_NC.shape[1]))
    np.add.at(units_GC, which_N, columns_NC)
    return units_GC


def _resampled_means(columns: Array, clusters: Clusters, seed: int, resamples: int) -> Array:
    """Means of each column over R draws of G units with replacement, [R, C].

    Equal units are drawn together, by how often they come up (multinomial): graded items have few patterns. They stand
    in the order in which they first occur, which does not depend on their signs.
    """
    _require_draws(seed, resamples)
    units_GC = _units(columns, clusters)
    distinct_KC, first_K, counts_K = np.unique(units_GC, axis=0, return_index=True, return_counts=True)
    order_K = np.argsort(first_K)
    distinct_KC, shares_K = distinct_KC[order_K], counts_K[order_K] / len(units_GC)
    generator = np.random.default_rng(seed)
    totals_RC = resampled(
        lambda times_RK: times_RK @ distinct_KC,
        lambda rows: generator.multinomial(len(units_GC), shares_K, size=rows),
        resamples,
        units=len(distinct_KC),
    )
    means_RC: Array = totals_RC[:, :-1] / totals_RC[:, -1:]
    return means_RC


def _percentiles(values_R: Array, level: float) -> Interval:
    _require_share(level)
    ordered_R = np.sort(values_R)
    at = math.floor((1 - level) / 2 * (len(ordered_R) - 1))
    return float(ordered_R[at]) + 0.0, float(ordered_R[-1 - at]) + 0.0  # no minus zero


def _require_draws(seed: int, resamples: int) -> None:
    if resamples < 100 or seed < 0:
        raise InputError(f"got {resamples} resamples and seed {seed}; allowed: 100 or more, and a seed of 0 or more")


def _require_share(value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"level or power is {value}; allowed is a share between 0 and 1, such as 0.95")


def _z(level: float) -> float:
    """Two-sided normal quantile."""
    _require_share(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _t(level: float, degrees: int) -> float:
    """Two-sided quantile of Student's t."""
    _require_share(level)
    return student_t(level, degrees)


def _power(n: int, discordant: float, difference: float, alpha: float) -> float:
    """Chance that exact McNemar rejects at `alpha`, of n items that flip with `discordant` and net `difference`."""
    from scipy.stats import binom  # half a second

    if n * discordant > EXACT_FLIPS:
        spread = math.sqrt(max(discordant - difference**2, 1e-12))
        z = NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(discordant)
        return NormalDist().cdf((difference * math.sqrt(n) - z) / spread)
    up = min(1.0, (1 + difference / discordant) / 2)  # of the flips, the share that goes the way of the difference
    flips_M = np.arange(n + 1)
    most_M = binom.ppf(alpha / 2, flips_M, 0.5) - 1  # against the larger side, for the test to reject
    rejects_M = binom.cdf(most_M, flips_M, 1 - up) + binom.cdf(most_M, flips_M, up)
    return float(binom.pmf(flips_M, n, discordant) @ rejects_M)
