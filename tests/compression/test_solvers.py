"""Solvers against slow float64 loops that invert the damped gram and eliminate one column after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remend.compression import grids
from remend.compression.grids import Grid, GridFormat
from remend.compression.solvers import gptq, keep_mask, least_squares, refit_kept, sparsegpt, wanda_scores
from remend.errors import InputError

ROWS, COLUMNS = 6, 128
FORMATS = ("int2-g32-asym", "int3-g64-asym", "int4-g32-sym", "int4-g32-zp", "gguf:q4_0", "gguf:q4_1", "nf4")
FORMATS += ("mxfp4", "nvfp4", "fp8-e4m3")
DAMPING = 0.01


def problem(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, samples: int = 600) -> tuple[Tensor, Tensor]:
    """A weight, and the gram of inputs that are correlated and of unequal size, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.rand(columns, generator=generator) * 2 + 0.1
    x_NI = (torch.randn(samples, columns, generator=generator) @ mixing + 0.3) * sizes
    return torch.randn(rows, columns, generator=generator) * 0.05, x_NI.T @ x_NI


def damage(weight_OI: Tensor, changed_OI: Tensor, gram_II: Tensor) -> float:
    """Σ‖W x − V x‖² over the calibration inputs."""
    difference = (weight_OI - changed_OI).double()
    return float(((difference @ gram_II.double()) * difference).sum())


def damped(gram_II: Tensor, damping: float = DAMPING) -> np.ndarray:
    gram = gram_II.double().numpy()
    return gram + damping * gram.diagonal().mean() * np.eye(len(gram))


Settle = Callable[[int, np.ndarray], np.ndarray]


def eliminate(weight_OI: Tensor, gram_II: Tensor, order: Sequence[int], settle: Settle) -> tuple[np.ndarray, ...]:
    """Optimal brain surgeon as GPTQ's equations 2 and 3 have it: (settled, weights when they were settled)."""
    weight = weight_OI.double().numpy().copy()
    inverse = np.linalg.inv(damped(gram_II))
    settled, before = np.zeros_like(weight), np.zeros_like(weight)
    for j in order:
        before[:, j] = weight[:, j]
        settled[:, j] = settle(j, weight)
        error = (weight[:, j] - settled[:, j]) / inverse[j, j]
        weight -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return settled, before


def costs(gram_II: Tensor, order: Sequence[int]) -> np.ndarray:
    """[H⁻¹]_jj when column j's turn comes, the free columns being those that come later."""
    result = np.zeros(len(gram_II))
    for position, j in enumerate(order):
        free = list(order[position:])
        result[j] = np.linalg.inv(damped(gram_II)[np.ix_(free, free)])[0, 0]
    return result


def by_energy(gram_II: Tensor) -> list[int]:
    return sorted(range(len(gram_II)), key=lambda j: -float(gram_II[j, j]))


def points(grid: Grid, fmt: GridFormat) -> np.ndarray:
    """Every value that each group offers: [codes, O, I]."""
    shape = grid.scales.shape[0], COLUMNS
    every = [grids.decode(torch.full(shape, c, dtype=torch.uint8), grid, fmt) for c in range(fmt.levels)]
    return torch.stack(every).double().numpy()


def nearest(values: np.ndarray) -> Settle:
    def settle(j: int, weight: np.ndarray) -> np.ndarray:
        offered = np.nan_to_num(values[:, :, j], nan=np.inf)
        return offered[np.abs(offered - weight[:, j]).argmin(0), np.arange(len(weight))]

    return settle


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_on_a_given_grid_equals_slow_elimination(name: str) -> None:
    weight, gram = problem()
    fmt = GridFormat.parse(name)
    grid = grids.fit(weight, fmt)
    expected, before = eliminate(weight, gram, by_energy(gram), nearest(points(grid, fmt)))
    result = gptq(weight, gram, fmt, grid)
    assert result.grid is grid
    np.testing.assert_array_equal(grids.decode(result.codes, grid, fmt).double().numpy(), expected)
    inside = grids.within_cell(torch.tensor(before).float(), result.codes, grid, fmt)
    torch.testing.assert_close(result.weight, inside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["int3-g64-asym", "int4-g32-sym", "gguf:q4_0"])
def test_gptq_fits_the_grid_with_the_least_loss(name: str) -> None:
    weight, gram = problem(1)
    fmt = GridFormat.parse(name)
    cost = costs(gram, by_energy(gram))
    result = gptq(weight, gram, fmt)
    shares = [1.0 - step / 20 for step in range(9)]
    tried = [grids.fit(weight * share, fmt) for share in shares]
    losses = []
    for grid in tried:
        error = np.abs(points(grid, fmt) - weight.double().numpy()).min(0)
        losses.append((error**2 / cost).reshape(ROWS, -1, fmt.group).sum(-1))
    best = np.stack(losses).argmin(0)
    scales = torch.stack([g.scales for g in tried]).numpy()
    expected = np.take_along_axis(scales, best[None], axis=0)[0]
    np.testing.assert_array_equal(result.grid.scales.numpy(), expected)
    assert len(set(best.flatten().tolist())) > 1


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_block_of_gptq_settles_speed_only(block: int) -> None:
    weight, gram = problem(3)
    fmt = GridFormat.parse("int3-g32")
    whole, cut = gptq(weight, gram, fmt, block=COLUMNS), gptq(weight, gram, fmt, block=block)
    torch.testing.assert_close(cut.codes, whole.codes, rtol=0, atol=0)
    torch.testing.assert_close(cut.weight, whole.weight)


def test_layers_that_share_an_input_may_be_stacked() -> None:
    weight, gram = problem(4, rows=10)
    fmt = GridFormat.parse("int3-g64")
    together, alone = gptq(weight, gram, fmt), [gptq(part, gram, fmt) for part in (weight[:4], weight[4:])]
    torch.testing.assert_close(together.codes, torch.cat([a.codes for a in alone]), rtol=0, atol=0)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_sparsegpt_of_a_pattern_equals_slow_elimination(pattern: tuple[int, int]) -> None:
    weight, gram = problem(5)
    kept, span = pattern
    cost, mask = costs(gram, range(COLUMNS)), np.zeros((ROWS, COLUMNS))

    def settle(j: int, weight: np.ndarray) -> np.ndarray:
        if j % span == 0:
            scores = weight[:, j : j + span] ** 2 / cost[j : j + span]
            for row, best in enumerate(scores.argsort(1)[:, -kept:]):
                mask[row, j + best] = 1
        return weight[:, j] * mask[:, j]

    expected, _ = eliminate(weight, gram, range(COLUMNS), settle)
    result = sparsegpt(weight, gram, pattern=pattern)
    np.testing.assert_array_equal(result.numpy() != 0, mask != 0)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.5, 0.37])
def test_sparsegpt_of_a_share_equals_slow_elimination(sparsity: float) -> None:
    weight, gram = problem(6)
    block = 32
    cost, mask = costs(gram, range(COLUMNS)), np.ones((ROWS, COLUMNS))

    def settle(j: int, weight: np.ndarray) -> np.ndarray:
        if j % block == 0:
            scores = (weight[:, j : j + block] ** 2 / cost[j : j + block]).flatten()
            zeros = round(sparsity * ROWS * (j + block)) - round(sparsity * ROWS * j)
            mask[:, j : j + block] = (scores.argsort().argsort() >= zeros).reshape(ROWS, block)
        return weight[:, j] * mask[:, j]

    expected, _ = eliminate(weight, gram, range(COLUMNS), settle)
    result = sparsegpt(weight, gram, sparsity=sparsity, block=block)
    assert int((result == 0).sum()) == round(sparsity * weight.numel())
    np.testing.assert_array_equal(result.numpy() != 0, mask != 0)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-3, atol=1e-6)


def optimum(gram_II: Tensor, cross_OI: Tensor, mask_OI: Tensor, prior_OI: Tensor) -> Tensor:
    """Least squares of every row's own kept weights, solved exactly one row after the other."""
    result = np.zeros(mask_OI.shape)
    strength = DAMPING * float(gram_II.double().diagonal().mean())
    right = cross_OI.double().numpy() + strength * prior_OI.double().numpy()
    for row, mask in enumerate(mask_OI.numpy()):
        kept = mask.nonzero()[0]
        result[row, kept] = np.linalg.solve(damped(gram_II)[np.ix_(kept, kept)], right[row, kept])
    return torch.tensor(result)


def masks(weight: Tensor, gram: Tensor) -> dict[str, Tensor]:
    return {
        "magnitude": keep_mask(weight.abs(), sparsity=0.5, per="matrix"),
        "wanda": keep_mask(wanda_scores(weight, gram), sparsity=0.5),
        "2:4": keep_mask(weight.abs(), pattern=(2, 4)),
    }


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "2:4"])
def test_compensation_under_a_mask_lies_between_none_and_the_optimum(kind: str) -> None:
    weight, gram = problem(7, rows=16)
    mask = masks(weight, gram)[kind]
    best = damage(weight, optimum(gram, weight.double() @ gram.double(), mask, weight), gram)
    swept, refitted = sparsegpt(weight, gram, mask_OI=mask), refit_kept(weight, gram, mask)
    for result in (swept, refitted):
        assert bool((result[~mask] == 0).all())
        assert bool((result[mask] != 0).all())
    assert best < damage(weight, refitted, gram) < 1.05 * best
    assert 1.05 * best < damage(weight, swept, gram) < damage(weight, weight * mask, gram)


def test_compensation_under_a_mask_equals_slow_elimination() -> None:
    weight, gram = problem(8)
    mask = masks(weight, gram)["magnitude"]
    expected, _ = eliminate(weight, gram, range(COLUMNS), lambda j, w: w[:, j] * mask[:, j].numpy())
    np.testing.assert_allclose(sparsegpt(weight, gram, mask_OI=mask).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_refit_converges_to_least_squares_under_the_mask() -> None:
    weight, gram = problem(9)
    mask = masks(weight, gram)["wanda"]
    result = refit_kept(weight, gram, mask, iterations=100)
    best = optimum(gram, weight.double() @ gram.double(), mask, weight)
    torch.testing.assert_close(result.double(), best, rtol=1e-3, atol=1e-5)


def test_refit_stands_still_where_nothing_is_kept_or_lost() -> None:
    weight, gram = problem(10)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0] = False
    result = refit_kept(weight, gram, mask)
    torch.testing.assert_close(result, weight * mask, rtol=0, atol=1e-6)


def test_wanda_scores_are_magnitude_times_input_norm() -> None:
    x_NI, weight = torch.randn(50, 8), torch.randn(3, 8)
    expected = [[abs(float(w)) * float(x_NI[:, i].norm()) for i, w in enumerate(row)] for row in weight]
    torch.testing.assert_close(wanda_scores(weight, x_NI.T @ x_NI), torch.tensor(expected))


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("per", ["row", "matrix"])
def test_a_mask_keeps_the_largest_and_counts_exactly(sparsity: float, per: Any) -> None:
    scores = torch.randn(5, 40).abs().round(decimals=1)  # many are equal
    mask = keep_mask(scores, sparsity=sparsity, per=per)
    parts = [(scores, mask)] if per == "matrix" else list(zip(scores, mask, strict=True))
    for part, kept in parts:
        assert int((~kept).sum()) == round(sparsity * part.numel())
        assert sparsity == 0 or part[kept].min() >= part[~kept].max()


def test_a_pattern_keeps_the_largest_of_every_group() -> None:
    scores = torch.rand(4, 24)
    mask = keep_mask(scores, pattern=(2, 8))
    for group, kept in zip(scores.view(-1, 8), mask.view(-1, 8), strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == set(group.argsort()[-2:].tolist())


@pytest.mark.parametrize("prior", [False, True])
def test_least_squares_equals_a_stacked_regression(prior: bool) -> None:
    generator = torch.Generator().manual_seed(11)
    x_NI, y_NO = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (20, 5))
    before_OI = torch.randn(5, 20, generator=generator, dtype=torch.float64) if prior else None
    gram = x_NI.T @ x_NI
    root = (0.1 * gram.diagonal().mean()).sqrt()
    below = root * (before_OI.T if before_OI is not None else torch.zeros(20, 5, dtype=torch.float64))
    expected = np.linalg.lstsq(
        torch.cat([x_NI, root * torch.eye(20, dtype=torch.float64)]).numpy(), torch.cat([y_NO, below]).numpy()
    )[0].T
    result = least_squares(gram, x_NI.T @ y_NO, damping=0.1, prior_OI=before_OI)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def solve_all(weight: Tensor, gram: Tensor, damping: float = DAMPING) -> dict[str, Tensor]:
    fmt = GridFormat.parse("int3-g32")
    rounded = gptq(weight, gram, fmt, damping=damping)
    mask = keep_mask(weight.abs(), sparsity=0.5)
    return {
        "gptq": grids.decode(rounded.codes, rounded.grid, fmt),
        "sparsegpt": sparsegpt(weight, gram, sparsity=0.5, damping=damping),
        "pattern": sparsegpt(weight, gram, pattern=(2, 4), damping=damping),
        "refit": refit_kept(weight, gram, mask, damping=damping),
        "least squares": least_squares(gram, gram.double() @ weight.T.double(), damping=damping, prior_OI=weight),
    }


def test_dead_inputs_are_rounded_to_nearest_and_move_nothing() -> None:
    weight, gram = problem(12)
    dead = torch.arange(3, COLUMNS, 5)
    gram[dead], gram[:, dead] = 0, 0
    fmt = GridFormat.parse("int3-g32")
    grid = grids.fit(weight, fmt)
    result = gptq(weight, gram, fmt, grid)
    assert torch.equal(result.codes[:, dead], grids.encode(weight, grid, fmt)[:, dead])
    other = weight.clone()
    other[:, dead] *= 0.5
    alive = torch.ones(COLUMNS, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(gptq(other, gram, fmt, grid).codes[:, alive], result.codes[:, alive])
    pruned = sparsegpt(weight, gram, pattern=(2, 4))
    assert bool((pruned.view(ROWS, -1, 4) != 0).sum(-1).eq(2).all())


@pytest.mark.parametrize("damping", [0.0, DAMPING])
@pytest.mark.parametrize("samples", [0, 1, 20])
def test_a_singular_gram_is_no_obstacle(samples: int, damping: float) -> None:
    weight, gram = problem(13, samples=samples)
    for name, result in solve_all(weight, gram, damping).items():
        assert bool(result.isfinite().all()), name
        assert float(result.abs().max()) < 10, name


def test_one_row_in_half_precision_is_solved_and_the_arguments_stay_as_they_are() -> None:
    weight, gram = problem(14, rows=1)
    weight, gram = weight.bfloat16(), gram.double()
    copies = weight.clone(), gram.clone()
    for name, result in solve_all(weight, gram).items():
        assert (result.shape, result.dtype) == (weight.shape, torch.float32), name
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, g: gptq(w, g[:4, :4], GridFormat.parse("int3-g32")), "needs a gram of its inputs"),
        (lambda w, g: gptq(w[:, :100], g[:100, :100], GridFormat.parse("int3-g32")), "cut into groups of 32"),
        (lambda w, g: gptq(w, g * torch.nan, GridFormat.parse("int3-g32")), "gram holds NaN"),
        (lambda w, g: gptq(w / 0, g, GridFormat.parse("int3-g32")), "weight holds NaN"),
        (lambda w, g: gptq(w, g, GridFormat.parse("int3-g32"), damping=-1), "damping is -1"),
        (lambda w, g: gptq(w, -g, GridFormat.parse("int3-g32")), "no sum of x xᵀ"),
        (lambda w, g: sparsegpt(w, g), "give exactly one of sparsity, pattern, mask_OI"),
        (lambda w, g: sparsegpt(w, g, sparsity=0.5, pattern=(2, 4)), "got sparsity and pattern"),
        (lambda w, g: sparsegpt(w, g, sparsity=1.0), "sparsity is 1.0; allowed is"),
        (lambda w, g: sparsegpt(w, g, mask_OI=w[:2] > 0), "the mask is"),
        (lambda w, g: keep_mask(w, sparsity=-0.1), "sparsity is -0.1"),
        (lambda w, g: keep_mask(w, pattern=(4, 2)), "pattern is 4:2"),
        (lambda w, g: keep_mask(w, pattern=(2, 5)), "cut into groups of 5"),
        (lambda w, g: refit_kept(w, g, w.T > 0), "the mask is"),
        (lambda w, g: least_squares(g, w.T, prior_OI=w.T), "the prior is"),
    ],
)
def test_what_can_not_be_solved_is_refused(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(*problem(16))
