"""Alignment beside the divergence: its gradient against finite differences, its balance, its place in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from helpers.recovering import assert_equal_runs, torn_copy
from helpers.steps import distillation, encoded, source
from helpers.tiny import build_model
from remend.files.settings import build
from remend.models.layers import decoder_layers
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.alignment import BALANCE_EVERY, Aligned, Alignment, aligned
from remend.recovery.job import recover
from remend.recovery.settings import RecoverConfig
from remend.training.teachers.frozen import Frozen

MEASURES = ["cka", "l2"]


def objective(student: LlamaForCausalLM, teacher: LlamaForCausalLM, measure: str, **rest: Any) -> Aligned:
    """A step of three prompts in one micro-batch, 15 completion tokens."""
    plain = distillation(student, source(Frozen(scorer(teacher)), encoded(3), 3), steps=99, **rest)
    named = {"student": "s", "teacher": "t", "data": "d", "out": "o"}
    config = build(RecoverConfig, {**named, "alignment": {"measure": measure, "weight": 0.25}}, "a test")
    made = aligned(plain, config, [0, 1])
    assert isinstance(made, Aligned)
    return made


def total(made: Aligned, step: int) -> tuple[Tensor, list[Rollout]]:
    """The sum of the step's loss, and what it was taken on."""
    (micro_batch,) = made.prepare(step).micro_batches
    return made(micro_batch).sums["recover"][0], list(micro_batch[1])


def blocks_and_logits(model: LlamaForCausalLM, rollouts: list[Rollout]) -> tuple[list[list[Tensor]], Tensor]:
    """Block outputs by layer and rollout, each [T, D], and logits [N, V]; one sequence at a time."""
    outputs: list[list[Tensor]] = [[] for _ in decoder_layers(model)]
    handles = [
        block.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
        for block, kept in zip(decoder_layers(model), outputs, strict=True)
    ]
    logits = [
        model(input_ids=torch.tensor([[*r.prompt, *r.completion]])).logits[0, len(r.prompt) - 1 : -1] for r in rollouts
    ]
    for handle in handles:
        handle.remove()
    return outputs, torch.cat(logits)


def at_tokens(outputs: list[list[Tensor]], rollouts: list[Rollout]) -> list[Tensor]:
    """The states [N, D] that predict the completions, by layer."""
    return [
        torch.cat([states[0, len(r.prompt) - 1 : -1] for states, r in zip(layer, rollouts, strict=True)])
        for layer in outputs
    ]


def length(loss: Tensor, outputs: list[list[Tensor]]) -> float:
    """Of the loss's gradient with respect to all blocks' outputs."""
    gradients = torch.autograd.grad(loss, [s for layer in outputs for s in layer], retain_graph=True, allow_unused=True)
    return float(sum(g.square().sum() for g in gradients if g is not None)) ** 0.5


@pytest.mark.parametrize("measure", MEASURES)
def test_gradient_agrees_with_finite_differences(measure: str) -> None:
    """With respect to the blocks' outputs, in float64 (a Llama's own norms compute in float32)."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = ([torch.randn(11, 5, dtype=torch.float64, generator=generator) for _ in "ab"] for _ in "ab")
    alignment = Alignment(measure, 1.0, (), ())
    assert torch.autograd.gradcheck(
        lambda *states: alignment.loss(states, theirs), [state.requires_grad_() for state in ours]
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_the_loss_is_the_divergence_and_the_alignment_by_the_factor(measure: str) -> None:
    """Against one sequence at a time; the factor makes the gradients' lengths stand in the ratio 0.25."""
    student, teacher = (build_model(320, seed=s, width=16) for s in (1, 2))
    made = objective(student, teacher, measure)
    loss, rollouts = total(made, 1)
    outputs, logits_NV = blocks_and_logits(student, rollouts)
    with torch.no_grad():
        theirs, taught_NV = blocks_and_logits(teacher, rollouts)
    log_q_NV, log_p_NV = logits_NV.log_softmax(-1), taught_NV.log_softmax(-1)
    divergence_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    alignment = made.alignment.loss(at_tokens(outputs, rollouts), at_tokens(theirs, rollouts))
    assert alignment is not None
    wanted = 0.25 * length(divergence_N.mean(), outputs) / length(alignment, outputs)
    assert made.scale == pytest.approx(wanted, rel=1e-3)
    assert loss.item() == pytest.approx((divergence_N.sum() + made.scale * 15 * alignment).item(), rel=1e-4)


def test_the_factor_is_renewed_every_few_steps() -> None:
    made = objective(*(build_model(320, seed=s, width=16) for s in (1, 2)), "l2")
    scales = []
    for step in range(1, BALANCE_EVERY + 2):
        made.scale = 0.0
        total(made, step)
        scales.append(made.scale)
    assert [scale > 0 for scale in scales] == [True, *[False] * (BALANCE_EVERY - 1), True]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_model_is_aligned_with_itself(measure: str) -> None:
    model = build_model(320, width=16)
    made = objective(model, model, measure)
    made.scale = 1.0
    loss, _ = total(made, 2)
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


def test_too_few_tokens_give_no_alignment() -> None:
    few = [torch.zeros(7, 16)]
    assert Alignment("cka", 1.0, (), ()).loss(few, few) is None


def test_recomputed_layers_give_the_same_gradient() -> None:
    gradients = []
    for recomputed in (False, True):
        student = build_model(320, seed=1)
        loss, _ = total(objective(student, build_model(320, seed=2), "cka", checkpointing=recomputed), 1)
        loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert all(gradients[0][name].equal(gradients[1][name]) for name in gradients[0])


def test_a_run_with_it_resumes_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = recover(**recipe, alignment={"measure": "cka"})
    assert_equal_runs(whole, recover(resume=torn_copy(whole.out, tmp_path / "torn", 2)))
