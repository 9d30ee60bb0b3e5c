"""Cross-entropy of completions and of nothing else, summed as the loop wants it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional

from helpers.tiny import TEMPLATE, build_model, build_tokenizer
from remend.data.answers import ending
from remend.data.examples import example_of
from remend.data.order import Order
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.training.supervised import STREAM, Supervised, encode_pairs

PAIRS = [(example_of({"prompt": f"Tell me about tea number {i}."}, "x"), "It is " + "warm " * i) for i in range(1, 6)]
EOS = 2


@pytest.fixture
def rows(tokenizer: Any) -> list[Rollout]:
    return encode_pairs(tokenizer, PAIRS, max_tokens=100, eos=[EOS])[0]


def objective(model: Any, rows: Sequence[Rollout], batch: int, accumulation: int = 1, **turn: int) -> Supervised:
    return Supervised(scorer(model), Order(rows, 0), batch, accumulation, nullcontext(), **turn)


def slow_loss(model: Any, rows: Sequence[Rollout]) -> torch.Tensor:
    """Row by row, all logits, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits = model(ids).logits[0, len(row.prompt) - 1 : -1].double()
        total = total + functional.cross_entropy(logits, torch.tensor(row.completion), reduction="sum")
    return total


def test_sum_and_gradient_are_those_of_a_slow_loss_over_completions_only(rows: list[Rollout]) -> None:
    model, slow = build_model(320), build_model(320).double()
    step = objective(model, rows, 5)
    prepared = step.prepare(1)
    total, count = step(prepared.micro_batches[0]).sums[STREAM]
    total.backward()
    expected = slow_loss(slow, rows)
    expected.backward()
    assert count == sum(len(r.completion) for r in rows) == prepared.tokens[STREAM]
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4 * float(q.grad.abs().max())), name


def test_micro_batches_and_processes_share_one_step(rows: list[Rollout]) -> None:
    model = build_model(320)
    whole = objective(model, rows, 4).prepare(2)
    split = objective(model, rows, 2, 2).prepare(2)
    halves = [objective(model, rows, 2, process=i, processes=2).prepare(2) for i in range(2)]
    assert [len(m) for m in split.micro_batches] == [2, 2]
    assert [r for m in split.micro_batches for r in m] == list(whole.micro_batches[0])
    assert sorted(i for h in halves for i in h.ids) == sorted(whole.ids)
    assert sum(h.tokens[STREAM] for h in halves) == whole.tokens[STREAM]
    seen = [i for step in range(1, 6) for i in objective(model, rows, 1).prepare(step).ids]
    assert sorted(seen) == sorted(r.id for r in rows)  # one epoch takes every row once


def test_a_row_is_its_prompt_as_the_template_has_it_and_the_answer_with_its_end(tokenizer: Any) -> None:
    rows, dropped = encode_pairs(tokenizer, PAIRS[:1], max_tokens=100, eos=[EOS])
    assert dropped == []
    assert tokenizer.decode(rows[0].prompt) == (
        "<|im_start|>user\nTell me about tea number 1.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(rows[0].completion) == "It is warm <|im_end|>"
    assert rows[0].completion.count(EOS) == 1


def test_rows_too_long_are_dropped_whole_and_named(tokenizer: Any) -> None:
    everything, _ = encode_pairs(tokenizer, PAIRS, max_tokens=100, eos=[EOS])
    lengths = [len(r.prompt) + len(r.completion) for r in everything]
    limit = sorted(lengths)[2]
    kept, dropped = encode_pairs(tokenizer, PAIRS, max_tokens=limit, eos=[EOS])
    assert kept == [r for r, n in zip(everything, lengths, strict=True) if n <= limit]
    assert dropped == [r.id for r, n in zip(everything, lengths, strict=True) if n > limit]


def test_the_end_is_what_the_template_writes_after_an_answer() -> None:
    tokenizer = build_tokenizer()
    assert ending(tokenizer, [0, EOS]) == (EOS,)
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    assert ending(tokenizer, [0, EOS]) == (0,)
    assert ending(tokenizer, [EOS]) == (EOS,)  # sampling would not end at the template's token
    tokenizer.chat_template = None
    assert ending(tokenizer, [EOS]) == (EOS,)
    tokenizer.eos_token = None
    assert ending(tokenizer, []) == ()


def test_without_a_template_a_space_parts_question_and_answer() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    for prompt, text, expected in (("a b", "c", " c"), ("a b ", "c", "c"), ("a b", "\nc", "\nc")):
        rows, _ = encode_pairs(tokenizer, [(example_of({"prompt": prompt}, "x"), text)], max_tokens=50, eos=[EOS])
        assert tokenizer.decode(rows[0].completion) == f"{expected}<|im_end|>"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_the_end_is_trained_on_and_padding_is_not_where_they_are_one_token(pad: str) -> None:
    """Ids 0 pad a batch; here 0 ends an answer as well. One row at a time gives the loss of an uneven batch."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = pad
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", pad)
    end = tokenizer.eos_token_id
    rows, _ = encode_pairs(tokenizer, PAIRS, max_tokens=100, eos=[end])
    assert all(r.completion[-1] == end and r.completion.count(end) == 1 for r in rows)
    model = build_model(320)
    batch = objective(model, rows, 5)
    total, count = batch(batch.prepare(1).micro_batches[0]).sums[STREAM]
    alone = [objective(model, [row], 1)([row]).sums[STREAM] for row in rows]
    assert count == sum(n for _, n in alone)
    assert float(total.detach()) == pytest.approx(sum(float(t.detach()) for t, _ in alone), rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(slow_loss(build_model(320).double(), rows).detach()), rel=1e-5)
