"""Closed-form compression and repair of one linear layer: GPTQ, SparseGPT, Wanda, least squares.

Legend: O rows (outputs), I columns (inputs), K groups a row, G group size, J columns of one block.

A layer computes y = W x. Of its calibration inputs only gram_II = Σ x xᵀ is needed: putting V in place of W costs
Σ‖W x − V x‖² = tr((W − V) gram (W − V)ᵀ). Rows don't influence one another, so layers that read the same input can be
stacked and solved in one call (not for a format with one scale a matrix).

GPTQ and SparseGPT settle one column after the other and let the columns that are still free make good the error
(optimal brain surgeon). With the upper factor of (gram + λ·1)⁻¹ = Uᵀ U, an error e = w_j − q_j in column j moves a
later column k by −e · U_jk / U_jj (arXiv 2210.17323, equations 2 and 3 in the Cholesky form of its section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from remend.compression import grids
from remend.compression.grids import Grid, GridFormat
from remend.errors import InputError

_SHRINK = tuple(1.0 - step / 20 for step in range(9))
_SOLVED = 1e-10
"""Share of a row's first residual (squared, weighted) below which nothing but rounding noise is left in float32."""
_RETRIES = 6
"""Times that the damping is raised tenfold before a gram is given up."""

Settle = Callable[[int, Tensor, Tensor], None]
"""(position, free_JO, out_O): writes what column free_JO[0] becomes; the rest of its block may be looked at."""


class Rounded(NamedTuple):
    """A matrix on a grid, and where each column stood when it was rounded: encode(weight, grid, fmt) gives codes.

    codes: uint8 [O, I]. grid: see grids.Grid. weight: float32 [O, I].
    """

    codes: Tensor
    grid: Grid
    weight: Tensor


@torch.no_grad()
def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    fmt: GridFormat,
    grid: Grid | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
) -> Rounded:
    """Round column by column; what is not rounded yet makes good what rounding lost. GPTQ, arXiv 2210.17323, eq. 2-3.

    Columns are taken in order of falling energy (the gram's diagonal; "act-order" in GPTQ's code), so what matters most
    is rounded while most others can still compensate. The grid is settled beforehand: of round-to-nearest's range times
    1.00, 0.95 … 0.60 each group takes the one whose rounding has the least Σ e² / U_jj², the loss of the paper's eq. 2.

    Args:
        weight_OI: any float dtype; computed in float32.
        gram_II: Σ x xᵀ, float32 or float64; factored in float64.
        fmt: the format.
        grid: the grid to keep; None fits one.
        damping: λ as a share of the diagonal's mean; raised tenfold as long as the gram can't be factored.
        block: columns whose updates are gathered before they reach the rest of the matrix. It settles speed only.

    Raises:
        InputError: shapes don't fit, a number is not finite, or the group does not divide the row.
    """
    weight_OI = _checked(weight_OI, gram_II)
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    factor_II = _factor(gram_II[order_I][:, order_I], damping)
    if grid is None:
        cost_I = torch.empty_like(weight_OI[0])
        cost_I[order_I] = factor_II.diagonal().pow(-2).float()
        grid = _fit(weight_OI, cost_I, fmt)
    size = fmt.group or weight_OI.shape[1]
    parts = [grids.part(grid, fmt, start, start + 1) for start in range(0, weight_OI.shape[1], size)]
    groups = (order_I // size).tolist()

    def settle(position: int, free_JO: Tensor, out_O: Tensor) -> None:
        shared, alone = parts[groups[position]]
        grids.snap(free_JO[0].unsqueeze(1), shared, alone, out=out_O.unsqueeze(1))

    work_IO = weight_OI.T[order_I]
    _sweep(work_IO, factor_II, block, settle)
    moved_OI = torch.empty_like(weight_OI)
    moved_OI[:, order_I] = work_IO.T
    codes_OI = grids.encode(moved_OI, grid, fmt)
    return Rounded(codes_OI, grid, grids.within_cell(moved_OI, codes_OI, grid, fmt))


def _fit(weight_OI: Tensor, cost_I: Tensor, fmt: GridFormat) -> Grid:
    """For each group the one of nine shrunken ranges whose rounding costs least, Σ cost_I · error².

    A range that cuts off a group's extremes makes all its steps finer.
    """
    outer = grids.fit(weight_OI, fmt).outer
    rounded_OI = torch.empty_like(weight_OI)
    best, least_OK = None, torch.empty(0)
    for share in _SHRINK:
        tried = grids.fit(weight_OI * share, fmt, outer=outer)
        grids.snap(weight_OI, tried, fmt, out=rounded_OI)
        costs_OI = rounded_OI.sub_(weight_OI).square_().mul_(cost_I)
        costs_OK = costs_OI.view(*tried.scales.shape, -1).sum(-1)
        if best is None:
            best, least_OK = tried, costs_OK
            continue
        better_OK = costs_OK < least_OK
        least_OK = torch.where(better_OK, costs_OK, least_OK)
        for kept, new in zip(best[:2], tried[:2], strict=True):
            if kept is not None and new is not None:
                torch.where(better_OK, new, kept, out=kept)
    assert best is not None
    return best


@torch.no_grad()
def sparsegpt(
    weight_OI: Tensor,
    gram_II: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    mask_OI: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Prune column by column; what is kept makes good what was lost. SparseGPT, arXiv 2301.00774, section 3.

    The mask is chosen as the sweep arrives, from the compensated weights: of a block (`sparsity`, all rows together) or
    of m neighbours in each row (`pattern`), the weights of least w² / (U_jj)² go.

    Args:
        weight_OI: any float dtype; computed in float32.
        gram_II: Σ x xᵀ, float32 or float64; factored in float64.
        sparsity: share of zeros, 0 to below 1; exact for the matrix up to rounding to a whole number of weights.
        pattern: (n, m): n kept of every m neighbours in a row, as in 2:4.
        mask_OI: bool, True = kept: only compensates.
        damping, block: as in `gptq`; here the block is also what the mask is chosen within.

    Returns:
        float32 [O, I] with exact zeros.

    Raises:
        InputError: not exactly one of sparsity, pattern and mask_OI, one out of range, or shapes don't fit.
    """
    weight_OI = _checked(weight_OI, gram_II)
    rows, columns = weight_OI.shape
    _one_of(sparsity=sparsity, pattern=pattern, mask_OI=mask_OI)
    _same_shape(weight_OI, mask=mask_OI)
    kept_IO = weight_OI.new_ones(columns, rows) if mask_OI is None else mask_OI.T.to(weight_OI.dtype).contiguous()
    span = _span(rows, columns, sparsity, pattern, block)
    factor_II = _factor(gram_II, damping)
    cost_I = factor_II.diagonal().float().square()

    def settle(position: int, free_JO: Tensor, out_O: Tensor) -> None:
        if mask_OI is None and position % span == 0:
            here = slice(position, min(position + span, columns))
            scores_OJ = (free_JO[: here.stop - position].square() / cost_I[here, None]).T
            if pattern is not None:
                chosen_OJ = keep_mask(scores_OJ, pattern=pattern)
            else:
                zeros = _pruned(sparsity, rows * here.stop) - _pruned(sparsity, rows * position)
                chosen_OJ = _largest(scores_OJ.reshape(1, -1), scores_OJ.numel() - zeros).view_as(scores_OJ)
            kept_IO[here] = chosen_OJ.T.to(kept_IO.dtype)
        torch.mul(free_JO[0], kept_IO[position], out=out_O)

    work_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    _sweep(work_IO, factor_II, span if pattern is None else max(span, block // span * span), settle)
    return torch.where(kept_IO > 0, work_IO, 0.0).T.contiguous()


@torch.no_grad()
def refit_kept(
    weight_OI: Tensor,
    gram_II: Tensor,
    mask_OI: Tensor,
    *,
    damping: float = 0.01,
    iterations: int = 12,
) -> Tensor:
    """The kept weights that put out best what the whole matrix did: least squares under a mask, all rows at once.

    Minimises Σ‖W x − V x‖² + λ‖V − W‖² over V that are 0 where the mask says so. SparseGPT's sweep solves the same
    problem approximately, since a weight is not moved any more once its column is passed; here conjugate gradients,
    preconditioned by the diagonal, run on every row's own free weights.

    Args:
        weight_OI: W, the matrix before pruning, any float dtype; computed in float32.
        gram_II: Σ x xᵀ, float32 or float64.
        mask_OI: bool, True = kept.
        damping: λ as a share of the mean of the gram's diagonal.
        iterations: each is one product with the gram.

    Returns:
        float32 [O, I] with exact zeros.

    Raises:
        InputError: shapes don't fit or a number is not finite.
    """
    weight_OI = _checked(weight_OI, gram_II)
    _same_shape(weight_OI, mask=mask_OI)
    kept_OI = mask_OI.to(weight_OI.dtype)
    strength = _strength(gram_II.diagonal(), damping)
    damped_II = gram_II.float() + strength * torch.eye(len(gram_II), device=gram_II.device)
    refitted_OI = weight_OI * kept_OI
    residual_OI = ((weight_OI - refitted_OI) @ damped_II).mul_(kept_OI)
    scale_I = damped_II.diagonal().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    direction_OI = residual_OI * scale_I
    energy_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
    solved_O1 = _SOLVED * energy_O1
    for _ in range(iterations):
        moved_OI = (direction_OI @ damped_II).mul_(kept_OI)
        step_O1 = energy_O1 / (direction_OI * moved_OI).sum(1, keepdim=True)
        step_O1 = torch.where(energy_O1 > solved_O1, step_O1, 0.0)
        refitted_OI.addcmul_(step_O1, direction_OI)
        residual_OI.addcmul_(step_O1, moved_OI, value=-1)
        scaled_OI = residual_OI * scale_I
        before_O1, energy_O1 = energy_O1, (residual_OI * scaled_OI).sum(1, keepdim=True)
        turn_O1 = torch.where(before_O1 > solved_O1, energy_O1 / before_O1, 0.0)
        direction_OI = direction_OI.mul_(turn_O1).add_(scaled_OI)
    return torch.where(mask_OI, refitted_OI, 0.0)


def wanda_scores(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """|W_ij| · ‖x_j‖₂, float32 [O, I]: what a weight contributes. Wanda, arXiv 2306.11695, eq. 1.

    The paper compares within a row: `keep_mask(scores, sparsity=…)`. Raises InputError when shapes don't fit.
    """
    return _checked(weight_OI, gram_II).abs() * gram_II.diagonal().clamp(min=0).sqrt().float()


def keep_mask(
    scores_OI: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    per: Literal["row", "matrix"] = "row",
) -> Tensor:
    """Which weights stay, by largest score: bool [O, I], True = kept.

    Args:
        scores_OI: any float dtype; equal scores are cut arbitrarily, so that counts are exact.
        sparsity: share of zeros, 0 to below 1, rounded to a whole number of weights of each row, or of the matrix.
        pattern: (n, m): n kept of every m neighbours in a row.
        per: what competes under `sparsity`. For several matrices together give their scores as one row.

    Raises:
        InputError: not exactly one of sparsity and pattern, one out of range, or m does not divide the row.
    """
    rows, columns = scores_OI.shape
    _one_of(sparsity=sparsity, pattern=pattern)
    if pattern is not None:
        kept, span = pattern[0], _span(rows, columns, None, pattern, 1)
    else:
        _span(rows, columns, sparsity, None, 1)
        span = columns if per == "row" else scores_OI.numel()
        kept = span - _pruned(sparsity, span)
    return _largest(scores_OI.reshape(-1, span), kept).view(scores_OI.shape)


@torch.no_grad()
def least_squares(
    gram_II: Tensor, cross_IO: Tensor, *, damping: float = 0.01, prior_OI: Tensor | None = None
) -> Tensor:
    """The matrix W that maps inputs x to targets y best: argmin Σ‖y − W x‖² + λ‖W − W₀‖² (ridge regression).

    Args:
        gram_II: Σ x xᵀ, float32 or float64; solved in float64.
        cross_IO: Σ x yᵀ.
        damping: λ as a share of the mean of the gram's diagonal; raised tenfold as long as the gram can't be factored.
        prior_OI: W₀, what W stays near where the inputs say nothing; None is 0.

    Returns:
        float32 [O, I].

    Raises:
        InputError: shapes don't fit or a number is not finite.
    """
    _same_shape(_checked(cross_IO.T, gram_II), prior=prior_OI)
    lower_II, strength = _cholesky(gram_II.to(torch.float64, copy=True), damping)
    right_IO = cross_IO.double()
    if prior_OI is not None:
        right_IO = right_IO + strength * prior_OI.T.double()
    return torch.cholesky_solve(right_IO, lower_II).T.float().contiguous()


def _sweep(work_IO: Tensor, factor_II: Tensor, block: int, settle: Settle) -> None:
    """Settle row after row of work_IO, later ones compensating; leaves each as it stood when it was settled.

    The factor is the caller's to lose.
    """
    columns = work_IO.shape[0]
    # rows scaled to a unit diagonal: then an error moves later columns by itself, with no division
    unit_II = factor_II.div_(factor_II.diagonal().clone().unsqueeze(1)).float()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here_JO, inside_JJ = work_IO[start:stop], unit_II[start:stop, start:stop]
        errors_JO = torch.empty_like(here_JO)
        for j in range(stop - start):
            settle(start + j, here_JO[j:], errors_JO[j])
            torch.sub(here_JO[j], errors_JO[j], out=errors_JO[j])
            here_JO[j + 1 :].addr_(inside_JJ[j, j + 1 :], errors_JO[j], alpha=-1)
        work_IO[stop:].addmm_(unit_II[start:stop, stop:].T, errors_JO, alpha=-1)


def _factor(gram_II: Tensor, damping: float) -> Tensor:
    """U [I, I], float64, upper: (gram + λ·1)⁻¹ = Uᵀ U.

    With R the upper factor of gram + λ·1 = R Rᵀ (Cholesky from the last column on), U is R⁻¹: no inverse is factored.
    """
    lower_II, _ = _cholesky(gram_II.double().flip(0, 1), damping)
    upper_II = lower_II.flip(0, 1)
    del lower_II
    factor_II = torch.eye(len(upper_II), dtype=upper_II.dtype, device=upper_II.device)
    torch.linalg.solve_triangular(upper_II, factor_II, upper=True, out=factor_II)
    return factor_II


def _cholesky(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """(lower factor of gram + λ·1, λ). The gram is the caller's to lose: λ is put on its diagonal.

    With the factor two float64 tensors of its size are alive, and no more.
    """
    share, diagonal_I = damping, gram_II.diagonal().clone()
    for _ in range(_RETRIES):
        strength = _strength(diagonal_I, share)
        gram_II.diagonal().copy_(diagonal_I + strength)
        lower_II, failed = torch.linalg.cholesky_ex(gram_II)
        if not failed:
            return lower_II, strength
        share = max(10 * share, 1e-6)
    raise InputError(f"the gram can't be factored even with damping {share:g}: it is no sum of x xᵀ")


def _strength(diagonal_I: Tensor, damping: float) -> float:
    """λ from its share of the diagonal's mean. A gram of zeros only (an input that is never on) gets λ = 1."""
    if not (0 <= damping < float("inf")):
        raise InputError(f"damping is {damping}; allowed is 0 or more, e.g. 0.01")
    mean = float(diagonal_I.mean())
    return damping * mean if mean > 0 else 1.0


def _same_shape(weight_OI: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != weight_OI.shape:
            raise InputError(
                f"the {name} is {tuple(tensor.shape)}, the weight {tuple(weight_OI.shape)}; give one shape"
            )


def _checked(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The weight in float32. Raises InputError when it and the gram don't fit or hold NaN or infinity."""
    columns = weight_OI.shape[-1]
    if weight_OI.ndim != 2 or gram_II.shape != (columns, columns):
        raise InputError(
            f"a weight of {tuple(weight_OI.shape)} needs a gram of its inputs, ({columns}, {columns}); "
            f"got {tuple(gram_II.shape)}"
        )
    for name, tensor in (("weight", weight_OI), ("gram", gram_II)):
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"the {name} holds NaN or infinity; look for overflow in the model on the calibration text"
            )
    return weight_OI.detach().float()


def _one_of(**given: object) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InputError(f"got {' and '.join(names) or 'nothing'}; give exactly one of {', '.join(given)}")


def _span(rows: int, columns: int, sparsity: float | None, pattern: tuple[int, int] | None, block: int) -> int:
    """Neighbours among which a mask is chosen, after the check of what was asked for."""
    if sparsity is not None and not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}; allowed is 0 to below 1, the share of weights that become 0")
    if pattern is None:
        return block
    kept, span = pattern
    if not 0 < kept <= span:
        raise InputError(f"the pattern is {kept}:{span}; allowed is n:m with 0 < n ≤ m, n kept of every m, e.g. 2:4")
    if columns % span:
        raise InputError(f"a row of {columns} weights can't be cut into groups of {span} for {kept}:{span}")
    return span


def _pruned(sparsity: float | None, count: int) -> int:
    assert sparsity is not None
    return round(sparsity * count)


def _largest(scores: Tensor, kept: int) -> Tensor:
    """Bool of the same shape: the `kept` largest of each row."""
    places = scores.topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)
