"""Statistics of recovery: gap closed, and its interval paired over prompts. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remend.maths.intervals import Array, Interval, Picks, percentile_interval, resampled, with_replacement

MEASURABLE_KL = 0.001
"""A degraded KL below this (nats per token) is no measurable damage, and no gap is there to close."""


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
) -> Interval | None:
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

    def gap_closed(picks_RN: Picks) -> Array:
        total_R = before[picks_RN].sum(axis=1)
        damaged_R = total_R > 0  # a resample may hold no damage at all
        ratios_R: Array = 1.0 - after[picks_RN].sum(axis=1)[damaged_R] / total_R[damaged_R]
        return ratios_R

    draw = with_replacement(before.size, seed)
    return percentile_interval(resampled(gap_closed, draw, resamples, units=before.size), confidence)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """Percentile interval of a mean, e.g. of paired differences, resampling its items; None with fewer than 2."""
    items = np.asarray(values, dtype=np.float64)
    if items.size < 2:
        return None
    draw = with_replacement(items.size, seed)
    means_R = resampled(lambda picks_RN: items[picks_RN].mean(axis=1), draw, resamples, units=items.size)
    return percentile_interval(means_R, confidence)
