"""The step function against slow loops: alignment at unequal prompts, policies, rounds of sampling."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.losses import DISTANCE
from helpers.tiny import build_model
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.maths.losses import choose, of_beta
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack, scorer
from remend.recovery.distillation import Distillation, Lane
from remend.recovery.streams import Stream

BASE = Stream(
    name="recover",
    data="d",
    teacher="t",
    demonstrations=False,
    on_policy=1.0,
    weight=1.0,
    share=1.0,
    loss=of_beta(0.0),
    top_k=None,
    lengths=(5, 5),
    temperature=1.0,
    skip_first=0,
    eval_data=None,
    held_out=None,
    task=None,
)


class Counting:
    """A sampler that answers with fixed tokens and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: Any, *, max_new_tokens: int, temperature: float, seeds: Any) -> list[Rollout]:
        self.calls.append([p.id for p in prompts])
        return [
            Rollout(p.id, p.tokens, tuple((s + i) % 300 + 3 for i in range(max_new_tokens)), True, p.shown)
            for p, s in zip(prompts, seeds, strict=True)
        ]


def encoded(count: int, shown: bool = False) -> list[Encoded]:
    return [
        Encoded(f"p{i}", tuple(range(3, 6 + i)), "", tuple(range(7, 20 + 2 * i)) if shown else None)
        for i in range(count)
    ]


def objective(lanes: list[Lane], **rest: Any) -> Distillation:
    settings: dict[str, Any] = {"steps": 8, "micro_rows": 3, "seed": 0, "precision": nullcontext()}
    settings |= rest
    return Distillation(student=scorer(build_model(320, seed=1)), lanes=lanes, sampler=Counting(), **settings)


def slow(student: Any, teacher: Any, rollouts: list[Rollout], skip: int) -> float:
    """Position by position in float64, one unpadded sequence a model."""
    total = 0.0
    for r in rollouts:
        logits = []
        for model, prompt in ((teacher, r.shown or r.prompt), (student, r.prompt)):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([[*prompt, *r.completion]])).logits[0].double()
            logits.append(out[len(prompt) - 1 : -1].log_softmax(-1))
        p, q = logits
        for t in range(skip, len(r.completion)):
            total += float((p[t].exp() * (p[t] - q[t])).sum())
    return total


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("skip", [0, 2])
def test_divergence_is_aligned_at_unequal_prompt_lengths(shown: bool, skip: int) -> None:
    teacher = build_model(320, seed=2)
    lane = Lane(replace(BASE, skip_first=skip), scorer(teacher), Order(encoded(5, shown), 0), rows=5)
    made = objective([lane])
    prepared = made.prepare(1)
    outputs = [made(micro).sums["recover"] for micro in prepared.micro_batches]
    rollouts = [r for _, part in prepared.micro_batches for r in part]
    expected = slow(made.student.model, teacher, rollouts, skip)
    assert sum(float(total) for total, _ in outputs) == pytest.approx(expected, rel=1e-4)
    assert sum(n for _, n in outputs) == prepared.tokens["recover"] == 5 * (5 - skip)


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_loss_from_outside_is_what_is_trained_on(top_k: int | None) -> None:
    """The sum is the loss's own, and a step against its gradient lowers it."""
    teacher = scorer(build_model(320, seed=2))
    lane = Lane(replace(BASE, loss=choose(DISTANCE), top_k=top_k), teacher, Order(encoded(5), 0), rows=3)
    made = objective([lane])
    (micro,) = made.prepare(1).micro_batches
    total = made(micro).sums["recover"][0]
    if top_k is None:
        batch = pack([(r.prompt, r.completion) for r in micro[1]], device=teacher.device)
        q, p = (model.head(model.states(batch)).softmax(-1) for model in (made.student, teacher))
        torch.testing.assert_close(total, (q - p).square().sum())
    total.backward()
    with torch.no_grad():
        for weight in made.student.model.parameters():
            weight -= 0.1 * weight.grad / weight.grad.norm().clamp(min=1e-12)
    assert made(micro).sums["recover"][0] < total


def test_one_round_of_sampling_feeds_several_steps_and_changes_no_draw() -> None:
    lane = Lane(BASE, scorer(build_model(320, seed=2)), Order(encoded(12), 0), rows=4)
    single, grouped = objective([lane]), objective([lane], updates_per_rollout=3)
    for step in range(1, 9):
        a, b = single.prepare(step), grouped.prepare(step)
        ours, theirs = ([(r.id, r.completion) for _, part in made.micro_batches for r in part] for made in (a, b))
        assert ours == theirs
    assert [len(call) for call in single.sampler.calls] == [4] * 8
    assert [len(call) for call in grouped.sampler.calls] == [12, 12, 8]


def test_a_round_of_sampling_has_one_length() -> None:
    lane = Lane(replace(BASE, lengths=(2, 9)), scorer(build_model(320, seed=2)), Order(encoded(12), 0), rows=4)
    made = objective([lane], updates_per_rollout=4)
    lengths = [
        {len(r.completion) for _, part in made.prepare(step).micro_batches for r in part} for step in range(1, 9)
    ]
    assert lengths == [{2}] * 4 + [{6}] * 4  # where the line is at the rounds' first steps, 1 and 5
    assert [len(call) for call in made.sampler.calls] == [16, 16]


def test_processes_share_a_step() -> None:
    lane = Lane(BASE, scorer(build_model(320, seed=2)), Order(encoded(12), 0), rows=6)
    whole = objective([lane]).prepare(2)
    parts = [objective([lane], process=i, processes=2).prepare(2) for i in range(2)]
    assert sorted(r.id for p in parts for _, part in p.micro_batches for r in part) == sorted(
        r.id for _, part in whole.micro_batches for r in part
    )
    assert sum(p.tokens["recover"] for p in parts) == whole.tokens["recover"]


def test_a_mixture_takes_its_share_of_each_policy() -> None:
    pool = [Rollout(f"t{i}", (3, 4), (5, 6, 7), False, off_policy=True) for i in range(4)]
    lane = Lane(
        replace(BASE, on_policy=0.3), scorer(build_model(320, seed=2)), Order(encoded(9), 0), 50, Order(pool, 1)
    )
    made = objective([lane], steps=20)
    rows = [r for step in range(1, 21) for _, part in made.prepare(step).micro_batches for r in part]
    share = sum(not r.off_policy for r in rows) / len(rows)
    assert share == pytest.approx(0.3, abs=0.04)  # 1,000 draws: three standard deviations
    again = objective([lane], steps=20)
    assert rows[:50] == [r for _, part in again.prepare(1).micro_batches for r in part]


def test_until_the_gate_opens_only_the_pool_is_used() -> None:
    pool = [Rollout("t", (3, 4), (5, 6, 7), False, off_policy=True)]
    lane = Lane(BASE, scorer(build_model(320, seed=2)), Order(encoded(9), 0), 4, Order(pool, 1))
    made = objective([lane], on_policy=lambda step: step > 2)
    shares = [made.prepare(step).means["on_policy"] for step in (1, 2, 3)]
    assert shares == [(0, 4), (0, 4), (4, 4)]
    assert len(made.sampler.calls) == 1


def test_like_lengths_share_a_micro_batch() -> None:
    lane = Lane(BASE, scorer(build_model(320, seed=2)), Order(encoded(9), 0), rows=9)
    prepared = objective([lane]).prepare(1)
    lengths = [[len(r.prompt) for r in part] for _, part in prepared.micro_batches]
    assert lengths == [sorted(part) for part in lengths]
    assert [part[0] for part in lengths] == sorted(part[0] for part in lengths)


def test_completions_shorter_than_what_is_skipped_give_nothing() -> None:
    lane = Lane(replace(BASE, skip_first=9), scorer(build_model(320, seed=2)), Order(encoded(3), 0), rows=3)
    made = objective([lane])
    prepared = made.prepare(1)
    assert prepared.tokens == {"recover": 0}
    assert made(prepared.micro_batches[0]).sums == {}


def test_streams_draw_apart() -> None:
    """Two streams over the same prompts don't sample the same completions."""
    teacher = scorer(build_model(320, seed=2))
    lanes = [Lane(replace(BASE, name=n), teacher, Order(encoded(4), 0), rows=4) for n in ("recover", "other")]
    prepared = objective(lanes).prepare(1)
    said = {lane.stream.name: [r.completion for r in part] for lane, part in prepared.micro_batches if len(part) == 3}
    assert said["recover"] != said["other"]
