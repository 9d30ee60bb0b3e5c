"""Let an engine answer prompts batch by batch; every batch is kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from remend.console import stage
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.evaluation.steady import Steady
from remend.evaluation.store import Answers
from remend.models.sampling.rollout import Sampler
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.tokens import eos_ids

ROWS = {"cpu": 32}
GPU_ROWS = 64
"""Rows decoded at once; on a CPU more gain nothing."""

MEMORY_SHARE = 0.25
"""Of the free memory, for one batch's keys and values."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered: `key` is where its answer is kept, `about` what is kept beside it."""

    key: str
    prompt: Encoded
    seed: int
    about: dict[str, Any]


def rows_of(device: torch.device) -> int:
    """Rows decoded at once, where the user did not say."""
    return ROWS.get(device.type, GPU_ROWS)


def batches(lengths: Sequence[int], *, rows: int, tokens: int) -> list[list[int]]:
    """Indices in batches of like lengths, the longest first, so that a batch that does not fit is met at once.

    Args:
        lengths: tokens of each, answer included.
        rows: at most so many a batch.
        tokens: at most so many a batch, each row counted as long as its longest; a single row is always allowed.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    while order:
        count = max(1, min(rows, tokens // max(1, lengths[order[0]])))
        found.append(order[:count])
        order = order[count:]
    return found


def hf_sampler(model: Any, tokenizer: Any, *, greedy: bool) -> Sampler:
    """Decoding with transformers. Greedy choices are steadied; a sampled row's draws are its own in any batch."""
    eos = eos_ids(model, tokenizer)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    policy: Any = Steady(model, eos) if greedy else model
    return TransformersSampler(policy, vocabulary, eos, max_rows=2**31)


def token_cap(model: Any) -> int:
    """Tokens whose keys and values take MEMORY_SHARE of the free memory."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return max(1, int(MEMORY_SHARE * free / size))


def ask(
    sampler: Sampler,
    questions: Sequence[Question],
    answers: Answers,
    tokenizer: Any,
    title: str,
    *,
    max_new_tokens: int,
    temperature: float,
    rows: int,
    tokens: int,
    done: int = 0,
) -> None:
    """Answer all questions and keep the answers: key, answer (a text without special tokens), tokens, clipped.

    Args:
        sampler: an engine.
        questions: those that have no answer yet.
        answers: where they are kept, batch by batch.
        tokenizer: makes the text.
        title: of the progress bar.
        max_new_tokens, temperature: see Sampler.
        rows, tokens: of a batch at most; see `batches`.
        done: questions answered in an earlier call, for the bar.

    Raises InputError when a batch does not fit into the GPU's memory.
    """
    lengths = [len(question.prompt.tokens) + max_new_tokens for question in questions]
    with stage(title, len(questions) + done, done) as advance:
        for batch in batches(lengths, rows=rows, tokens=tokens):
            part = [questions[i] for i in batch]
            try:
                rollouts = sampler(
                    [question.prompt for question in part],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seeds=[question.seed for question in part],
                )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{len(part)} answers at once don't fit into the device's memory; give a batch_rows below that "
                    f"(--batch-rows {max(1, len(part) // 2)}). What is answered so far is kept"
                ) from None
            kept = [
                {
                    "key": question.key,
                    **question.about,
                    "answer": tokenizer.decode(rollout.completion, skip_special_tokens=True),
                    "tokens": len(rollout.completion),
                    "clipped": rollout.clipped,
                }
                for question, rollout in zip(part, rollouts, strict=True)
            ]
            answers.add(kept)
            advance(len(part))
