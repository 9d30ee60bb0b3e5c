"""Alignment beside the divergence: its gradient against finite differences, its balance, its place in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny import build_model
from remend.errors import CheckError
from remend.models.scorer import pack
from remend.recovery import recover
from remend.recovery.alignment import BALANCE_EVERY, Alignment, Seen, pairs_of

PAIRS = [((5, 6, 7), (8, 9, 10, 11, 12)), ((5, 9), (20, 21, 22, 23, 24, 25))]


def batch() -> Any:
    return pack(PAIRS, device=torch.device("cpu"))


def seen(alignment: Alignment, whose: str, model: Any) -> Seen:
    found = Seen()
    with found.by(alignment, whose, batch()):
        model.base_model(batch().tokens_BT, use_cache=False)
    return found


@pytest.mark.parametrize("measure", ["cka", "l2"])
def test_gradient_agrees_with_finite_differences(measure: str) -> None:
    """With respect to the blocks' outputs, in float64 (a Llama's own norms compute in float32)."""
    student = build_model(64, width=16)
    alignment = Alignment(measure, 1.0, [(0, 0), (1, 1)], student, student)
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (
        [torch.randn(2, 8, 5, dtype=torch.float64, generator=generator) for _ in range(2)] for _ in range(2)
    )

    def loss(*states: torch.Tensor) -> torch.Tensor:
        found = alignment.loss(Seen(list(states), batch()), Seen(theirs, batch()))
        assert found is not None
        return found

    assert torch.autograd.gradcheck(loss, [state.requires_grad_() for state in ours])


@pytest.mark.parametrize("measure", ["cka", "l2"])
def test_a_model_is_aligned_with_itself(measure: str) -> None:
    model = build_model(64, width=16)
    alignment = Alignment(measure, 1.0, pairs_of(None, [0, 1]), model, model)
    loss = alignment.loss(seen(alignment, "student", model), seen(alignment, "teacher", model))
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_the_factor_makes_the_gradients_lengths_stand_in_the_given_ratio() -> None:
    student, teacher = (build_model(64, seed=s, width=16) for s in (1, 2))
    alignment = Alignment("l2", 0.25, [(0, 0), (1, 1)], student, teacher)
    with torch.no_grad():
        theirs = seen(alignment, "teacher", teacher)
    ours = seen(alignment, "student", student)
    divergence = ours.states[-1].square().mean()
    wanted = torch.autograd.grad(divergence, [ours.states[-1]], retain_graph=True)[0].norm()
    aligned = alignment.loss(ours, theirs)
    assert aligned is not None
    gradients = torch.autograd.grad(aligned, ours.states, retain_graph=True)
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert alignment.due(1)
    # the divergence here reaches the first block's output too, through the second
    both = torch.autograd.grad(divergence, ours.states, retain_graph=True, allow_unused=True)
    wanted = torch.stack([g.square().sum() for g in both if g is not None]).sum().sqrt()
    alignment.balance(1, divergence, ours, theirs)
    assert alignment.scale == pytest.approx(float(0.25 * wanted / length), rel=1e-4)
    assert not alignment.due(1)
    assert not alignment.due(2)
    assert alignment.due(1 + BALANCE_EVERY)


def test_too_few_tokens_give_no_alignment() -> None:
    model = build_model(64, width=16)
    alignment = Alignment("cka", 1.0, [(0, 0)], model, model)
    few = pack([((5,), (6, 7))], device=torch.device("cpu"))
    assert alignment.loss(Seen([torch.zeros(1, 3, 16)], few), Seen([torch.zeros(1, 3, 16)], few)) is None


def test_the_state_is_the_factor() -> None:
    model = build_model(64, width=16)
    one, other = (Alignment("cka", 1.0, [(0, 0)], model, model) for _ in range(2))
    one.scale = 0.37
    other.load(one.state())
    assert other.scale == 0.37


@pytest.mark.parametrize("measure", ["cka", "l2"])
def test_it_changes_the_run_and_resumes_exactly(recipe: dict[str, Any], tmp_path: Path, measure: str) -> None:
    plain = recover(**recipe)
    with_it = {**recipe, "alignment": {"measure": measure}}
    whole = recover(**{**with_it, "out": str(tmp_path / "whole")})
    assert [r["loss"] for r in whole.metrics] != [r["loss"] for r in plain.metrics]
    again = recover(**{**with_it, "out": str(tmp_path / "cut"), "gradient_checkpointing": True})
    for name, tensor in load_file(whole.model / "model.safetensors").items():
        assert torch.equal(tensor, load_file(again.model / "model.safetensors")[name]), name


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"alignment": {"layers": [5]}}, "0 to 1"),
        ({"alignment": {"layers": []}}, "none for all"),
        ({"alignment": {"measure": "angle"}}, "measure"),
        ({"alignment": {"weight": 0}}, "weight"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: dict[str, Any], change: dict[str, Any], part: str) -> None:
    with pytest.raises((CheckError, ValueError), match=part):
        recover(**{**recipe, **change})


def test_a_moving_teacher_is_refused(recipe: dict[str, Any]) -> None:
    streams = {"keep": {"teacher": "initial"}, "recover": {}}
    with pytest.raises(CheckError, match="frozen model"):
        recover(**{**recipe, "streams": streams, "alignment": {"measure": "cka"}})
