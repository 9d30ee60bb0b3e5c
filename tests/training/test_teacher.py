"""Teachers that are views of the student: each against an independent copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import torch

from helpers.tiny import build_model
from remend.maths.losses import HeadTarget
from remend.models.adapters import add_lora
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.training.teachers import Teacher
from remend.training.teachers.base import AdapterOff
from remend.training.teachers.ema import Ema
from remend.training.teachers.views import View, Weights

TOKENS = tuple(range(1, 12))


def logits(teacher: Teacher) -> torch.Tensor:
    """What a teacher says at TOKENS, all but the first of which are a completion."""
    target = teacher.score([Rollout("a", TOKENS[:1], TOKENS[1:], False)])
    assert isinstance(target, HeadTarget)
    return target.head(target.states_NE)


def plain(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0, :-1]
    return logits_TV


def moved(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)


def test_initial_stays_while_the_student_moves() -> None:
    model = build_model(320)
    before = plain(model)
    initial, live = Weights(scorer(model)), View(scorer(model))
    moved(model, 1)
    now = plain(model)
    torch.testing.assert_close(logits(initial), before)
    torch.testing.assert_close(logits(live), now)
    assert not torch.allclose(before, now)
    torch.testing.assert_close(plain(model), now)  # and the student has its own weights again


def test_head_and_states_of_a_view_are_one_models_with_tied_embeddings() -> None:
    """The head of `initial` must not become the student's when the weights are taken off."""
    model = build_model(320, tied=True)
    initial = Weights(scorer(model))
    before = initial.values["model.embed_tokens.weight"].clone()
    target = initial.score([Rollout("a", (1,), (2, 3), False)])
    assert isinstance(target, HeadTarget)
    moved(model, 1)
    assert target.head.weight_VD.equal(before)
    assert not torch.allclose(before, model.get_output_embeddings().weight)
    assert not target.head.weight_VD.requires_grad


def test_ema_is_the_average_by_a_slow_reference() -> None:
    model = build_model(320)
    ema, slow = Ema(scorer(model), rate=0.25, every=2), copy.deepcopy(model)
    for step in range(1, 6):
        moved(model, step)
        ema.updated(step)
        if step % 2 == 0:
            with torch.no_grad():
                for a, b in zip(slow.parameters(), model.parameters(), strict=True):
                    a.copy_(0.75 * a.double() + 0.25 * b.double())
    torch.testing.assert_close(logits(ema), plain(slow), rtol=1e-4, atol=1e-4)
    assert all(value.dtype == torch.float32 for value in ema.state().values())


def test_base_is_the_student_without_its_adapter() -> None:
    model = build_model(320)
    before = plain(model)
    add_lora(model, rank=4, seed=1)
    base = AdapterOff(scorer(model))
    moved(model, 3)
    now = plain(model)
    torch.testing.assert_close(logits(base), before)
    assert not torch.allclose(before, now)
    torch.testing.assert_close(plain(model), now)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_no_gradient_flows_into_a_view() -> None:
    model = build_model(320)
    for teacher in (View(scorer(model)), Weights(scorer(model)), Ema(scorer(model), 0.1)):
        assert not logits(teacher).requires_grad
