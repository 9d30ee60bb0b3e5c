"""Correlations against scipy and plain loops, their p-values by brute force, levels, intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from remend.errors import InputError
from remend.maths.correlation import POINTS_FOR_INTERVAL, RUNS_TO_RESAMPLE, Correlation, pearson, spearman

MEASURES = {"spearman": (spearman, stats.spearmanr), "pearson": (pearson, stats.pearsonr)}
Measure = Callable[..., Correlation]


def slow_ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < own for v in values) + (sum(v == own for v in values) + 1) / 2 for own in values]


def slow_pearson(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    cross = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    size = math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y)
    return cross / math.sqrt(size)


def slow_within(runs: Sequence[tuple[Sequence[float], Sequence[float]]], ranked: bool) -> float:
    """The correlation of what is left after each run's means are taken off; ranks as shares of the run."""
    left: list[list[float]] = [[], []]
    for run in runs:
        for side, values in enumerate(run):
            used = [r / len(values) for r in slow_ranks(values)] if ranked else list(values)
            left[side] += [v - math.fsum(used) / len(used) for v in used]
    return slow_pearson(*left)


def flat(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float], list[int]]:
    x = [v for run in runs for v in run[0]]
    y = [v for run in runs for v in run[1]]
    return x, y, [g for g, run in enumerate(runs) for _ in run[0]]


def random_runs(seed: int, sizes: Sequence[int], slope: float = 0.5) -> list[tuple[list[float], list[float]]]:
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        x = rng.normal(size=size) + 3 * rng.normal()
        found.append((x.tolist(), (slope * x + rng.normal(size=size)).tolist()))
    return found


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("n", [3, 57])
def test_coefficients_are_scipys(name: str, n: int) -> None:
    ours, theirs = MEASURES[name]
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    for pair in ((x, y), (1e6 + x, -y), (np.round(x), np.round(y)), (1e-200 * x, 1e200 * y)):
        if np.ptp(pair[0]) and np.ptp(pair[1]):
            found = ours(*pair, permutations=50)
            assert found.coefficient == pytest.approx(theirs(*pair).statistic, abs=1e-8 if pair[0][0] > 1e5 else 1e-12)
            assert found.n == n


@pytest.mark.parametrize("ranked", [True, False])
def test_within_runs_only_runs_are_shuffled(ranked: bool) -> None:
    """All 3! · 4! orders that leave each value in its run, and the coefficient, by plain loops."""
    runs = [([1.0, 2.0, 4.0], [1.0, 3.0, 2.5]), ([10.0, 11.0, 13.0, 12.5], [-5.0, -2.0, -3.0, -1.0])]
    measure = spearman if ranked else pearson
    found = measure(*flat(runs)[:2], groups=flat(runs)[2], level="within")
    observed = slow_within(runs, ranked)
    assert found.coefficient == pytest.approx(observed, abs=1e-12)
    totals = [
        slow_within([(x, order) for (x, _), order in zip(runs, orders, strict=True)], ranked)
        for orders in itertools.product(*(itertools.permutations(y) for _, y in runs))
    ]
    assert len(totals) == 144
    assert found.p_value == pytest.approx(np.mean(np.abs(totals) >= abs(observed) - 1e-9), abs=1e-12)
    shifts = [
        slow_within([(x, y[-s:] + y[:-s]) for (x, y), s in zip(runs, each, strict=True)], ranked)
        for each in itertools.product(range(3), range(4))
    ]
    assert found.shift_p_value == pytest.approx(np.mean(np.abs(shifts) >= abs(observed) - 1e-9), abs=1e-12)


@pytest.mark.parametrize("ranked", [True, False])
def test_between_runs_the_run_is_the_unit(ranked: bool) -> None:
    runs = random_runs(3, [2, 5, 3, 1, 7])
    x, y, groups = flat(runs)
    means = [[math.fsum(run[side]) / len(run[side]) for run in runs] for side in (0, 1)]
    a, b = (slow_ranks(means[0]), slow_ranks(means[1])) if ranked else means
    observed = slow_pearson(a, b)
    found = (spearman if ranked else pearson)(x, y, groups=groups, level="between")
    assert found.coefficient == pytest.approx(observed, abs=1e-12)
    extreme = sum(abs(slow_pearson(a, order)) >= abs(observed) - 1e-9 for order in itertools.permutations(b))
    assert found.p_value == pytest.approx(extreme / 120, abs=1e-12)
    assert (found.n, found.runs, found.shift_p_value, found.low, found.resampled) == (5, 5, None, None, None)


def test_drawn_p_values_come_near_the_enumerated_and_are_never_zero() -> None:
    x, y, groups = flat(random_runs(4, [3, 4, 3]))
    for level in ("pooled", "within"):
        groups_or_none = groups if level == "within" else None
        n = 7 if level == "pooled" else 10
        every, drawn = (
            pearson(x[:n], y[:n], groups=groups_or_none, level=level, permutations=count) for count in (5040, 5039 // 7)
        )
        assert drawn.coefficient == every.coefficient
        assert drawn.p_value == pytest.approx(every.p_value, abs=4 * math.sqrt(0.25 / 720))
    ordered = np.arange(40.0)
    assert spearman(ordered, ordered, permutations=199).p_value == 1 / 200
    assert spearman(ordered, ordered, permutations=199).shift_p_value == pytest.approx(1 / 40)


def test_simpsons_paradox_is_seen() -> None:
    """Along each run y rises with x; runs of higher x have lower y."""
    runs = [([g + 0.1 * t for t in range(5)], [-2.0 * g + 0.1 * t for t in range(5)]) for g in range(6)]
    x, y, groups = flat(runs)
    for measure in (spearman, pearson):
        within, between, pooled = (measure(x, y, groups=groups, level=at) for at in ("within", "between", "pooled"))
        assert within.coefficient == pytest.approx(1.0)
        assert between.coefficient == pytest.approx(-1.0)
        assert pooled.coefficient < -0.8
        assert pooled.shift_p_value is None
        assert within.p_value < 0.001
        assert between.p_value == pytest.approx(2 / math.factorial(6))


def test_runs_are_told_by_their_group_and_may_be_mixed() -> None:
    runs = random_runs(7, [5, 5, 5])
    x, y, groups = flat(runs)
    order = np.arange(15).reshape(3, 5).T.ravel()  # the first point of each run, then the second
    names = [f"run {'cab'[groups[i]]}" for i in order]
    for level in ("within", "between"):
        one = spearman(x, y, groups=groups, level=level)
        two = spearman(np.array(x)[order], np.array(y)[order], groups=names, level=level)
        assert two.coefficient == pytest.approx(one.coefficient)
        assert (two.n, two.runs) == (one.n, one.runs)


def test_within_leaves_out_runs_of_one_point() -> None:
    x, y, groups = flat([([1.0, 2.0, 3.0], [1.0, 2.0, 2.5]), ([9.0], [-9.0]), ([4.0, 5.0], [4.0, 6.0])])
    found = pearson(x, y, groups=groups, level="within")
    assert (found.n, found.runs) == (5, 2)
    assert found.coefficient == pytest.approx(2.5 / np.sqrt(2.5 * 19 / 6))  # by hand, each run from its mean
    assert pearson(x, y, groups=groups).n == 6


@pytest.mark.parametrize(
    ("x", "y", "groups", "level", "reason"),
    [
        ([1, 2], [1, 2], None, "pooled", "2 points; a correlation needs 3 or more"),
        ([], [], None, "pooled", "0 points; a correlation needs 3 or more"),
        ([0.1] * 4, [1, 2, 3, 4], None, "pooled", "CKA is the same at every point"),
        ([1, 2, 3, 4], [0.3] * 4, None, "pooled", "recovery is the same at every point"),
        ([1, 1, 2, 2], [1, 2, 3, 4], "aabb", "within", "CKA is the same all along each run"),
        (
            [1, 2, 3],
            [1, 2, 3],
            "abb",
            "within",
            "2 points in 1 run of two or more; a correlation within runs needs at least 2 more",
        ),
        ([1, 2, 3], [1, 2, 3], "abc", "within", "0 points in 0 runs"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "aabb", "between", "2 runs; a correlation between runs needs 3 or more"),
        ([0, 2, 1, 0, 2], [1, 2, 3, 4, 5], "aabcc", "between", "CKA is the same on average in every run"),
    ],
)
def test_where_there_is_none_it_says_why(
    x: list[float], y: list[float], groups: str | None, level: str, reason: str
) -> None:
    for measure in (spearman, pearson):
        found = measure(x, y, groups=groups, level=level, names=("CKA", "recovery"))
        assert found.coefficient is found.p_value is found.low is found.high is found.shift_p_value is None
        assert found.reason.startswith(reason)


def test_intervals_resample_runs_from_eight_on() -> None:
    few, many = (flat(random_runs(8, [6] * count)) for count in (RUNS_TO_RESAMPLE - 1, RUNS_TO_RESAMPLE))
    for measure in (spearman, pearson):
        for level in ("pooled", "within", "between"):
            some = measure(few[0], few[1], groups=few[2], level=level, permutations=20)
            more = measure(many[0], many[1], groups=many[2], level=level, permutations=20)
            assert some.resampled == (None if level == "between" else "points")
            assert more.resampled == "runs"
            assert -1 <= more.low <= more.coefficient <= more.high <= 1


def test_too_few_points_have_no_interval() -> None:
    x, y = np.arange(POINTS_FOR_INTERVAL), np.array([0, 2, 1, 3, 5])
    assert spearman(x[:-1], y[:-1]).low is None
    assert spearman(x, y).low is not None


@pytest.mark.parametrize("name", MEASURES)
def test_weighted_resamples_are_resamples(name: str) -> None:
    """The interval of 5 points against that of all 3,125 resamples, each by scipy."""
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 1.5]
    ranked = name == "spearman"
    values = []
    for pick in itertools.product(range(5), repeat=5):
        a, b = [x[i] for i in pick], [y[i] for i in pick]
        if len(set(a)) > 1 and len(set(b)) > 1:
            values.append(slow_pearson(slow_ranks(a), slow_ranks(b)) if ranked else slow_pearson(a, b))
    found = MEASURES[name][0](x, y)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        # the end of 2,000 draws lies between quantiles that are four of its standard errors apart
        near = 4 * math.sqrt(share * (1 - share) / 2000)
        low, high = np.quantile(values, [max(0, share - near), min(1, share + near)])
        assert low - 1e-9 <= end <= high + 1e-9


def test_resampling_runs_is_wider_where_runs_differ() -> None:
    """Each run has its own slope: whole runs vary more than their points do."""
    rng = np.random.default_rng(10)
    runs = []
    for slope in (2.0, 1.5, -1.0, 1.0, 0.5, 2.0, -0.5, 1.0):
        x = rng.normal(size=30)
        runs.append((x.tolist(), (slope * x + 0.1 * rng.normal(size=30)).tolist()))
    whole = pearson(*flat(runs)[:2], groups=flat(runs)[2], level="within", permutations=1)
    part = flat(runs[:-1])
    points = pearson(part[0], part[1], groups=part[2], level="within", permutations=1)
    assert (whole.resampled, points.resampled) == ("runs", "points")
    assert whole.high - whole.low > 2 * (points.high - points.low)


def test_the_seed_settles_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it does where a large sample is drawn in parts."""
    x, y, groups = flat(random_runs(11, [30] * 3))
    one, two, other = (spearman(x, y, groups=groups, level="within", permutations=99, seed=s) for s in (1, 1, 2))
    assert one == two
    assert (one.low, one.high) != (other.low, other.high)
    whole = [measure(x, y, permutations=99) for measure in (spearman, pearson)]
    monkeypatch.setattr("remend.maths.intervals.CELLS", 1000)
    assert [measure(x, y, permutations=99) for measure in (spearman, pearson)] == whole


def test_what_is_refused() -> None:
    for measure in (spearman, pearson):
        with pytest.raises(InputError, match=r"x has the shape \(2,\) and y \(3,\); allowed are two lists"):
            measure([1, 2], [1, 2, 3])
        with pytest.raises(InputError, match="two lists of one length"):
            measure([[1, 2]], [[1, 2]])
        with pytest.raises(InputError, match="NaN or an infinite value; leave such points out"):
            measure([1, 2, math.nan], [1, 2, 3])
        with pytest.raises(InputError, match="NaN or an infinite value"):
            measure([1, 2, 3], [1, 2, math.inf])
        with pytest.raises(InputError, match="2 groups for 3 points"):
            measure([1, 2, 3], [1, 2, 3], groups=["a", "b"])
        with pytest.raises(InputError, match='level is "inside"; allowed: pooled, within, between'):
            measure([1, 2, 3], [1, 2, 3], level="inside")
        for level in ("within", "between"):
            with pytest.raises(InputError, match=f"the level {level} needs groups"):
                measure([1, 2, 3], [1, 2, 3], level=level)
        with pytest.raises(InputError, match="permutations is 0 and seed 0; allowed are 1 or more, and 0 or more"):
            measure([1, 2, 3], [1, 2, 3], permutations=0)
        with pytest.raises(InputError, match="permutations is 10 and seed -1"):
            measure([1, 2, 3], [1, 2, 3], permutations=10, seed=-1)
