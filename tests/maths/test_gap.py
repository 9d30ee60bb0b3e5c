"""Gap closed, and its bootstrap interval against full enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from remend.maths.gap import MEASURABLE_KL, bootstrap_gap_closed, gap_closed_divergence, gap_closed_score


@pytest.mark.parametrize(
    ("degraded", "recovered", "expected"),
    [(2.0, 2.0, 0.0), (2.0, 0.0, 1.0), (2.0, 0.5, 0.75), (2.0, 3.0, -0.5), (1.0, -0.1, 1.1)],
)
def test_gap_closed_of_a_divergence(degraded: float, recovered: float, expected: float) -> None:
    assert gap_closed_divergence(degraded, recovered) == pytest.approx(expected)


def test_without_damage_there_is_no_gap() -> None:
    assert gap_closed_divergence(0.0, 0.0) is None
    assert gap_closed_divergence(MEASURABLE_KL * 0.99, 5.0) is None
    assert gap_closed_divergence(MEASURABLE_KL, 0.0) == 1.0
    assert gap_closed_score(0.5, 0.5, 0.7) is None


@pytest.mark.parametrize(
    ("reference", "degraded", "recovered", "expected"),
    [(0.8, 0.4, 0.6, 0.5), (0.8, 0.4, 0.3, -0.25), (0.8, 0.4, 0.9, 1.25), (0.4, 0.8, 0.6, 0.5), (1.0, 0.0, 0.0, 0.0)],
)
def test_gap_closed_of_a_score(reference: float, degraded: float, recovered: float, expected: float) -> None:
    assert gap_closed_score(reference, degraded, recovered) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_interval_equals_the_enumeration_of_all_resamples(confidence: float) -> None:
    """Six prompts have 46,656 resamples: the interval is that of all of them, to sampling error."""
    before = [3.1, 0.7, 2.2, 5.9, 1.4, 4.3]
    after = [1.0, 0.9, 0.4, 2.5, 0.1, 1.9]
    ratios = [
        1 - sum(after[i] for i in pick) / sum(before[i] for i in pick) for pick in itertools.product(range(6), repeat=6)
    ]
    expected = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    interval = bootstrap_gap_closed(before, after, confidence=confidence, resamples=40_000)
    # a quantile of 40,000 draws errs by about sqrt(0.25 / 40000) / density = 0.0025 / 4
    assert interval == pytest.approx(expected, abs=0.004)


def test_pairs_stay_together() -> None:
    rng = np.random.default_rng(0)
    before = rng.gamma(1.0, 5.0, size=40)
    low, high = bootstrap_gap_closed(before, 0.25 * before)
    assert low == pytest.approx(0.75)
    assert high == pytest.approx(0.75)
    low, high = bootstrap_gap_closed(before, 0.25 * rng.permutation(before))
    assert high - low > 0.1


def test_seed_and_resamples_have_their_effect() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0], [1.0, 0.5, 2.0, 0.3]
    assert bootstrap_gap_closed(before, after, seed=1) == bootstrap_gap_closed(before, after, seed=1)
    few = [bootstrap_gap_closed(before, after, seed=s, resamples=50) for s in (1, 2)]
    assert few[0] != few[1]
    wide, narrow = (bootstrap_gap_closed(before, after, confidence=c) for c in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_where_there_is_no_interval() -> None:
    for before, after in (([1.0], [0.5]), ([], []), ([0.0, 0.0], [0.0, 0.1])):
        assert bootstrap_gap_closed(before, after) is None
    with pytest.raises(ValueError, match="2 degraded and 3 recovered prompts are not pairs"):
        bootstrap_gap_closed([1.0, 2.0], [1.0, 2.0, 3.0])
    # two of three prompts undamaged: 8 of 27 resamples have no damage at all, and no ratio
    assert bootstrap_gap_closed([0.0, 0.0, 4.0], [0.0, 0.0, 1.0], resamples=500) == (0.75, 0.75)
