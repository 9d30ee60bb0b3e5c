"""Debiased CKA against HSIC₁ written out as a U-statistic over quadruples, and its companions against plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remend.errors import InputError
from remend.maths.cka import (
    Estimate,
    StreamingCKA,
    cka_alignment,
    cka_grid,
    debiased_cka,
    jackknife,
    jackknife_difference,
    mutual_knn,
    permutation_null,
    procrustes,
    relative_l2,
)

quick = settings(deadline=None, max_examples=30, database=None)
EXACT = 1e-10
"""Float64 with a few thousand additions of like size leaves about 1e-13; this is loose, and far below any effect."""


def features(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    """Independent Gaussian matrices, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def related(seed: int, rows: int, width: int, other: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two sides that share five latent directions, far from the origin and of unequal scale."""
    latent, to_x, to_y, own_x, own_y = features(seed, (rows, 5), (5, width), (5, other), (rows, width), (rows, other))
    return latent @ to_x + noise * own_x + 7.0, 3.0 * (latent @ to_y + noise * own_y) - 20.0


def rotation(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(features(seed, (width, width))[0]).Q


def slow_hsic(k: list[list[float]], l: list[list[float]]) -> float:  # noqa: E741
    """HSIC₁ as Song et al. define it: the mean of k_ij (l_ij + l_qr − 2 l_iq) over all quadruples of different rows."""
    quadruples = list(itertools.permutations(range(len(k)), 4))
    return math.fsum(k[i][j] * (l[i][j] + l[q][r] - 2 * l[i][q]) for i, j, q, r in quadruples) / len(quadruples)


def slow_gram(rows: list[list[float]]) -> list[list[float]]:
    return [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]


def slow_cka(x: Tensor, y: Tensor) -> float:
    k, l = (slow_gram(side.tolist()) for side in (x, y))  # noqa: E741
    return slow_hsic(k, l) / math.sqrt(slow_hsic(k, k) * slow_hsic(l, l))


def from_grams(x: Tensor, y: Tensor) -> float:
    return float(cka_grid([x], [y]))


def from_sums(x: Tensor, y: Tensor, *sizes: int) -> float:
    """Streamed in chunks of `sizes` rows and a last one of what is left."""
    sums, sizes = StreamingCKA(), (*sizes, len(x) - sum(sizes))
    for x_part, y_part in zip(x.split(sizes), y.split(sizes), strict=True):
        sums.update(x_part, y_part)
    return sums.value()


FORMS: dict[str, Callable[[Tensor, Tensor], float]] = {"picked": debiased_cka, "grams": from_grams, "sums": from_sums}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
@pytest.mark.parametrize(("rows", "width", "other"), [(4, 3, 2), (7, 3, 4), (8, 1, 1), (7, 12, 3), (8, 9, 20)])
def test_the_definition_written_out(form: Callable[[Tensor, Tensor], float], rows: int, width: int, other: int) -> None:
    x, y = related(rows + width, rows, width, other)
    assert form(x, y) == pytest.approx(slow_cka(x, y), abs=EXACT)


@pytest.mark.parametrize(("rows", "width", "other"), [(40, 15, 25), (40, 90, 60), (200, 30, 20)])
def test_grams_and_sums_agree(rows: int, width: int, other: int) -> None:
    """1e-8 is what the design asks for; cka.md measured 1e-12."""
    for noise in (0.01, 1.0, 100.0):
        x, y = related(rows, rows, width, other, noise)
        assert from_grams(x, y) == pytest.approx(from_sums(x, y, rows // 3), abs=1e-8)


@each_form
@pytest.mark.parametrize("width", [6, 50])
def test_what_it_is_invariant_to(form: Callable[[Tensor, Tensor], float], width: int) -> None:
    """Rotation, isotropic scale and translation of either side; a shift of 1e3 costs 6 of float64's 16 digits."""
    x, y = related(1, 30, width, 8, noise=2.0)
    value = form(x, y)
    assert 0.1 < value < 0.95
    assert form(y, x) == pytest.approx(value, abs=EXACT)
    assert form(x @ rotation(2, width), y @ rotation(3, 8)) == pytest.approx(value, abs=EXACT)
    for scale in (1e-20, -3.0, 1e20):
        assert form(scale * x, y) == pytest.approx(value, abs=EXACT)
    assert form(x + 1e3 * torch.arange(width), y - 1e3) == pytest.approx(value, abs=1e-8)
    assert form(x, x) == pytest.approx(1.0, abs=EXACT)
    assert form(x, 5.0 - 2.0 * x @ rotation(4, width)) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("width", [16, 300])
def test_independent_features_average_zero(width: int) -> None:
    draws = [features(seed, (64, width), (64, width)) for seed in range(100)]
    values = np.array([debiased_cka(x, y) for x, y in draws])
    standard_error = values.std(ddof=1) / 10
    assert abs(values.mean()) < 3 * standard_error
    assert standard_error < 0.01
    plain = []
    for x, y in draws[:10]:  # the plain estimator, on the same data
        x, y = x - x.mean(0), y - y.mean(0)
        plain.append(float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())))
    assert min(plain) > 0.15


@quick
@given(cuts=st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_the_same_number(cuts: list[int]) -> None:
    x, y = related(6, 30, 7, 4)
    edges = sorted(cuts)
    sizes = [b - a for a, b in itertools.pairwise([0, *edges])]
    assert from_sums(x, y, *sizes) == pytest.approx(from_grams(x, y), abs=EXACT)


def streamed(*chunks: tuple[Tensor, Tensor]) -> StreamingCKA:
    sums = StreamingCKA()
    for chunk in chunks:
        sums.update(*chunk)
    return sums


def test_merging_across_shifts() -> None:
    """Shards with other means, and so other shifts."""
    x, y = related(7, 90, 7, 4)
    x, y = x + 5 * torch.arange(90)[:, None] / 90, y - 40 * torch.arange(90)[:, None] / 90
    total, other = streamed((x[:31], y[:31])), streamed((x[33:53], y[33:53]), (x[53:], y[53:]))
    before = other.value()
    for part in (StreamingCKA(), streamed((x[31:33], y[31:33])), other):
        total.merge(part)
    assert total.value() == pytest.approx(from_grams(x, y), abs=EXACT)
    assert other.value() == before
    empty = StreamingCKA()
    empty.merge(total)
    empty.update(x[:3], y[:3])  # leaves what it was merged from alone
    assert total.value() == pytest.approx(from_grams(x, y), abs=EXACT)
    assert empty.value() == pytest.approx(from_grams(torch.cat([x, x[:3]]), torch.cat([y, y[:3]])), abs=EXACT)


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_float_dtype_is_computed_in_float64(form: Callable[[Tensor, Tensor], float], dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in related(10, 20, 6, 9))
    assert form(x, y) == form(x.double(), y.double())
    assert form(x.requires_grad_(), y) == form(x.double(), y.double())


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1e6])
def test_what_can_not_be_compared_is_nan(rows: int, value: float) -> None:
    """Constant features, and one row that differs: HSIC₁(X, X) is 0 but for rounding, which must not pass for a 1."""
    (y,) = features(11, (rows, 12))
    constant = torch.full((rows, 10), value, dtype=torch.float64) * torch.linspace(0.3, 3, 10)
    lonely = constant.clone()
    lonely[2] += 1.7 * (value or 1.0)
    for x in (constant, constant.float(), lonely):
        for form in FORMS.values():
            assert math.isnan(form(x, y))
            assert math.isnan(form(y, x))
        halves = streamed((x[:5], y[:5]))
        halves.merge(streamed((x[5:], y[5:])))
        assert math.isnan(halves.value())
        assert math.isnan(jackknife(x, y, groups=5).value)
        assert math.isnan(jackknife(x, y, groups=5).low)
        grid = cka_grid([x, y], [y, x, y])
        assert grid.isnan().tolist() == [[True] * 3, [False, True, False]]
        alone = permutation_null([y], [y], permutations=5)
        assert permutation_null([x, y], [y, y], permutations=5).equal(alone)
        assert permutation_null([x], [y], permutations=5).isnan().all()
    assert math.isnan(procrustes(constant, y))
    assert math.isnan(procrustes(y, constant.float()))


def test_the_grid_holds_the_pairwise_values() -> None:
    xs = [side for seed in range(3) for side in related(seed, 24, 9, 30)]
    ys = [side for seed in range(1, 4) for side in related(seed, 24, 12, 5)][:5]
    grid = cka_grid(xs, ys)
    assert grid.dtype == torch.float64
    expected = torch.tensor([[debiased_cka(x, y) for y in ys] for x in xs], dtype=torch.float64)
    torch.testing.assert_close(grid, expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(cka_grid(xs, xs).diagonal(), torch.ones(6, dtype=torch.float64), rtol=0, atol=EXACT)
    torch.testing.assert_close(cka_grid(torch.stack(xs[::2]), ys), grid[::2], rtol=0, atol=EXACT)


def interval(value: float, left: list[float], level: float) -> tuple[float, float, float]:
    groups = len(left)
    variance = (groups - 1) / groups * sum((one - sum(left) / groups) ** 2 for one in left)
    half = scipy.stats.t.ppf((1 + level) / 2, groups - 1) * math.sqrt(variance)
    return value, value - half, value + half


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("width", [5, 60])
def test_jackknife_against_recomputing_every_time(width: int, level: float) -> None:
    """With as many groups as rows, the dealing makes no difference."""
    x, y = related(15, 30, width, 8, noise=2.0)
    alone = [debiased_cka(*(torch.cat([side[:i], side[i + 1 :]]) for side in (x, y))) for i in range(30)]
    got = jackknife(x, y, groups=30, seed=3, level=level)
    assert (got.value, got.low, got.high) == pytest.approx(interval(debiased_cka(x, y), alone, level), abs=1e-9)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    rest = [torch.cat([order[g::7] for g in range(7) if g != left]) for left in range(7)]
    assert sorted(len(rows) for rows in rest) == [25, 25, 26, 26, 26, 26, 26]
    got = jackknife(x, y, groups=7, seed=4, level=level)
    expected = interval(debiased_cka(x, y), [debiased_cka(x[rows], y[rows]) for rows in rest], level)
    assert (got.value, got.low, got.high) == pytest.approx(expected, abs=1e-9)
    assert jackknife(x, y, groups=7, seed=4, level=level) == got
    assert jackknife(x, y, groups=7, seed=5, level=level) != got


def test_jackknife_where_a_group_holds_all_the_difference() -> None:
    """CKA of all rows is there, its interval is not: without row 0 or 1, one row is all that differs."""
    (x,) = features(32, (12, 5))
    x[2:] = 0.1
    for seed in range(10):  # rounding leaves either sign
        x[:2], y = features(seed, (2, 5), (12, 8))
        got = jackknife(x, y, groups=12)
        assert got.value == pytest.approx(debiased_cka(x, y), abs=EXACT)
        assert math.isnan(got.low)
        assert math.isnan(got.high)


def test_jackknife_difference_is_paired() -> None:
    x, noise_a, noise_b = features(17, (80, 6), (80, 6), (80, 6))
    a, b = x + 1.0 * noise_a, x + 1.0 * noise_a + 0.2 * noise_b
    got = jackknife_difference(x, b, a, groups=80)
    assert got.value == pytest.approx(debiased_cka(x, a) - debiased_cka(x, b), abs=EXACT)
    left = []
    for i in range(80):
        sides = [torch.cat([side[:i], side[i + 1 :]]) for side in (x, a, b)]
        left.append(debiased_cka(sides[0], sides[1]) - debiased_cka(sides[0], sides[2]))
    assert (got.value, got.low, got.high) == pytest.approx(interval(got.value, left, 0.95), abs=1e-9)
    apart = [jackknife(x, side, groups=80) for side in (a, b)]
    assert got.high - got.low < 0.6 * math.hypot(*(one.high - one.low for one in apart))
    back = jackknife_difference(x, a, b, groups=80)
    assert (back.value, back.low, back.high) == pytest.approx((-got.value, -got.high, -got.low), abs=EXACT)
    assert jackknife_difference(x, a, a) == Estimate(0.0, 0.0, 0.0)
    wider = jackknife_difference(x, torch.cat([a, a], 1), b, groups=80)
    assert wider.value == pytest.approx(back.value, abs=EXACT)


def test_permutation_null_against_shuffling_rows() -> None:
    xs = [features(seed, (25, 6))[0] for seed in range(3)]
    ys = [side + 0.5 * features(9 + seed, (25, 6))[0] for seed, side in enumerate(xs)]
    null = permutation_null(xs, ys, permutations=12, seed=2)
    generator = torch.Generator().manual_seed(2)
    expected = []
    for _ in range(12):
        order = torch.randperm(25, generator=generator)
        expected.append(max(debiased_cka(x, y[order]) for x, y in zip(xs, ys, strict=True)))
    assert null.shape == (12,)
    assert null.dtype == torch.float64
    assert null.tolist() == pytest.approx(expected, abs=1e-6)  # Grams are rounded to float32
    each = torch.stack([permutation_null([x], [y], permutations=12, seed=2) for x, y in zip(xs, ys, strict=True)])
    assert null.equal(each.amax(0))
    assert not null.equal(permutation_null(xs, ys, permutations=12, seed=3))


def test_the_null_lies_at_zero_and_below_what_is_related() -> None:
    xs, ys = zip(*(related(seed, 100, 20, 30) for seed in range(4)), strict=True)
    alone = permutation_null(xs[:1], ys[:1])
    assert len(alone) == 200
    assert abs(float(alone.mean())) < 3 * float(alone.std()) / math.sqrt(200)
    null = permutation_null(xs, ys)
    assert bool((null >= alone).all())
    assert float(null.max()) < min(debiased_cka(x, y) for x, y in zip(xs, ys, strict=True))
    unrelated = permutation_null([features(0, (100, 20))[0]], [features(1, (100, 20))[0]])
    assert float(unrelated.max()) < 0.2


def test_relative_l2() -> None:
    x, y = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    assert relative_l2(x, y) == pytest.approx(3 / 5, rel=1e-15)
    assert relative_l2(x, x) == 0.0
    assert relative_l2(x.bfloat16(), -x) == 2.0
    assert math.isnan(relative_l2(x, torch.ones(2, 3)))
    assert math.isnan(relative_l2(torch.zeros(2, 2), y))


@pytest.mark.parametrize(
    ("rows", "width", "other"),
    [(40, 6, 6), (40, 6, 9), (10, 30, 30), (12, 30, 4), (2, 3, 5)],
)
def test_procrustes_against_the_direct_formula(rows: int, width: int, other: int) -> None:
    """The same to 1e-8 whether or not the sides are reduced to N columns first."""
    x, y = related(18, rows, width, other, noise=0.5)
    a, b = (side.numpy() - side.numpy().mean(0) for side in (x, y))
    cross = (a / np.linalg.norm(a)).T @ (b / np.linalg.norm(b))
    assert procrustes(x, y) == pytest.approx(1 - np.linalg.svd(cross, compute_uv=False).sum(), abs=1e-8)
    assert 0 <= procrustes(x, y) <= 1
    if width == other:
        disparity = scipy.spatial.procrustes(x.numpy(), y.numpy())[2]  # 1 − ‖XᵀY‖_*²
        assert procrustes(x, y) == pytest.approx(1 - math.sqrt(1 - disparity), abs=1e-8)
    assert procrustes(x, 4 - 0.1 * x @ rotation(19, width)) == pytest.approx(0, abs=1e-8)
    assert procrustes(x.float(), x) < 1e-6


def slow_knn(x: Tensor, y: Tensor, k: int) -> float:
    def neighbours(side: list[list[float]], i: int) -> set[int]:
        def cosine(j: int) -> float:
            return (
                sum(a * b for a, b in zip(side[i], side[j], strict=True)) / math.hypot(*side[i]) / math.hypot(*side[j])
            )

        return set(sorted((j for j in range(len(side)) if j != i), key=cosine)[-k:])

    sides = x.tolist(), y.tolist()
    common = [neighbours(sides[0], i) & neighbours(sides[1], i) for i in range(len(x))]
    return sum(map(len, common)) / (len(x) * k)


@pytest.mark.parametrize("k", [1, 4, 23])
def test_mutual_knn_against_a_loop(k: int) -> None:
    x, y = related(21, 24, 6, 9, noise=0.5)
    x, y = x - 7, y + 20  # cosines around 0, where ranks differ most
    assert mutual_knn(x, y, k=k) == pytest.approx(slow_knn(x, y, k), abs=1e-15)
    assert mutual_knn(x, x @ rotation(22, 6), k=k) == 1.0
    x[3] = 0
    assert mutual_knn(x, x) == 1.0
    assert mutual_knn(x, x * torch.linspace(0.1, 9, 24)[:, None], k=k) == 1.0  # cosine: a row's length is nothing


@pytest.mark.parametrize(("rows", "width", "other"), [(4, 3, 2), (6, 10, 4), (12, 5, 5)])
def test_alignment_is_debiased_cka_with_its_gradient(rows: int, width: int, other: int) -> None:
    x, y = related(24, rows, width, other)
    x.requires_grad_()
    value = cka_alignment(x, y)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(debiased_cka(x, y), abs=EXACT)
    assert torch.autograd.gradcheck(lambda side: cka_alignment(side, y), x)


def test_alignment_in_low_precision_and_under_autocast() -> None:
    x, y = (side.bfloat16() for side in related(25, 64, 32, 48))
    exact = debiased_cka(x, y)
    x.requires_grad_()
    y.requires_grad_()
    value = cka_alignment(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(exact, abs=1e-5)
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert y.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cka_alignment(x.float(), y.float()).equal(value)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e6])
def test_alignment_of_constant_features_moves_nothing(value: float) -> None:
    y = features(26, (13, 8))[0].float()
    x = (value * torch.linspace(0.3, 3, 8)).repeat(13, 1).requires_grad_()
    assert value in (0.0, 1e-30) or bool((x - x.mean(0)).any())  # the mean of equal numbers is off by rounding
    cka_alignment(x, y).backward()
    assert cka_alignment(x, y) == 0
    assert x.grad.equal(torch.zeros(13, 8))
    x.grad = None
    cka_alignment(y.requires_grad_(), x).backward()
    assert not y.grad.any()


PAIRS = {
    "debiased_cka": (debiased_cka, 4),
    "StreamingCKA.update": (lambda x, y: StreamingCKA().update(x, y), 0),
    "cka_grid": (lambda x, y: cka_grid([x], [y]), 4),
    "jackknife": (lambda x, y: jackknife(x, y, groups=2), 4),
    "jackknife_difference": (lambda x, y: jackknife_difference(x, x, y, groups=2), 4),
    "permutation_null": (lambda x, y: permutation_null([x], [y], permutations=1), 4),
    "relative_l2": (relative_l2, 1),
    "procrustes": (procrustes, 2),
    "mutual_knn": (lambda x, y: mutual_knn(x, y, k=1), 2),
    "cka_alignment": (cka_alignment, 4),
}


@pytest.mark.parametrize(("measure", "least"), PAIRS.values(), ids=PAIRS)
def test_refusals_of_any_pair(measure: Callable[[Tensor, Tensor], object], least: int) -> None:
    (x,) = features(28, (9, 3))
    with pytest.raises(InputError, match=r"is \(8, 3\) and .*x.* is \(9, 3\); allowed is \[rows, width\] for both"):
        measure(x, x[:8])
    with pytest.raises(InputError, match=r"is \(9,\) and .* the same tokens in the same order"):
        measure(x, x[:, 0])
    with pytest.raises(InputError, match=r"is \(1, 9, 3\)"):
        measure(x[None], x[None])
    if least:
        with pytest.raises(InputError, match=rf"got {least - 1} rows; allowed is {least} or more: take more sequences"):
            measure(x[: least - 1], x[: least - 1])
    if measure is not cka_alignment:
        for bad in (math.nan, math.inf):
            y = x.clone()
            y[5, 1] = bad
            with pytest.raises(InputError, match=r"holds NaN or infinity; look for overflow in the model"):
                measure(x, y)
            with pytest.raises(InputError, match="holds NaN or infinity"):
                measure(y, x)


def test_refusals_name_the_layer() -> None:
    x, y = features(29, (9, 3), (9, 4))
    y[0, 0] = math.nan
    with pytest.raises(InputError, match="layer 2 of y holds NaN"):
        cka_grid([x], [x, x, y])
    with pytest.raises(InputError, match="layer 1 of x holds NaN"):
        permutation_null([x, y], [x, x], permutations=1)
    with pytest.raises(InputError, match=r"layer 1 of y is \(8, 3\) and layer 0 of x is \(9, 3\)"):
        cka_grid([x], [x, x[:8]])
    with pytest.raises(InputError, match=r"got 0 layers of x and 1 of y; allowed is 1 or more of each"):
        cka_grid([], [x])
    with pytest.raises(InputError, match=r"got 1 layers of x and 0 of y"):
        permutation_null([x], [])


def test_other_refusals() -> None:
    x, y = features(30, (9, 3), (9, 4))
    for groups in (1, 10):
        with pytest.raises(InputError, match=rf"groups is {groups} for 9 rows; allowed is 2 to 9"):
            jackknife(x, y, groups=groups)
    with pytest.raises(InputError, match=r"groups is 2 for 7 rows; .* leave 4 rows or more"):
        jackknife_difference(x[:7], x[:7], y[:7], groups=2)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match=r"level is .*; allowed is above 0 and below 1"):
            jackknife(x, y, groups=3, level=level)
    with pytest.raises(InputError, match=r"got 1 and 2 layers and 200 permutations; allowed is as many layers"):
        permutation_null([x], [y, y])
    with pytest.raises(InputError, match=r"0 permutations; allowed is .* 1 permutation or more"):
        permutation_null([x], [y], permutations=0)
    for k in (0, 9):
        with pytest.raises(InputError, match=rf"k is {k} for 9 rows; allowed is 1 to 8"):
            mutual_knn(x, y, k=k)


def test_refusals_of_the_sums() -> None:
    x, y = features(31, (9, 3), (9, 4))
    with pytest.raises(InputError, match="got 0 rows; allowed is 4 or more"):
        StreamingCKA().value()
    sums = streamed((x[:3], y[:3]))
    with pytest.raises(InputError, match="got 3 rows; allowed is 4 or more"):
        sums.value()
    with pytest.raises(
        InputError, match=r"the widths are \(4, 3\) and were \(3, 4\); take one for each pair of layers"
    ):
        sums.update(y, x)
    with pytest.raises(InputError, match=r"the widths are \(3, 3\) and were \(3, 4\)"):
        sums.merge(streamed((x, x)))
