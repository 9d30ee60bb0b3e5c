"""Means over seeds and items: the intervals cover what they say, on simulated tables whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from remend.errors import InputError
from remend.maths.gap import bootstrap_gap_closed
from remend.maths.seeds import by_cluster, certainty, gap_values, least_difference, planned_error

TRIES = 1000
Table = NDArray[np.float64]


def table(rng: np.random.Generator, seeds: int, items: int, *, seed: float, item: float, rest: float) -> Table:
    """Values with these standard deviations, and a mean of 0.1."""
    effects = seed * rng.normal(size=(seeds, 1)) + item * rng.normal(size=items)
    made: Table = 0.1 + effects + rest * rng.normal(size=(seeds, items))
    return made


def within_binomial(hits: int, share: float, tries: int = TRIES) -> bool:
    """Whether so many hits are no surprise (one in ten thousand) at this share."""
    low, high = stats.binom.interval(0.9999, tries, share)
    return bool(low <= hits <= high)


@pytest.mark.parametrize(
    ("seed", "item", "rest"),
    [(0.1, 0.0, 0.1), (0.05, 0.5, 0.3), (0.3, 1.0, 1.0), (0.02, 0.4, 0.1)],
    ids=["seeds", "both", "large", "items"],
)
def test_three_seeds_cover_other_seeds_and_items(seed: float, item: float, rest: float) -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(TRIES):
        low, high = certainty(table(rng, 3, 60, seed=seed, item=item, rest=rest)).over_both or (1.0, 0.0)
        hits += low <= 0.1 <= high
    assert hits / TRIES > 0.93
    assert within_binomial(hits, 0.95) or hits / TRIES > 0.95  # on the side of caution


def test_percentiles_of_a_two_level_bootstrap_cover_less() -> None:
    """Seeds drawn first, then items for all of them: why the intervals here are Student's."""
    rng, hits, ours = np.random.default_rng(2), 0, 0
    for _ in range(300):
        values = table(rng, 3, 60, seed=0.1, item=0.3, rest=0.1)
        draws = [values[rng.integers(0, 3, 3)][:, rng.integers(0, 60, 60)].mean() for _ in range(300)]
        low, high = np.quantile(draws, [0.025, 0.975])
        hits += bool(low <= 0.1 <= high)
        low, high = certainty(values).over_both or (1.0, 0.0)
        ours += low <= 0.1 <= high
    assert hits / 300 < 0.90
    assert within_binomial(ours, 0.95, 300) or ours / 300 > 0.95


def test_intervals_over_items_and_over_seeds_hold_the_other_fixed() -> None:
    rng, of_items, of_seeds = np.random.default_rng(3), 0, 0
    seeds_S, items_N = 0.2 * rng.normal(size=(3, 1)), 0.4 * rng.normal(size=40)
    for _ in range(TRIES):
        values = 0.1 + seeds_S + 0.4 * rng.normal(size=40) + 0.1 * rng.normal(size=(3, 40))
        low, high = certainty(values).over_items or (1.0, 0.0)
        of_items += low <= 0.1 + seeds_S.mean() <= high
        values = 0.1 + 0.2 * rng.normal(size=(3, 1)) + items_N + 0.1 * rng.normal(size=(3, 40))
        low, high = certainty(values).over_seeds or (1.0, 0.0)
        of_seeds += low <= 0.1 + items_N.mean() <= high
    assert within_binomial(of_items, 0.95)
    assert within_binomial(of_seeds, 0.95)


def test_no_effect_is_rejected_as_often_as_said_and_the_least_difference_is_found() -> None:
    """Paired grades of 200 rows: 20% flip, seeds differ by 2 points."""
    rng, false, found = np.random.default_rng(4), 0, 0
    error, degrees = planned_error(200, 3, of_items=math.sqrt(0.2), of_seeds=0.02)
    least = least_difference(error, degrees)
    for effect in (0.0, least):
        for _ in range(TRIES):
            shift = 0.02 * rng.normal(size=(3, 1))
            flips = rng.random(200) < 0.2  # the same items at every seed: what `planned_error` assumes
            up = rng.random(200) < 0.5 + (effect / 0.2) / 2
            p = certainty(np.where(flips, np.where(up, 1.0, -1.0), 0.0) + shift).p_value
            assert p is not None
            false, found = (false + (p < 0.05), found) if effect == 0 else (false, found + (p < 0.05))
    assert false / TRIES < 0.065
    assert found / TRIES > 0.75
    assert 0.08 < least < 0.12


def test_gap_closed_is_the_mean_of_its_values_and_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(5)
    before = np.tile(rng.gamma(4.0, 5.0, size=64), (3, 1))
    after = before * (0.3 + 0.05 * rng.normal(size=(1, 64)))
    values = gap_values(before, after + 0 * before)
    assert values.mean() == pytest.approx(1 - after.sum() / before.sum())
    drawn = bootstrap_gap_closed(before[0].tolist(), after[0].tolist())
    assert drawn is not None
    assert certainty(values[:1]).over_items == pytest.approx(drawn, abs=0.006)


def test_clusters_weigh_as_wholes() -> None:
    rng = np.random.default_rng(6)
    values = np.repeat(rng.normal(size=(2, 10)), 4, axis=1)  # four copies of each
    names = [i // 4 for i in range(40)]
    assert by_cluster(values, names).mean(axis=1) == pytest.approx(values.mean(axis=1))
    assert certainty(by_cluster(values, names)).error == pytest.approx(certainty(values[:, ::4]).error)
    assert by_cluster(values, [f"{i:02d}" for i in range(40)]) == pytest.approx(values)


def test_one_seed_and_tables_without_spread() -> None:
    rng = np.random.default_rng(7)
    one = certainty(rng.normal(size=(1, 30)))
    assert one.over_both is None
    assert one.over_seeds is None
    assert one.interval == one.over_items
    assert one.p_value == pytest.approx(stats.ttest_1samp(np.random.default_rng(7).normal(size=30), 0).pvalue)
    still = certainty(np.zeros((3, 5)))
    assert (still.value, still.interval, still.p_value, still.least) == (0.0, None, 1.0, None)
    assert certainty(np.ones((3, 5))).p_value is None
    for wrong in ([1.0, 2.0], [[math.nan]], np.zeros((0, 2))):
        with pytest.raises(InputError, match="a row a seed and a column an item"):
            certainty(wrong)
    with pytest.raises(InputError, match=r"level or power is 1\.5"):
        certainty([[1.0, 2.0]], power=1.5)
    with pytest.raises(InputError, match="2 items, 1 seed"):
        planned_error(1, 3, of_items=1.0, of_seeds=0.0)
    with pytest.raises(InputError, match="no damage"):
        gap_values([[0.0, 0.0]], [[0.0, 0.0]])
