"""What training must not give back: served weights stay on the grid, files and masters come back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.grid_reference import slow_groups
from helpers.grid_training import FORMATS, TOKENS, VOCABULARY, pair, parameters, train
from helpers.tiny import build_model
from remend.compression.grids import Grid, GridFormat, decode, encode
from remend.compression.stored_grid import StoredGrid
from remend.degrade.making.onto_grid import quantize_in_place
from remend.errors import InputError
from remend.models.layers import kept_weights
from remend.training.constraints import Free, Masked, OnGrid, freeze_healthy_embeddings


def constrained(student: nn.Module, stored: StoredGrid, origin: nn.Module | None = None) -> OnGrid:
    return OnGrid(student, stored, origin=parameters(origin) if origin else None)


def same(one: Grid, other: Grid) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def nearest_points(values: Tensor, grid: Grid, fmt: GridFormat) -> tuple[Tensor, Tensor]:
    """All points of a group are tried for each value: the nearest, and the largest gap beside it. Float64 both."""
    best, gap = torch.empty(values.shape, dtype=torch.float64), torch.empty(values.shape, dtype=torch.float64)
    for row, columns, points in slow_groups(values, grid, fmt):
        sorted_points = torch.tensor(sorted({p for p in points if p == p}), dtype=torch.float64)
        distance = (values[row, columns].detach().double().unsqueeze(1) - sorted_points).abs()
        best[row, columns] = sorted_points[distance.argmin(1)]
        gap[row, columns] = float(sorted_points.diff().max())
    return best, gap


def test_free_hands_the_parameters_over(tmp_path: Path) -> None:
    model = build_model(VOCABULARY)
    model.model.norm.weight.requires_grad_(False)
    constraint = Free(model)
    masters = constraint.masters()
    assert all(masters[name] is parameters(model)[name] for name in masters)
    assert set(parameters(model)) - set(masters) == {"model.norm.weight"}
    before = copy.deepcopy(masters)
    train(model, constraint, 1)
    assert all(not torch.equal(before[name], masters[name]) for name in masters)
    constraint.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_on_grid_holds_the_matrices_and_leaves_the_rest_free() -> None:
    _, student, stored = pair()
    masters = constrained(student, stored).masters()
    assert set(masters) == set(parameters(student))
    assert len(stored.matrices) == 14
    for name, master in masters.items():
        assert (master is parameters(student)[name]) == (name not in stored.matrices)
        assert master.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
def test_after_training_every_weight_is_a_point_of_its_grid(name: str) -> None:
    origin, student, stored = pair(name)
    constraint = constrained(student, stored, origin)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    train(student, constraint, 3)
    for matrix, (_, grid) in list(stored.matrices.items())[::4]:
        weight, master = parameters(student)[matrix].detach(), constraint.masters()[matrix]
        assert torch.equal(decode(encode(weight, grid, stored.format), grid, stored.format), weight), matrix
        point, gap = nearest_points(weight, grid, stored.format)
        assert ((weight - point).abs() <= 1e-5 * gap).all()
        # the nearest to the master; the point beside it only where the master lies on the border between the two
        point, gap = nearest_points(master, grid, stored.format)
        # which side of a border counts is decided in float32: 1/scale, the product and the sum are rounded, each by
        # 2⁻²⁴ of a code that may be 127 gaps long, and an error of e beside a border is a distance of 2e more
        border = 2 * 3 * 2**-24 * (master / gap).abs()
        assert ((weight - master).abs() <= (point - master).abs() + (1e-6 + border) * gap).all()
        assert not torch.equal(weight, before[matrix]), "training moved nothing"
    for free in set(before) - set(stored.matrices):
        assert not torch.equal(parameters(student)[free], before[free])


@pytest.mark.parametrize("name", FORMATS)
def test_masters_start_at_the_teachers_weights_behind_the_students_codes(name: str) -> None:
    origin, student, stored = pair(name)
    masters = constrained(student, stored, origin).masters()
    for matrix, (codes, grid) in list(stored.matrices.items())[::4]:
        assert torch.equal(encode(masters[matrix], grid, stored.format), codes)
        # rounding to nearest: the lost weight is in the cell, so it is the master, but for 0.001 gap at a border; GGUF
        # chooses codes by the scale before its rounding to float16, so there the weight may be in the cell beside
        _, gap = nearest_points(masters[matrix], grid, stored.format)
        moved = (masters[matrix] - parameters(origin)[matrix]).abs()
        assert (moved <= (0.07 if stored.format.gguf else 1.1e-3) * gap + 1e-6).all()
        assert (moved > 1.1e-3 * gap + 1e-6).float().mean() < 0.05


def test_masters_of_codes_that_compensate_start_a_margin_inside_and_others_at_the_teachers_weight() -> None:
    """A code that is not its weight's nearest (GPTQ) must not fall back at the first noisy step."""
    origin, student, stored = pair()
    name, (codes, grid) = next(iter(stored.matrices.items()))
    lost = parameters(origin)[name]
    nearest = encode(lost, grid, stored.format)
    shifted = codes.clone()
    shifted[:, ::2] = torch.where(nearest[:, ::2] > 0, nearest[:, ::2] - 1, nearest[:, ::2] + 1)
    stored.matrices[name] = (shifted, grid)
    parameters(student)[name].data.copy_(decode(shifted, grid, stored.format))
    _, gap = nearest_points(lost, grid, stored.format)
    margin = 0.1 * float(gap.min())
    masters = OnGrid(student, stored, origin=parameters(origin), margin=margin).masters()[name]
    elsewhere = shifted != nearest
    assert elsewhere.float().mean() > 0.4
    for change in (0.9 * margin, -0.9 * margin):
        moved = encode(masters + change, grid, stored.format)
        assert torch.equal(moved[elsewhere], shifted[elsewhere])
    plain = OnGrid(student, stored, origin=parameters(origin)).masters()[name]
    assert torch.equal(masters[~elsewhere], plain[~elsewhere])
    assert not torch.equal(encode(plain + 0.9 * margin, grid, stored.format), shifted), "a margin is needed for this"


def test_an_origin_from_elsewhere_moves_no_code_and_one_that_does_not_fit_is_left_aside() -> None:
    _, student, stored = pair()
    elsewhere = constrained(student, stored, build_model(VOCABULARY, seed=9)).masters()
    for matrix, (codes, grid) in stored.matrices.items():
        assert torch.equal(encode(elsewhere[matrix], grid, stored.format), codes)
        for origin in (None, build_model(VOCABULARY, width=32)):
            master, served = constrained(student, stored, origin).masters()[matrix], parameters(student)[matrix]
            assert torch.equal(master, served)
            assert master.data_ptr() != served.data_ptr()


def test_straight_through_gives_masters_the_sum_of_the_steps_gradients_at_the_served_weights() -> None:
    origin, student, stored = pair()
    plain = copy.deepcopy(student)
    constraint = constrained(student, stored, origin)
    for micro_batches in (1, 2, 1):
        for model in (plain, student):
            for _ in range(micro_batches):
                model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        constraint.take_gradients()
        for name, master in constraint.masters().items():
            assert torch.equal(master.grad, parameters(plain)[name].grad), name
        assert all(parameters(student)[name].grad is None for name in stored.matrices)
        for model in (plain, student):
            model.zero_grad()


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_read_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    origin, student, stored = pair(name)
    constraint = constrained(student, stored, origin)
    train(student, constraint, 2)
    constraint.save(tmp_path)
    again = StoredGrid.read(tmp_path)
    assert again.format == stored.format
    assert set(again.matrices) == set(stored.matrices)
    for matrix, (codes, grid) in again.matrices.items():
        assert codes.dtype == torch.uint8
        assert torch.equal(decode(codes, grid, again.format), parameters(student)[matrix])
        assert same(grid, stored.matrices[matrix][1])
    constrained(student, again)  # it accepts the trained student


def test_masters_alone_restore_the_served_weights_bit_for_bit() -> None:
    """What a checkpoint holds: load the masters, project, and both weights and further training are the same."""
    origin, student, stored = pair()
    constraint = constrained(student, stored, origin)
    train(student, constraint, 2)
    checkpoint = {name: master.detach().clone() for name, master in constraint.masters().items()}
    served = copy.deepcopy(student.state_dict())

    _, resumed, stored = pair()
    restored = constrained(resumed, stored, origin)
    with torch.no_grad():
        for name, master in restored.masters().items():
            master.copy_(checkpoint[name])
    restored.project()
    assert all(torch.equal(served[name], tensor) for name, tensor in resumed.state_dict().items())
    train(student, constraint, 1)
    train(resumed, restored, 1)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


def test_masters_may_start_where_repair_left_them() -> None:
    origin, student, stored = pair()
    elsewhere = constrained(student, stored, build_model(VOCABULARY, seed=9)).masters()
    name = next(iter(stored.matrices))
    masters = OnGrid(student, stored, origin=parameters(origin), masters={name: elsewhere[name]}).masters()
    plain = constrained(student, stored, origin).masters()
    assert torch.equal(masters[name], elsewhere[name])
    assert masters[name].data_ptr() != elsewhere[name].data_ptr()
    assert all(torch.equal(masters[n], plain[n]) for n in plain if n != name)
    with pytest.raises(InputError, match=f"the start value of {name} does not round to the weight"):
        OnGrid(student, stored, masters={name: elsewhere[name] + 1})


def test_a_gguf_block_without_a_scale_is_held() -> None:
    """Its codes are any, all of them mean 0, and no master can be behind them."""
    origin = build_model(VOCABULARY)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        parameters(origin)[name][3, :32] *= 1e-9
    student = copy.deepcopy(origin)
    stored = quantize_in_place(student, GridFormat.parse("gguf:q4_0"))
    assert int(stored.matrices[name][0][3, :32].max()) > 8
    constraint = constrained(student, stored, origin)
    OnGrid(student, stored, masters=constraint.masters())
    train(student, constraint, 1)
    assert not parameters(student)[name][3, :32].any()


def test_zeros_get_no_gradient_and_come_back_whatever_the_optimizer_did() -> None:
    model = build_model(VOCABULARY)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    constraint, ((name, kept),) = Masked(model), kept_weights(model).items()
    for parameter in constraint.masters().values():
        parameter.grad = torch.ones_like(parameter)
    constraint.take_gradients()
    assert torch.equal(constraint.masters()[name].grad, kept.float())  # so zeros take no part in the norm
    assert all(p.grad.all() for n, p in constraint.masters().items() if n != name)
    with torch.no_grad():
        constraint.masters()[name].add_(1)
    constraint.project()
    assert torch.equal(parameters(model)[name] != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_embeddings_that_are_the_teachers_are_frozen(dtype: torch.dtype) -> None:
    """A teacher may be held in a narrower dtype; a head of its own is looked at apart."""
    student, teacher = build_model(VOCABULARY), build_model(VOCABULARY).to(dtype)
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    teacher.get_output_embeddings().weight = nn.Parameter(head.weight.detach().clone().to(dtype))
    with torch.no_grad():
        head.weight[5, 0] += 0.5
    assert freeze_healthy_embeddings(student, teacher) == ["model.embed_tokens.weight"]
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained
    assert trained == set(parameters(student)) - {"model.embed_tokens.weight"}


def test_nothing_is_frozen_without_a_teacher_or_of_another_shape() -> None:
    student = build_model(VOCABULARY)
    assert freeze_healthy_embeddings(student, None) == []
    assert freeze_healthy_embeddings(student, build_model(VOCABULARY + 8)) == []
    assert all(p.requires_grad for p in student.parameters())
