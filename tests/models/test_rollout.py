"""Sampling: greedy as transformers does it, rows that don't see each other, and an exact distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from helpers.tiny import build_model
from remend.data.order import derive_seed
from remend.data.templates import Encoded
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler, choose

VOCABULARY = 64
EOS = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_model(VOCABULARY, seed=1)


def prompts(count: int = 7) -> list[Encoded]:
    """Prompts of unequal length, the longest first."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = [9, 1, 4, 6, 2, 13, 3, 5][i % 8]
        made.append(Encoded(f"p{i}", tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()), ""))
    return made


def sampler(model: LlamaForCausalLM, **changes: object) -> TransformersSampler:
    return TransformersSampler(**{"model": model, "shared": VOCABULARY, "eos": (EOS,), **changes})


def sample(model: LlamaForCausalLM, rows: list[Encoded], seeds: list[int], **changes: object) -> list[Rollout]:
    return sampler(model, **changes)(rows, max_new_tokens=12, temperature=1.0, seeds=seeds)


def with_absolute_positions() -> GPT2LMHeadModel:
    """Rotary positions are relative, so only such a model notices padding that shifts them."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, initializer_range=0.3, bos_token_id=None, eos_token_id=EOS)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("absolute", [False, True])
def test_greedy_equals_transformers_generate(model: PreTrainedModel, absolute: bool) -> None:
    model = with_absolute_positions() if absolute else model
    rows = prompts(8)
    first = sampler(model, eos=())(rows, max_new_tokens=12, temperature=0.0, seeds=[0] * 8)
    eos = (EOS, first[0].completion[3])  # a token that greedy decoding does meet, so that some rows end early
    ours = sampler(model, eos=eos)(rows, max_new_tokens=12, temperature=0.0, seeds=[0] * 8)
    width = max(len(r.tokens) for r in rows)
    padded = torch.tensor([[0] * (width - len(r.tokens)) + list(r.tokens) for r in rows])
    mask = torch.tensor([[0] * (width - len(r.tokens)) + [1] * len(r.tokens) for r in rows])
    theirs = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=list(eos), pad_token_id=0
    )
    for row, own, other in zip(rows, ours, theirs[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(other) if token in eos), len(other))
        assert own.completion == tuple(other[:end])
        assert (own.id, own.prompt) == (row.id, row.tokens)
    assert not all(r.clipped for r in ours)
    assert len({len(r.completion) for r in ours}) > 1


@pytest.mark.parametrize("max_rows", [1, 2, 3, 64])
def test_a_row_does_not_depend_on_its_batch(model: LlamaForCausalLM, max_rows: int) -> None:
    rows, seeds = prompts(), [derive_seed(3, i) for i in range(7)]
    eos = (2, 7, 11, 30, 31)  # rows leave the batch at different times
    together = sample(model, rows, seeds, eos=eos)
    assert len({len(r.completion) for r in together}) > 2
    assert sample(model, rows, seeds, eos=eos, max_rows=max_rows) == together
    assert sample(model, rows[::-1], seeds[::-1], eos=eos)[::-1] == together
    assert sample(model, rows[2:3], seeds[2:3], eos=eos) == together[2:3]


def test_seeds_settle_the_draws(model: LlamaForCausalLM) -> None:
    rows = prompts()
    assert sample(model, rows, [1] * 7) == sample(model, rows, [1] * 7)
    assert sample(model, rows, [1] * 7) != sample(model, rows, [2] * 7)
    same_prompt = [rows[0]] * 4
    found = sample(model, same_prompt, [1, 2, 3, 1])
    assert found[0] == found[3]
    assert len({r.completion for r in found}) == 3


def test_a_longer_limit_only_continues(model: LlamaForCausalLM) -> None:
    rows, seeds = prompts(), list(range(7))
    short, long = (sampler(model)(rows, max_new_tokens=n, temperature=1.0, seeds=seeds) for n in (5, 12))
    # torch draws the same leading numbers for either length
    for a, b in zip(short, long, strict=True):
        assert b.completion[: len(a.completion)] == a.completion


def test_the_end_belongs_to_the_completion_and_clipped_tells_its_lack(model: LlamaForCausalLM) -> None:
    eos = (2, 7, 11, 30)
    found = sample(model, prompts(8), list(range(8)), eos=eos)
    for rollout in found:
        assert not set(rollout.completion[:-1]) & set(eos)
        assert rollout.clipped == (rollout.completion[-1] not in eos)
        assert len(rollout.completion) == 12 or not rollout.clipped
    assert {r.clipped for r in found} == {True, False}


@pytest.mark.parametrize(("eos", "length"), [(tuple(range(VOCABULARY)), 1), ((), 12)])
def test_every_token_an_end_and_none(model: LlamaForCausalLM, eos: tuple[int, ...], length: int) -> None:
    rollouts = sample(model, prompts(), list(range(7)), eos=eos)
    assert {(len(r.completion), r.clipped) for r in rollouts} == {(length, not eos)}


def test_ids_that_are_not_shared_are_never_sampled(model: LlamaForCausalLM) -> None:
    seen = {t for r in sample(model, prompts(), list(range(7)), shared=9) for t in r.completion}
    assert max(seen) < 9
    assert len(seen) > 4
    assert max(t for r in sample(model, prompts(), list(range(7))) for t in r.completion) >= 9


def test_the_models_mode_is_left_as_it_was_and_rows_are_counted(model: LlamaForCausalLM) -> None:
    counted: list[int] = []
    model.train()
    sample(model, prompts(), list(range(7)), max_rows=3, on_rows=counted.append)
    assert model.training
    model.eval()
    sample(model, prompts(), list(range(7)))
    assert not model.training
    assert counted == [3, 3, 1]


def test_samples_follow_the_models_distribution(model: LlamaForCausalLM) -> None:
    """First tokens of 4000 rollouts against softmax at temperature 0.5: each frequency within 5 standard errors."""
    row, count = prompts(1)[0], 4000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([row.tokens])).logits[0, -1].double() / 0.5, -1)
    found = sampler(model, max_rows=1000)([row] * count, max_new_tokens=1, temperature=0.5, seeds=list(range(count)))
    frequency = torch.bincount(torch.tensor([r.completion[0] for r in found]), minlength=VOCABULARY) / count
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def uniforms(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@settings(deadline=None, max_examples=25, database=None)
@given(seed=st.integers(0, 2**31 - 1), v=st.integers(1, 50), temperature=st.sampled_from([0.3, 1.0, 4.0]))
def test_choose_is_the_quantile_of_softmax(seed: int, v: int, temperature: float) -> None:
    """20,000 evenly spaced draws: an interval of length p holds 20000·p ± 1 of them; the rest is float32 rounding."""
    logits = torch.randn(v, generator=torch.Generator().manual_seed(seed)) * 3
    count = 20_000
    chosen = choose(logits.expand(count, v), uniforms(count), temperature)
    assert chosen.dtype == torch.int64
    p = torch.softmax(logits.double() / temperature, -1)
    assert float((torch.bincount(chosen, minlength=v) / count - p).abs().max()) <= 1 / count + 1e-5
    assert (chosen.diff() >= 0).all()  # a larger draw gives a later id


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    for draws in (uniforms(50), torch.zeros(50, dtype=torch.float64)):
        assert torch.equal(choose(logits, draws, 0), logits.argmax(-1))
    assert torch.equal(choose(logits, uniforms(50), 1e-4), logits.argmax(-1))


EDGES = [0.0, 2.0**-1074, 2.0**-53, 0.5, math.nextafter(0.5, 0), math.nextafter(0.5, 1), 1 - 2.0**-53]


@pytest.mark.parametrize("draw", EDGES)
@pytest.mark.parametrize("seed", range(5))
def test_what_has_no_probability_is_never_chosen(draw: float, seed: int) -> None:
    """At the first and last ids too, for the smallest and the largest draw that torch.rand can give."""
    logits = torch.randn(200, 32, generator=torch.Generator().manual_seed(seed))
    dead = [0, 1, 7, 8, 15, 30, 31]
    logits[:, dead] = -math.inf
    chosen = choose(logits, torch.full((200,), draw, dtype=torch.float64), 1.0)
    assert not set(chosen.tolist()) & set(dead)
    logits[:, dead] = -1e4  # underflows to 0
    assert not set(choose(logits, torch.full((200,), draw, dtype=torch.float64), 1.0).tolist()) & set(dead)


def test_derived_seeds_are_stable_distinct_and_in_range() -> None:
    assert derive_seed(0, "held-out", 3) == derive_seed(0, "held-out", 3)
    found = {derive_seed(seed, word, i) for seed in range(3) for word in ("step", "held-out") for i in range(50)}
    assert len(found) == 300
    assert all(0 <= seed < 2**63 for seed in found)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_the_models_own_generation_settings_change_no_rollout(model: LlamaForCausalLM) -> None:
    rows, seeds = prompts(6), list(range(6))
    plain = sample(model, rows, seeds)
    told = build_model(VOCABULARY, seed=1)
    told.load_state_dict(model.state_dict())
    own = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "max_length": 3}
    told.generation_config.update(**own, suppress_tokens=[5, 6, 7], forced_eos_token_id=9, min_new_tokens=11)
    assert sample(told, rows, seeds) == plain
