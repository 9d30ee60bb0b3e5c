"""Statistics of recovery: gap closed, and its interval paired over prompts. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

MEASURABLE_KL = 0.001
"""A degraded KL below this (nats a token) is no measurable damage, and no gap is there to close."""


def gap_closed_divergence(degraded: float, recovered: float) -> float | None:
    """Share of a divergence to the reference that was won back: 1 − recovered / degraded.

    0 is nothing, 1 all of it; it can be negative or, for noisy measures, above 1. None where there was no damage.
    """
    return None if degraded < MEASURABLE_KL else 1.0 - recovered / degraded


def gap_closed_score(reference: float, degraded: float, recovered: float) -> float | None:
    """Share of a lost score won back, (recovered − degraded) / (reference − degraded); None without a loss."""
    return None if reference == degraded else (recovered - degraded) / (reference - degraded)


def bootstrap_gap_closed(
    degraded_sums: Sequence[float],
    recovered_sums: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of gap closed, resampling prompts in pairs (arXiv 2411.00640: the prompt is the unit).

    Args:
        degraded_sums, recovered_sums: a prompt's divergence summed over its tokens, for both models on the same tokens
            (so that the ratio of sums is the ratio of token means).
        confidence: coverage.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        (low, high), or None with fewer than 2 prompts or no damage.
    """
    before, after = np.asarray(degraded_sums, dtype=np.float64), np.asarray(recovered_sums, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"{before.shape[0]} degraded and {after.shape[0]} recovered prompts are not pairs")
    if before.size < 2 or before.sum() <= 0:
        return None
    picks = np.random.default_rng(seed).integers(0, before.size, size=(resamples, before.size))
    total = before[picks].sum(axis=1)
    ratios = 1.0 - after[picks].sum(axis=1)[total > 0] / total[total > 0]  # a resample may hold no damage at all
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of a mean, e.g. of paired differences, resampling its items; None with fewer than 2."""
    items = np.asarray(values, dtype=np.float64)
    if items.size < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, items.size, size=(resamples, items.size))
    low, high = np.quantile(items[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def student_t(level: float, degrees: int) -> float:
    """Two-sided quantile of Student's t by bisection; t = √degrees · tan(angle) makes its density a power of cosine.

    `level` lies between 0 and 1: 0.95 gives the t that |T| is below with that chance.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def within(t: float) -> float:
        half = math.atan(t / math.sqrt(degrees)) / 2
        return float(2 * constant * half * (weights @ np.cos(half * (1 + nodes)) ** (degrees - 1)))

    low = high = NormalDist().inv_cdf((1 + level) / 2)
    while within(high) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return high
