"""Training little of a student: scales move by their true gradients, codes and matrices stay."""

from __future__ import annotations

import gc
from pathlib import Path
from weakref import ref

import pytest
import torch

from helpers.grid_training import FORMATS, TOKENS, VOCABULARY, pair, parameters, train
from helpers.tiny import build_model, put_on_grid
from remend.compression.grids import GridFormat, decode
from remend.compression.recognise import PLAIN, Recognised
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError
from remend.training.constraints import CONSTRAINTS, OnScales, StudentFacts, kind_of

MOVABLE = [name for name in FORMATS if GridFormat.parse(name).scale in (torch.float16, torch.float32)]
NOTHING = Recognised("plain", None, False, PLAIN)
ZEROS = Recognised("plain", None, True, "half of them are zero", 0.5, "2:4")


def on_grid(name: str, train: str) -> StudentFacts:
    stored = put_on_grid(build_model(VOCABULARY), name)
    return StudentFacts(Recognised("remend", stored, False, "it lies on a grid"), train=train)


@pytest.mark.parametrize("name", MOVABLE)
def test_gradients_are_those_of_the_scales_and_zeros(name: str) -> None:
    """Against autograd through the weights written out as scale · (value − zero)."""
    _, student, stored = pair(name)
    constraint = OnScales(student, stored)
    loss = student(input_ids=TOKENS, labels=TOKENS).loss
    key = next(iter(stored.matrices))
    (gradient_OI,) = torch.autograd.grad(loss, parameters(student)[key], retain_graph=True)
    loss.backward()
    constraint.take_gradients()
    assert parameters(student)[key].grad is None, "a matrix keeps no gradient"
    masters = constraint.masters()
    codes, grid = stored.matrices[key]
    factors = torch.zeros_like(grid.scales, requires_grad=True)
    shifts = torch.zeros_like(grid.scales, requires_grad=True)
    served_OKG = decode(codes, grid, stored.format).reshape(*grid.scales.shape, -1)
    step_OK1 = grid.scales.unsqueeze(-1)
    moved_OKG = (served_OKG + (1 if stored.format.form == "minimum" else -1) * step_OK1 * shifts.unsqueeze(-1)) * (
        factors.exp().unsqueeze(-1)
    )
    (moved_OKG * gradient_OI.reshape(moved_OKG.shape)).sum().backward()
    torch.testing.assert_close(masters[f"{key}.scales"].grad, factors.grad, rtol=1e-5, atol=1e-7)
    if stored.format.zero == torch.float16:
        torch.testing.assert_close(masters[f"{key}.zeros"].grad, shifts.grad, rtol=1e-5, atol=1e-7)
    else:
        assert f"{key}.zeros" not in masters


def test_gradients_of_micro_batches_add_up() -> None:
    once, twice = (pair() for _ in range(2))
    held = [OnScales(student, stored) for _, student, stored in (once, twice)]
    once[1](input_ids=TOKENS, labels=TOKENS).loss.backward()
    for row in TOKENS:
        (twice[1](input_ids=row[None], labels=row[None]).loss / len(TOKENS)).backward()
    for one, other in zip(*(constraint.masters().values() for constraint in held), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MOVABLE)
def test_codes_stay_and_what_is_saved_is_what_is_served(name: str, tmp_path: Path) -> None:
    _, student, stored = pair(name)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    constraint = OnScales(student, stored)
    train(student, constraint, 3)
    constraint.save(tmp_path)
    kept = StoredGrid.read(tmp_path)
    assert kept is not None
    for key, (codes, grid) in kept.matrices.items():
        assert torch.equal(codes, stored.matrices[key][0])
        assert torch.equal(decode(codes, grid, kept.format), parameters(student)[key])
        assert not torch.equal(grid.scales, stored.matrices[key][1].scales)
    vectors = {n for n, p in student.named_parameters() if p.ndim == 1}
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == vectors | set(stored.matrices)


def test_nothing_moves_before_the_first_update() -> None:
    _, student, stored = pair()
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    OnScales(student, stored).project()
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


def test_norms_alone() -> None:
    _, student, stored = pair()
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    facts = StudentFacts(Recognised("remend", stored, False, "it lies on a grid"), train="norms")
    constraint = kind_of(facts).hold(student, facts, origin=None, start=None, rate=1e-3)
    assert set(constraint.masters()) == {n for n, p in student.named_parameters() if p.ndim == 1}
    train(student, constraint, 2)
    assert {n for n, p in student.named_parameters() if not torch.equal(p, before[n])} == set(constraint.masters())


@pytest.mark.parametrize(
    ("facts", "name", "words"),
    [
        (on_grid("int3-g64", "scales"), "scales", "int3-g64-asym; codes stay, scales and norms move"),
        (on_grid("int3-g64", "norms"), "norms", "int3-g64-asym; norms and biases alone move"),
        (StudentFacts(ZEROS, train="norms"), "norms", "mask, 50.0% zeros (2:4); norms and biases alone move"),
        (StudentFacts(NOTHING, train="norms"), "norms", "none; norms and biases alone move"),
        (on_grid("int3-g64", "all"), "grid", "int3-g64-asym"),
    ],
)
def test_kinds(facts: StudentFacts, name: str, words: str) -> None:
    assert kind_of(facts) is CONSTRAINTS.get(name)
    assert kind_of(facts).describe(facts) == words


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (StudentFacts(NOTHING, train="scales"), "the student lies on none that is held"),
        (StudentFacts(ZEROS, train="scales"), "the student lies on none that is held"),
        *(
            (on_grid(name, "scales"), f"can't be had on {name}: its scales have few values")
            for name in ("mxfp4", "nvfp4")
        ),
        (on_grid("nf4", "scales"), None),
        (on_grid("mxfp4", "norms"), None),
        (StudentFacts(NOTHING), None),
    ],
)
def test_scales_that_cannot_be_trained(facts: StudentFacts, why: str | None) -> None:
    lost = CONSTRAINTS.get("scales").lost(facts)
    assert lost is None if why is None else why in str(lost)


def test_weights_that_are_not_the_grids_are_refused() -> None:
    _, student, stored = pair()
    parameters(student)[next(iter(stored.matrices))].data += 1
    with pytest.raises(InputError):
        OnScales(student, stored)


def test_a_trained_student_is_let_go() -> None:
    """torch keeps hooks of parameters where no collection of garbage looks, so they may hold nothing."""
    _, student, stored = pair()
    constraint = OnScales(student, stored)
    student(input_ids=TOKENS, labels=TOKENS).loss.backward()
    weights = [ref(parameter) for parameter in student.parameters()]
    del student, constraint
    gc.collect()
    assert not any(weight() is not None for weight in weights)
