"""Teachers that are views of the student: each against an independent copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import torch

from helpers.tiny import build_model
from remend.models.adapters import add_lora
from remend.models.scorer import scorer
from remend.training.teachers.views import AdapterOff, Ema, View, Weights


def logits(teacher: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    return teacher.head(teacher.hidden(tokens_BT)[0])


def plain(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BT).logits[0]


def moved(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)


TOKENS = torch.arange(1, 12).unsqueeze(0)


def test_initial_stays_while_the_student_moves() -> None:
    model = build_model(320)
    before = plain(model, TOKENS)
    initial, live = Weights(scorer(model)), View(scorer(model))
    moved(model, 1)
    now = plain(model, TOKENS)
    torch.testing.assert_close(logits(initial, TOKENS), before)
    torch.testing.assert_close(logits(live, TOKENS), now)
    assert not torch.allclose(before, now)
    torch.testing.assert_close(plain(model, TOKENS), now)  # and the student has its own weights again


def test_head_and_states_of_a_view_are_one_models_with_tied_embeddings() -> None:
    """The head of `initial` must not become the student's when the weights are taken off."""
    model = build_model(320, tied=True)
    initial = Weights(scorer(model))
    head = initial.head
    moved(model, 1)
    torch.testing.assert_close(head.weight_VD, initial.head.weight_VD)
    assert not torch.allclose(head.weight_VD, model.get_output_embeddings().weight)
    assert not head.weight_VD.requires_grad


def test_ema_is_the_average_by_a_slow_reference() -> None:
    model = build_model(320)
    ema, slow = Ema(scorer(model), rate=0.25, every=2), copy.deepcopy(model)
    for step in range(1, 6):
        moved(model, step)
        ema.update(step)
        if step % 2 == 0:
            with torch.no_grad():
                for a, b in zip(slow.parameters(), model.parameters(), strict=True):
                    a.copy_(0.75 * a.double() + 0.25 * b.double())
    torch.testing.assert_close(logits(ema, TOKENS), plain(slow, TOKENS), rtol=1e-4, atol=1e-4)
    assert all(value.dtype == torch.float32 for value in ema.state().values())


def test_base_is_the_student_without_its_adapter() -> None:
    model = build_model(320)
    before = plain(model, TOKENS)
    add_lora(model, rank=4, seed=1)
    base = AdapterOff(scorer(model))
    moved(model, 3)
    now = plain(model, TOKENS)
    torch.testing.assert_close(logits(base, TOKENS), before)
    assert not torch.allclose(before, now)
    torch.testing.assert_close(plain(model, TOKENS), now)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_no_gradient_flows_into_a_view() -> None:
    model = build_model(320)
    for teacher in (View(scorer(model)), Weights(scorer(model)), Ema(scorer(model), 0.1)):
        assert not logits(teacher, TOKENS).requires_grad
