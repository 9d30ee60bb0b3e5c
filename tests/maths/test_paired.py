"""Paired statistics against scipy, full enumeration and slow references, and the coverage of clustered intervals."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from remend.errors import InputError
from remend.maths import paired


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("n", [1, 7, 254])
def test_wilson_is_scipys(n: int, level: float) -> None:
    for correct in {0, 1, n // 3, n - 1, n}:
        expected = stats.binomtest(correct, n).proportion_ci(level, method="wilson")
        assert paired.wilson(correct, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert paired.wilson(0, n)[0] == 0.0
    assert paired.wilson(n, n)[1] == 1.0


def slow_error(scores: list[float], clusters: list[Any]) -> float:
    """Every pair of items of one cluster, as arXiv 2411.00640 writes the sum, with the correction for few clusters."""
    n, mean, groups = len(scores), sum(scores) / len(scores), len(set(clusters))
    total = sum(
        (scores[i] - mean) * (scores[j] - mean) for i in range(n) for j in range(n) if clusters[i] == clusters[j]
    )
    return math.sqrt(total * groups / (groups - 1)) / n


def test_standard_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(30)
    assert paired.standard_error(scores) == pytest.approx(stats.sem(scores))
    assert paired.standard_error(scores, range(30)) == pytest.approx(stats.sem(scores))
    equal = paired.standard_error(scores, [i // 5 for i in range(30)])
    assert equal == pytest.approx(stats.sem(scores.reshape(6, 5).mean(axis=1)))
    names = [rng.choice(["a", "b", "c", "d"]) for _ in scores]
    assert paired.standard_error(scores, names) == pytest.approx(slow_error(scores.tolist(), names))


def test_t_interval() -> None:
    scores = np.random.default_rng(0).random(30)
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.8)
    assert paired.t_interval(scores, 0.8) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 6), (7, 7), (3, 9), (120, 213), (1400, 1290)])
def test_mcnemar_is_the_binomial_test_in_whole_numbers(b: int, c: int) -> None:
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    assert paired.mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail / 2 ** (b + c)), rel=1e-11)
    assert paired.mcnemar_exact(b, c) == paired.mcnemar_exact(c, b)


def test_difference_of_paired_shares() -> None:
    """Bonett & Price's formula on numbers; wherever McNemar's test rejects, the interval leaves zero out."""
    up, down = 9 / 50, 3 / 50
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / 50)
    assert paired.paired_share_interval(8, 2, 48) == pytest.approx((up - down - half, up - down + half), abs=1e-12)
    low, high = paired.paired_share_interval(2, 8, 48)
    assert (-high, -low) == paired.paired_share_interval(8, 2, 48)
    for n in (6, 10, 20, 48):
        for gained, lost in ((g, k) for g in range(n + 1) for k in range(n + 1 - g)):
            low, high = paired.paired_share_interval(gained, lost, n)
            assert -1 <= low <= (gained - lost) / n <= high <= 1
            assert paired.mcnemar_exact(gained, lost) >= 0.05 or not low <= 0 <= high


def draw(rng: np.random.Generator, n: int, shares: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Right or wrong of n items under several models, correlated through the items' difficulty."""
    difficulty = rng.normal(size=n)
    return tuple(
        (difficulty + rng.normal(size=n) < math.sqrt(2) * stats.norm.ppf(share)).astype(float) for share in shares
    )


@pytest.mark.parametrize("bias", [0.0, -1.0])
@pytest.mark.parametrize("groups", [8, 40])
def test_clustered_interval_covers(groups: int, bias: float) -> None:
    """1,000 experiments of clusters of 5 that stand and fall together, where an interval over items falls far short.

    The standard error is 0.7 points. Student's interval of the clusters' means covers less.
    """
    rng, share = np.random.default_rng(6), stats.norm.cdf(bias / math.sqrt(2))
    names = np.repeat(np.arange(groups), 5)
    covered = alone = students = 0
    for _ in range(1000):
        ease = np.repeat(rng.normal(size=groups), 5)
        scores = (ease + rng.normal(size=5 * groups) < bias).astype(float)
        low, high = paired.score_interval(scores, names)["interval"]
        covered += low <= share <= high
        low, high = paired.score_interval(scores)["interval"]
        alone += low <= share <= high
        low, high = paired.t_interval(scores.reshape(groups, 5).mean(axis=1))
        students += low <= share <= high
    assert students < covered
    assert abs(covered / 1000 - 0.95) <= 0.02
    assert alone / 1000 < 0.87


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_clustered_interval_inverts_its_test(level: float) -> None:
    """Its ends are the shares p at which |mean − p| is t(G−1) standard errors of p(1 − p) over the effective items."""
    rng = np.random.default_rng(0)
    scores, names = rng.random(30), rng.choice(list("abcd"), 30)
    mean, alone = scores.mean(), scores.mean() * (1 - scores.mean()) / paired.standard_error(scores, names) ** 2
    for end in paired.clustered_interval(scores, names, level):
        gap = abs(mean - end) / math.sqrt(end * (1 - end) / alone)
        assert gap == pytest.approx(stats.t.ppf((1 + level) / 2, 3), rel=1e-9)


def test_paired_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)
    expected = stats.bootstrap(
        (a, b),
        lambda x, y, axis=-1: y.mean(axis=axis) - x.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        method="percentile",
        confidence_level=0.8,
        rng=np.random.default_rng(4),
    ).confidence_interval
    interval = paired.paired_bootstrap(a, b, 0, 40_000, level=0.8)
    # a quantile of 40,000 draws with spread 0.065 errs by about 0.065 · sqrt(0.1 · 0.9 / 40000) / 0.18 = 0.0005
    assert interval == pytest.approx((expected.low, expected.high), abs=0.002)


def test_bootstrap_of_clusters_is_the_enumeration_of_all_resamples() -> None:
    a = [1.0, 0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 0.3]
    b = [0.0, 0.0, 0.4, 0.9, 0.1, 1.0, 0.0, 1.0, 0.8]
    clusters = ["p", "p", "q", "q", "q", "r", "s", "s", "t"]
    groups = [[i for i, name in enumerate(clusters) if name == group] for group in "pqrst"]
    means = []
    for pick in itertools.product(groups, repeat=5):
        items = [i for group in pick for i in group]
        means.append(sum(b[i] - a[i] for i in items) / len(items))
    means.sort()
    interval = paired.paired_bootstrap(a, b, 0, 50_000, level=0.8, clusters=clusters)
    assert interval == pytest.approx((means[312], means[-313]), abs=0.02)


@pytest.mark.parametrize("clusters", [None, [i // 3 for i in range(60)]])
def test_exchanging_the_models_changes_signs_only(clusters: list[int] | None) -> None:
    rng = np.random.default_rng(5)
    for a, b in (rng.random((2, 60)), rng.integers(0, 2, (2, 60)), rng.choice([0.0, 0.1, 0.3, 1.0], (2, 60))):
        low, high = paired.paired_bootstrap(a, b, 7, 500, clusters=clusters)
        assert paired.paired_bootstrap(b, a, 7, 500, clusters=clusters) == (-high, -low)
        assert paired.sign_flip(b - a, clusters=clusters) == paired.sign_flip(a - b, clusters=clusters)


def test_seed_resamples_and_level_have_their_effect() -> None:
    a, b = np.random.default_rng(6).random((2, 30))
    assert paired.paired_bootstrap(a, b, 1) == paired.paired_bootstrap(a, b, 1)
    assert paired.paired_bootstrap(a, b, 1, 100) != paired.paired_bootstrap(a, b, 2, 100)
    wide, narrow = paired.paired_bootstrap(a, b), paired.paired_bootstrap(a, b, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_chunks_of_resamples_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(6).random((2, 30))
    interval, p = paired.paired_bootstrap(a, b), paired.sign_flip(a - b)
    monkeypatch.setattr("remend.maths.intervals.CELLS", 7_000)
    assert paired.paired_bootstrap(a, b) == pytest.approx(interval)
    assert paired.sign_flip(a - b) == pytest.approx(p, abs=0.02)


def test_sign_flips_are_scipys_permutation_test() -> None:
    for seed in range(5):
        differences = np.random.default_rng(seed).normal(0.4, 1, size=10)
        expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert paired.sign_flip(differences) == pytest.approx(expected.pvalue, rel=1e-12)
        drawn = paired.sign_flip(differences, resamples=1000)  # fewer than 2^10
        assert drawn == pytest.approx(expected.pvalue, abs=4 * math.sqrt(0.25 / 1000))


def test_sign_flips_of_flips_are_mcnemars() -> None:
    for gained, lost in ((6, 0), (7, 2), (3, 3), (0, 0), (1, 9)):
        differences = [1.0] * gained + [-1.0] * lost + [0.0] * 30
        assert paired.sign_flip(differences) == pytest.approx(paired.mcnemar_exact(gained, lost))


def test_sign_flips_of_clusters() -> None:
    """Sixteen items that rise together in two clusters are two coincidences, not sixteen: p is 1/2."""
    assert paired.sign_flip([1.0] * 16, clusters=[0] * 8 + [1] * 8) == 0.5
    assert paired.sign_flip([1.0] * 16, resamples=100_000) == 2 / 2**16


def test_the_test_that_fits() -> None:
    a, b = np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0])
    assert paired.paired_test(a, b) == ("exact McNemar", 1.0)
    assert paired.paired_test(a, b / 2)[0] == "sign flips"
    assert paired.paired_test(a, b, clusters=["x", "x", "y"])[0] == "sign flips of clusters"


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, 0.02, 0.9, 0.5], [0.08, 0.08, 1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert paired.holm(p_values).tolist() == pytest.approx(adjusted)


def slow_power(n: int, discordant: float, difference: float) -> float:
    """Every outcome of n items, its probability and scipy's test."""
    up, down = (discordant + difference) / 2, (discordant - difference) / 2
    total = 0.0
    for b, c in itertools.product(range(n + 1), repeat=2):
        if 0 < b + c <= n and stats.binomtest(b, b + c, 0.5).pvalue < 0.05:
            total += stats.multinomial.pmf([b, c, n - b - c], n, [up, down, 1 - up - down])
    return total


def test_minimum_detectable_effect_against_every_outcome() -> None:
    effect = paired.minimum_detectable_effect(30, 0.25)
    assert effect is not None
    assert slow_power(30, max(0.25, effect), effect) == pytest.approx(0.8, abs=1e-4)


def test_minimum_detectable_effect_of_many_items_is_connors() -> None:
    n, discordant = 20_000, 0.2
    effect = paired.minimum_detectable_effect(n, discordant)
    assert effect is not None
    z, z_power = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    assert n == pytest.approx(
        ((z * math.sqrt(discordant) + z_power * math.sqrt(discordant - effect**2)) / effect) ** 2, rel=1e-3
    )
    counted = paired.minimum_detectable_effect(4_990, discordant)  # just below EXACT_FLIPS
    formula = paired.minimum_detectable_effect(5_010, discordant)
    assert counted == pytest.approx(formula, rel=0.02)


def test_minimum_detectable_effect_at_its_ends() -> None:
    """Five items can't reject at 5% (2/32), six can when all of them flip (2/64)."""
    assert paired.minimum_detectable_effect(5, 0.5) is None
    assert paired.minimum_detectable_effect(6, 0.5) == pytest.approx(0.8 ** (1 / 6), abs=1e-5)
    more = [paired.minimum_detectable_effect(100, share) or 0 for share in (0.0, 0.1, 0.3, 0.6)]
    assert more == sorted(more)
    assert paired.detectable_difference(0.02) == pytest.approx(0.02 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)))


def test_gap_closed_of_known_scores() -> None:
    reference = np.array([1.0] * 40 + [0.0] * 20)
    degraded = np.array([0.0] * 40 + [0.0] * 20)
    recovered = np.array([1.0] * 30 + [0.0] * 30)
    closed = paired.gap_closed(reference, degraded, recovered)
    assert (closed.value, closed.reason) == (0.75, None)
    assert closed.gap == pytest.approx(2 / 3)
    assert closed.interval is not None
    # given the 40 lost items, those won back are a share of them: Wald's interval of 30 of 40, to the bootstrap's grain
    half = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert closed.interval == pytest.approx((0.75 - half, 0.75 + half), abs=0.02)
    same = paired.gap_closed(reference, degraded, reference)
    assert (same.value, same.interval) == (1.0, (1.0, 1.0))
    none = paired.gap_closed(reference, degraded, degraded)
    assert (none.value, none.interval) == (0.0, (0.0, 0.0))


def test_gap_closed_is_the_enumeration_of_all_resamples() -> None:
    """Six items, all three scores of one drawn together; 46,656 resamples."""
    reference, degraded = [0.9, 0.8, 1.0, 0.7, 0.9, 1.0], [0.1, 0.3, 0.2, 0.3, 0.1, 0.2]
    recovered = [0.5, 0.9, 0.3, 0.6, 0.2, 0.8]
    ratios = sorted(
        sum(recovered[i] - degraded[i] for i in pick) / sum(reference[i] - degraded[i] for i in pick)
        for pick in itertools.product(range(6), repeat=6)
    )
    closed = paired.gap_closed(reference, degraded, recovered, 0, 40_000, level=0.9)
    assert closed.interval == pytest.approx((ratios[2332], ratios[-2333]), abs=0.01)
    assert closed.value == pytest.approx(2.1 / 4.1)


def test_without_a_loss_no_ratio() -> None:
    rng = np.random.default_rng(10)
    a, b, c = draw(rng, 50, (0.7, 0.68, 0.75))
    closed = paired.gap_closed(a, b, c)
    assert (closed.value, closed.interval) == (None, None)
    assert re.match(r"the loss of \S+ points \(95% \S+ to \S+; p \S+\) is not distinguishable from zero", closed.reason)
    assert closed.gap_interval[0] <= 0 <= closed.gap_interval[1]
    gain = paired.gap_closed(np.zeros(50), np.ones(50), a)
    assert gain.reason is not None
    assert gain.reason.startswith("there is no loss to win back")
    few = paired.gap_closed([1, 1, 1], [0, 0, 0], [1, 0, 1])  # its bootstrap interval is (1, 1), its p 0.25
    assert few.value is None
    together = paired.gap_closed([1] * 20, [0] * 20, [1] * 20, clusters=[0, 1] * 10)
    assert together.value is None


def test_resamples_without_a_loss_widen() -> None:
    """A loss just large enough to count: some of its resamples show none, and the interval stays finite."""
    reference, degraded = np.array([1.0] * 7 + [0.0] * 93), np.array([0.0] * 7 + [1.0] + [0.0] * 92)
    recovered = np.array([1.0] * 3 + [0.0] * 97)
    closed = paired.gap_closed(reference, degraded, recovered, level=0.92)
    assert closed.interval is not None
    assert all(map(math.isfinite, closed.interval))
    assert closed.interval[0] < closed.value < closed.interval[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired.wilson(5, 4), "5 correct of 4 items"),
        (lambda: paired.wilson(0, 0), "0 correct of 0 items"),
        (lambda: paired.wilson(1, 4, 95), "level or power is 95; allowed is a share between 0 and 1"),
        (lambda: paired.mcnemar_exact(-1, 3), "got -1 and 3 flips"),
        (lambda: paired.paired_share_interval(3, 3, 5), "got 3 and 3 flips of 5 items"),
        (lambda: paired.paired_bootstrap([1.0], [1.0, 0.0]), "there are 1, 2 scores; paired statistics need as many"),
        (lambda: paired.paired_bootstrap([], []), "one finite number an item, for 1 item or more"),
        (lambda: paired.paired_bootstrap([math.nan], [1.0]), "one finite number an item"),
        (lambda: paired.paired_bootstrap(["x"], [1.0]), "scores are no list of numbers"),
        (lambda: paired.paired_bootstrap([1.0], [0.0], 0, 10), "got 10 resamples and seed 0"),
        (lambda: paired.sign_flip([1.0], -1), "got 10000 resamples and seed -1"),
        (lambda: paired.paired_bootstrap([1, 0], [0, 1], clusters=["a"]), "there are 1 cluster names for 2 scores"),
        (lambda: paired.clustered_interval([1.0, 0.0], ["a", "a"]), "got 1 cluster; a standard error needs 2 or more"),
        (lambda: paired.standard_error([1.0]), "got 1 item; a standard error needs 2 or more"),
        (lambda: paired.holm([0.5, 1.5]), "p-values are [0.5, 1.5]"),
        (lambda: paired.holm([math.nan]), "p-values are [nan]"),
        (lambda: paired.minimum_detectable_effect(10, 1.5), "got n 10 and a share 1.5 of flips"),
        (lambda: paired.minimum_detectable_effect(10, 0.5, power=1.0), "level or power is 1.0"),
        (lambda: paired.detectable_difference(0.1, 0.0), "level or power is 0.0"),
        (lambda: paired.gap_closed([1.0], [0.0], [1.0, 0.0]), "there are 1, 1, 2 scores"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call()
