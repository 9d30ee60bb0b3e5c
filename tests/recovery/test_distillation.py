"""The step function against slow loops: alignment at unequal prompts, policies, rounds of sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.losses import DISTANCE
from helpers.steps import FixedSampler, distillation, encoded, source
from helpers.tiny import build_model
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack, scorer
from remend.recovery.distillation import Distillation
from remend.training.teachers.frozen import Frozen

TEACHER = build_model(320, seed=2)
TAUGHT = Frozen(scorer(TEACHER))


def objective(*sources: Any, **rest: Any) -> Distillation:
    return distillation(build_model(320, seed=1), *sources, **rest)


def asked(made: Distillation) -> list[int]:
    """How many completions each call of the sampler was asked for."""
    assert isinstance(made.rounds.sampler, FixedSampler)
    return [count for count, *_ in made.rounds.sampler.calls]


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
    made = objective(source(TAUGHT, encoded(5, shown), 5, skip_first_tokens=skip))
    prepared = made.prepare(1)
    outputs = [made(micro).sums["recover"] for micro in prepared.micro_batches]
    rollouts = [r for _, part in prepared.micro_batches for r in part]
    expected = slow(made.student.model, TEACHER, rollouts, skip)
    assert sum(total.item() for total, _ in outputs) == pytest.approx(expected, rel=1e-4)
    assert sum(n for _, n in outputs) == prepared.tokens["recover"] == 5 * (5 - skip)


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_loss_from_outside_is_what_is_trained_on(top_k: int | None) -> None:
    """The sum is the loss's own, and a step against its gradient lowers it."""
    made = objective(source(TAUGHT, encoded(5), 3, loss={"name": DISTANCE}, top_k=top_k))
    (micro,) = made.prepare(1).micro_batches
    total = made(micro).sums["recover"][0]
    if top_k is None:
        batch = pack([(r.prompt, r.completion) for r in micro[1]], device=TAUGHT.parts.device)
        q, p = (parts.head(parts.states(batch)).softmax(-1) for parts in (made.student, TAUGHT.parts))
        torch.testing.assert_close(total, (q - p).square().sum())
    total.backward()
    with torch.no_grad():
        for weight in made.student.model.parameters():
            assert weight.grad is not None
            weight -= 0.1 * weight.grad / weight.grad.norm().clamp(min=1e-12)
    assert made(micro).sums["recover"][0] < total


def test_one_round_of_sampling_feeds_several_steps_and_changes_no_draw() -> None:
    made = source(TAUGHT, encoded(12), 4)
    single, grouped = objective(made), objective(made, updates=3)
    for step in range(1, 9):
        ours, theirs = (
            [(r.id, r.completion) for _, part in each.prepare(step).micro_batches for r in part]
            for each in (single, grouped)
        )
        assert ours == theirs
    assert asked(single) == [4] * 8
    assert asked(grouped) == [12, 12, 8]


def test_a_round_of_sampling_has_one_length() -> None:
    made = objective(source(TAUGHT, encoded(12), 4, max_new_tokens=[2, 9]), updates=4)
    lengths = [
        {len(r.completion) for _, part in made.prepare(step).micro_batches for r in part} for step in range(1, 9)
    ]
    assert lengths == [{2}] * 4 + [{6}] * 4  # where the line is at the rounds' first steps, 1 and 5
    assert asked(made) == [16, 16]


def test_processes_share_a_step() -> None:
    made = source(TAUGHT, encoded(12), 6)
    whole = objective(made).prepare(2)
    parts = [objective(made, process=i, processes=2).prepare(2) for i in range(2)]
    assert sorted(r.id for p in parts for _, part in p.micro_batches for r in part) == sorted(
        r.id for _, part in whole.micro_batches for r in part
    )
    assert sum(p.tokens["recover"] for p in parts) == whole.tokens["recover"]


def test_a_mixture_takes_its_share_of_each_policy() -> None:
    pool = [Rollout(f"t{i}", (3, 4), (5, 6, 7), False, off_policy=True) for i in range(4)]
    mixed = source(TAUGHT, encoded(9), 50, pool, policy=0.3)
    made = objective(mixed, steps=20)
    rows = [r for step in range(1, 21) for _, part in made.prepare(step).micro_batches for r in part]
    share = sum(not r.off_policy for r in rows) / len(rows)
    assert share == pytest.approx(0.3, abs=0.04)  # 1,000 draws: three standard deviations
    again = objective(mixed, steps=20)
    assert rows[:50] == [r for _, part in again.prepare(1).micro_batches for r in part]


def test_until_the_gate_opens_only_the_pool_is_used() -> None:
    pool = [Rollout("t", (3, 4), (5, 6, 7), False, off_policy=True)]
    made = objective(source(TAUGHT, encoded(9), 4, pool), on_policy=lambda step: step > 2)
    shares = [made.prepare(step).means["on_policy"] for step in (1, 2, 3)]
    assert shares == [(0, 4), (0, 4), (4, 4)]
    assert asked(made) == [4]


def test_a_step_is_the_same_however_it_is_cut() -> None:
    """Rollouts exactly, sums and gradients to rounding."""
    steps = []
    for rows in (8, 4, 1):
        made = objective(source(TAUGHT, encoded(8), 8), micro_rows=rows)
        prepared = made.prepare(1)
        total = torch.stack([made(part).sums["recover"][0] for part in prepared.micro_batches]).sum()
        total.backward()
        steps.append((sorted(prepared.ids), total.item(), made.student.head.weight_VD.grad))
    for ids, total, gradient in steps[1:]:
        assert ids == steps[0][0]
        assert total == pytest.approx(steps[0][1], rel=1e-5)
        torch.testing.assert_close(gradient, steps[0][2], rtol=1e-4, atol=1e-5)


def test_a_second_stream_pulls_the_step_towards_its_teacher() -> None:
    """One step down the sum's gradient leaves the second stream's loss lower than a step down the first's alone."""
    left = []
    for weight in (0.0, 1.0):
        kept = source(Frozen(scorer(build_model(320, seed=3))), encoded(3), 3, name="keep", weight=weight)
        made = objective(source(TAUGHT, encoded(3), 3), kept)
        first, second = made.prepare(1).micro_batches
        sums = {**made(first).sums, **made(second).sums}
        torch.stack([made.weights[name] * total for name, (total, _) in sums.items()]).sum().backward()
        with torch.no_grad():
            for p in made.student.model.parameters():
                p -= 1e-4 * p.grad
        left.append(made(second).sums["keep"][0].item())
    assert left[1] < left[0]


def test_the_recipes_temperature_is_asked_for() -> None:
    made = objective(source(TAUGHT, encoded(4), 4), source(TAUGHT, encoded(4), 2, name="cold", temperature=0.5))
    made.prepare(1)
    assert isinstance(made.rounds.sampler, FixedSampler)
    assert made.rounds.sampler.calls == [(4, 5, 1.0), (2, 5, 0.5)]


def test_like_lengths_share_a_micro_batch() -> None:
    prepared = objective(source(TAUGHT, encoded(9), 9)).prepare(1)
    lengths = [[len(r.prompt) for r in part] for _, part in prepared.micro_batches]
    assert lengths == [sorted(part) for part in lengths]
    assert [part[0] for part in lengths] == sorted(part[0] for part in lengths)


def test_completions_shorter_than_what_is_skipped_give_nothing() -> None:
    made = objective(source(TAUGHT, encoded(3), 3, skip_first_tokens=9))
    prepared = made.prepare(1)
    assert prepared.tokens == {"recover": 0}
    assert made(prepared.micro_batches[0]).sums == {}


def test_another_seed_draws_other_prompts_and_completions() -> None:
    drawn = []
    for seed in (1, 1, 2):
        made = objective(source(TAUGHT, encoded(40), 6, seed=seed), seed=seed)
        drawn.append({(r.id, r.completion) for _, part in made.prepare(1).micro_batches for r in part})
    assert drawn[0] == drawn[1]
    assert not drawn[0] & drawn[2]


def test_streams_draw_apart() -> None:
    """Two streams over the same prompts don't sample the same completions."""
    prepared = objective(*(source(TAUGHT, encoded(4), 4, name=name) for name in ("recover", "other"))).prepare(1)
    said = {made.stream.name: [r.completion for r in part] for made, part in prepared.micro_batches if len(part) == 3}
    assert said["recover"] != said["other"]
