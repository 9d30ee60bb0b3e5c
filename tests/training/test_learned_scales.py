"""Learned scales: the gradient against automatic differentiation, and what is trained, saved and read back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from helpers.grid_reference import slow_values
from helpers.grid_training import FORMATS, TOKENS, pair, parameters, train
from remend.compression.grids import Grid, decode, encode
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError
from remend.training.constraints import OnGrid

LEARNED = [name for name in FORMATS if "fp4" not in name]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "gguf:mxfp4"])
def test_coarse_scales_are_not_learned(name: str) -> None:
    _, student, stored = pair(name)
    with pytest.raises(
        InputError, match=f"the scales of {name} are float8_e.*, too coarse to learn; use scales: fixed"
    ):
        OnGrid(student, stored, scales="learned")


@pytest.mark.parametrize("name", LEARNED)
def test_learned_scales_start_where_they_were_and_are_saved(name: str, tmp_path: Path) -> None:
    origin, student, stored = pair(name)
    before = copy.deepcopy(student.state_dict())
    constraint = OnGrid(student, stored, origin=parameters(origin), scales="learned")
    logs = {n: m for n, m in constraint.masters().items() if n.endswith(".log_scales")}
    assert set(logs) == {f"{matrix}.log_scales" for matrix in stored.matrices}
    assert not any(log.any() for log in logs.values())
    constraint.project()
    assert all(torch.equal(before[n], tensor) for n, tensor in student.state_dict().items())
    train(student, constraint, 3)
    assert all((log != 0).float().mean() > 0.9 for log in logs.values())
    constraint.save(tmp_path)
    again = StoredGrid.read(tmp_path)
    moved = 0
    for matrix, (codes, grid) in again.matrices.items():
        assert torch.equal(decode(codes, grid, again.format), parameters(student)[matrix])
        first = stored.matrices[matrix][1]
        factors = logs[f"{matrix}.log_scales"].exp()
        torch.testing.assert_close(grid.scales, first.scales * factors, rtol=2**-10, atol=0)
        if name == "gguf:q4_1":
            torch.testing.assert_close(grid.zeros, first.zeros * factors, rtol=2**-10, atol=0)
        elif first.zeros is not None:
            assert torch.equal(grid.zeros, first.zeros)
        moved += int((grid.scales != first.scales).sum())
    assert moved > 0
    OnGrid(student, again, scales="learned")  # it accepts the trained student


@pytest.mark.parametrize("name", LEARNED)
def test_the_scales_gradient_is_that_of_straight_through_rounding(name: str) -> None:
    """LSQ, eq. 3, by automatic differentiation in float64: rounding passes gradients on, clipping stops them."""
    origin, student, stored = pair(name)
    constraint = OnGrid(student, stored, origin=parameters(origin), scales="learned")
    masters = constraint.masters()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a third of the weights beyond the grid's ends
        for matrix in stored.matrices:
            masters[matrix] += 0.2 * torch.randn(masters[matrix].shape, generator=generator)
    constraint.project()
    student(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {matrix: parameters(student)[matrix].grad.double() for matrix in stored.matrices}
    constraint.take_gradients()
    for matrix, (_, grid) in list(stored.matrices.items())[::5]:
        fmt, (rows, groups) = stored.format, grid.scales.shape
        log = torch.zeros(rows, groups, dtype=torch.float64, requires_grad=True)
        scale = (grid.scales.double() * log.exp()).unsqueeze(-1)
        zero = 0 if grid.zeros is None else grid.zeros.double().unsqueeze(-1)
        minimum = zero * log.exp().unsqueeze(-1) if fmt.form == "minimum" else 0
        shift = zero if fmt.form == "zero" else 0
        position = (masters[matrix].double().view(rows, groups, -1) - minimum) / scale + shift
        served = parameters(student)[matrix].detach().double().view(rows, groups, -1)
        point = ((served - minimum) / scale + shift).detach()
        values = torch.tensor([v for v in slow_values(fmt) if v == v], dtype=torch.float64)
        inside = (position > values.min()) & (position < values.max())
        assert 0.0 < inside.float().mean() < 1.0
        rounded = torch.where(inside, position + (point - position).detach(), point)
        weight = (rounded - shift) * scale + minimum
        (weight * gradients[matrix].view(rows, groups, -1)).sum().backward()
        ours = masters[f"{matrix}.log_scales"].grad.double()
        # a master at the very end of its grid is inside or not by rounding
        torch.testing.assert_close(ours, log.grad, rtol=1e-3, atol=1e-4 * float(log.grad.abs().max()))


def test_learning_scales_narrows_a_grid_that_is_too_wide() -> None:
    """Every scale is doubled; only the scales are trained, toward the model before."""
    origin, student, stored = pair("int4-g32-sym")
    wide = {}
    for matrix, (_, narrow) in stored.matrices.items():
        grid = Grid(narrow.scales * 2)
        codes = encode(parameters(origin)[matrix], grid, stored.format)
        parameters(student)[matrix].data.copy_(decode(codes, grid, stored.format))
        wide[matrix] = (codes, grid)
    constraint = OnGrid(student, StoredGrid(stored.format, wide), origin=parameters(origin), scales="learned")
    masters = constraint.masters()
    logs = [masters[f"{matrix}.log_scales"] for matrix in wide]
    target = torch.log_softmax(origin(input_ids=TOKENS).logits, -1).detach()
    optimizer = torch.optim.Adam(logs, lr=0.05)
    losses = []
    for _ in range(20):
        logits = torch.log_softmax(student(input_ids=TOKENS).logits, -1)
        loss = torch.nn.functional.kl_div(logits, target, log_target=True, reduction="batchmean")
        losses.append(loss.item())
        loss.backward()
        constraint.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        constraint.project()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.cat([log.flatten() for log in logs]).mean() < -0.02
