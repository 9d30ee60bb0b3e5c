"""Comparison of two models against a slow float64 loop over single sequences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.tiny import build_model
from remend.maths.losses import Target
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.training import measure
from remend.training.measure import PromptSums, compare, pool
from remend.training.teachers.frozen import Frozen

VOCABULARY = 64


def rollouts(seed: int = 0, count: int = 7) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        lengths = torch.randint(1, 9, (2,), generator=generator).tolist()
        prompt, completion = (tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist()) for n in lengths)
        made.append(Rollout(f"r{i}", prompt, completion, True))
    return made


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Student and reference of different width; the student is near enough to agree now and then."""
    reference = build_model(VOCABULARY, 0)
    student = build_model(VOCABULARY, 0)
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return student, reference


@torch.no_grad()
def slow_sums(student: LlamaForCausalLM, reference: LlamaForCausalLM, rollout: Rollout, shared: int) -> PromptSums:
    tokens = torch.tensor([[*rollout.prompt, *rollout.completion]])
    log_q, log_p = (
        torch.log_softmax(copy.deepcopy(m).double()(input_ids=tokens).logits[0, :, :shared], -1).tolist()
        for m in (student, reference)
    )
    kl, agree, nll, reference_nll = 0.0, 0, 0.0, 0.0
    for t, token in enumerate(rollout.completion):
        q, p = log_q[len(rollout.prompt) - 1 + t], log_p[len(rollout.prompt) - 1 + t]
        kl += sum(math.exp(b) * (b - a) for a, b in zip(q, p, strict=True))
        agree += max(range(shared), key=q.__getitem__) == max(range(shared), key=p.__getitem__)
        nll -= q[token]
        reference_nll -= p[token]
    return PromptSums(rollout.id, len(rollout.completion), kl, agree, nll, reference_nll)


@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_compare_equals_the_slow_loop(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], max_rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "chunk_rows", lambda *_: chunk)
    student, reference = models
    rows = rollouts()
    counted: list[int] = []
    ours = compare(scorer(student), Frozen(scorer(reference)), rows, max_rows=max_rows, on_rows=counted.append)
    for own, rollout in zip(ours, rows, strict=True):
        expected = slow_sums(student, reference, rollout, VOCABULARY)
        assert (own.id, own.tokens, own.agree) == (expected.id, expected.tokens, expected.agree)
        for key in ("kl", "nll", "reference_nll"):
            assert getattr(own, key) == pytest.approx(getattr(expected, key), rel=2e-4, abs=1e-5), key
    assert 0 < sum(s.agree for s in ours) < sum(s.tokens for s in ours)
    assert sum(counted) == len(rows)


def test_what_the_reference_gave_is_kept_and_not_computed_again(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
) -> None:
    student, reference = scorer(models[0]), Frozen(scorer(models[1]))
    rows, passes = rollouts(), []
    kept: dict[int, Target] = {}
    hook = models[1].model.register_forward_hook(lambda *_: passes.append(1))
    plain = compare(student, reference, rows, max_rows=3)
    first, second = (compare(student, reference, rows, max_rows=3, kept=kept) for _ in "ab")
    hook.remove()
    assert first == second == plain
    assert len(passes) == 2 * 3
    assert sum(len(states) for states in kept.values()) == sum(s.tokens for s in plain)


def test_only_shared_ids_are_compared(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    student, reference = models
    rows = [Rollout(r.id, r.prompt, tuple(t % 20 for t in r.completion), r.clipped) for r in rollouts(1, 3)]
    ours = compare(scorer(student, 20), Frozen(scorer(reference, 20)), rows)
    for own, rollout in zip(ours, rows, strict=True):
        expected = slow_sums(student, reference, rollout, 20)
        assert own.kl == pytest.approx(expected.kl, rel=2e-4, abs=1e-5)
        assert own.nll == pytest.approx(expected.nll, rel=2e-4)


def test_models_of_different_width_and_direction_of_the_divergence() -> None:
    wide, narrow = build_model(VOCABULARY, 3, width=64), build_model(VOCABULARY, 4, width=32)
    rows = rollouts(2, 3)
    there = compare(scorer(narrow), Frozen(scorer(wide)), rows)
    back = compare(scorer(wide), Frozen(scorer(narrow)), rows)
    for own, rollout in zip(there, rows, strict=True):
        assert own.kl == pytest.approx(slow_sums(narrow, wide, rollout, VOCABULARY).kl, rel=2e-4)
    assert [s.nll for s in there] == pytest.approx([s.reference_nll for s in back])
    assert sum(s.kl for s in there) != pytest.approx(sum(s.kl for s in back), rel=1e-3)


def test_a_model_against_itself(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    parts = scorer(models[1])
    figures = pool(compare(parts, Frozen(parts), rollouts()))
    assert figures["kl"] == pytest.approx(0, abs=1e-7)
    assert figures["top1_agreement"] == 1.0
    assert figures["perplexity"] == figures["reference_perplexity"]


def test_pool_weighs_every_token_alike() -> None:
    sums = [PromptSums("a", 1, 0.5, 1, 2.0, 1.0), PromptSums("b", 9, 9.5, 4, 3.0, 4.0)]
    assert pool(sums) == {
        "kl": pytest.approx(10.0 / 10),
        "top1_agreement": pytest.approx(5 / 10),
        "perplexity": pytest.approx(math.exp(5 / 10)),
        "reference_perplexity": pytest.approx(math.exp(5 / 10)),
        "tokens": 10,
    }
