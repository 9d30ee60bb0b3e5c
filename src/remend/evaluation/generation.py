"""Let an engine answer prompts batch by batch; every batch is kept as soon as it is there.

Answers stand in a JSON lines file beside the results, so that an interrupted evaluation goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil
import torch
from torch import nn

from remend.console import stage, warn
from remend.data.order import batches_by_length
from remend.data.templates import Encoded
from remend.errors import FileError, InputError, shortened
from remend.files.atomic import JsonObject, flush, json_line, writing
from remend.files.lock import take
from remend.files.own import open_own
from remend.files.reading import object_of
from remend.files.signed import SIGNATURE, as_signed, signed, unsigned
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM, Scored, Tokenizer
from remend.models.sampling.rollout import Rollout, Sampler
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.sizes import largest

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
    about: JsonObject


@dataclass(frozen=True)
class Limits:
    """How many rows, and how many tokens with padding, a batch has at most; None sets no limit."""

    rows: int
    tokens: int | None = None


def rows_of(device: torch.device) -> int:
    """Rows decoded at once, where the user did not say."""
    return ROWS.get(device.type, GPU_ROWS)


def hf_sampler(model: CausalLM, tokenizer: Tokenizer) -> Sampler:
    """Decoding with transformers, a whole batch at once. It raises InputError when logits are not finite."""
    eos = eos_ids(model, tokenizer)
    sampler = TransformersSampler(model, model.get_output_embeddings().weight.shape[0], eos, max_rows=2**31)

    def sample(
        prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        assert isinstance(model, nn.Module)
        with model.register_forward_hook(_refuse_damage):
            return sampler(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    return sample


def _refuse_damage(_module: nn.Module, _inputs: object, output: Scored) -> None:
    if not output.logits[:, -1].amax(-1).isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged beyond use")


def token_cap(model: CausalLM) -> int:
    """Tokens whose keys and values take MEMORY_SHARE of the free memory."""
    config = model.config.get_text_config()
    queries = largest(config, "num_attention_heads") or 1  # states alone take less than keys and values of this width
    heads = largest(config, "num_key_value_heads") or queries
    width = largest(config, "head_dim") or largest(config, "hidden_size") // queries
    size = (
        2 * largest(config, "num_hidden_layers") * heads * width * model.get_output_embeddings().weight.dtype.itemsize
    )
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return max(1, int(MEMORY_SHARE * free / size))


def key_of(*parts: object) -> str:
    """16 hex digits for whatever an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def answers_path(out: Path) -> Path:
    """results.json → results.answers.jsonl."""
    return out.with_name(f"{out.stem}.answers.jsonl")


class Answers:
    """The file's lines by their `key`; see `open_answers`."""

    def __init__(self, path: Path, lines: Mapping[str, JsonObject], held: BinaryIO | None = None) -> None:
        self.path = path
        self._lines = dict(lines)
        self._held = held  # open as long as this is, and locked

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> JsonObject:
        return self._lines[key]

    def add(self, lines: Sequence[JsonObject]) -> None:
        """Append lines, each with its `key`. Raises FileError when they can't be written."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_own(self.path, os.O_APPEND), "a", encoding="utf-8") as stream:
                stream.write("".join(json_line(signed(line)) for line in lines))
        self._lines |= {line["key"]: line for line in lines}

    def flush(self) -> None:
        """Have the lines written to the disk, before results say that they are there."""
        if self.path.is_file():
            with writing(self.path):
                flush(self.path)
                flush(self.path.parent)

    def once(self, key: str, make: Callable[[], JsonObject]) -> JsonObject:
        """The line under `key`; where there is none, what `make` gives is kept there."""
        if key not in self:
            self.add([{"key": key, **make()}])
        return self[key]


def open_answers(path: Path) -> Answers:
    """The answers that are there, for this process alone to add to. What a killed process left of a last line is
    taken away. Those of versions that did not sign their lines are taken with a warning.

    Raises FileError when the file can't be read or written or changed since, and InputError while another process adds
    to it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.fdopen(open_own(path, os.O_APPEND), "ab+")
    if take(held.fileno()) is False:
        raise InputError(
            f"another process adds to {path}; wait until it has ended, or end it, and give the command again"
        )
    held.seek(0)
    try:
        whole, _, torn = held.read().rpartition(b"\n")
        lines = [object_of(line) for line in whole.decode().split("\n") if line.strip()]
        by_key = {_checked(line)["key"]: unsigned(line) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"a line lacks {error}" if isinstance(error, KeyError) else shortened(error)
        raise FileError(
            f"the answers of an earlier call in {path} can't be used: {reason}. Move that file away to begin anew"
        ) from None
    signatures = {SIGNATURE in line for line in lines}
    if len(signatures) > 1:
        raise FileError(f"some lines of {path} changed since they were written. Move that file away to begin anew")
    if signatures == {False}:
        warn(f"the lines of {path} carry no signatures, as older versions wrote them; damage would not be noticed")
    if torn:
        held.truncate(len(whole) + 1 if whole else 0)
    return Answers(path, by_key, held)


def _checked(line: JsonObject) -> JsonObject:
    """A line that is as it was written. Raises ValueError, KeyError or TypeError for another."""
    if not as_signed(line):
        raise ValueError(f"the line of {shortened(line['key'], 40)} changed since it was written")
    kinds = {"key": str, "answer": str, "tokens": int, "clipped": bool, "log_likelihoods": dict, "parts": list}
    wrong = [name for name, kind in kinds.items() if name in line and not isinstance(line[name], kind)]
    if wrong or not all(map(math.isfinite, line.get("log_likelihoods", {}).values())):
        raise ValueError(f"the line of {shortened(line['key'], 40)} has values of another kind than are written there")
    return line


def fill(
    answers: Answers,
    keys: Sequence[str],
    lengths: Sequence[int],
    limits: Limits,
    title: str,
    answer: Callable[[list[int]], list[JsonObject]],
) -> None:
    """Get the answers that are missing, batch by batch.

    Batches are made of all rows, answered or not: rounding differs with a batch's shape and settles near ties, and so
    an interrupted evaluation goes on with the batches, and gives the answers, that it would have had as a whole. A
    batch that is kept in part is answered as a whole, and only what is missing is taken.

    Args:
        keys, lengths: of all rows; a length counts the answer's tokens too.
        answer: the lines of a batch, for its rows' numbers, each with its `key`.
    """
    done = sum(key in answers for key in keys)
    with stage(title, len(keys), done) as advance:
        for batch in batches_by_length(lengths, rows=limits.rows, tokens=limits.tokens, longest_first=True):
            missing = {keys[i] for i in batch if keys[i] not in answers}
            if missing:
                answers.add([line for line in answer(batch) if line["key"] in missing])
                advance(len(missing))


def ask(
    sampler: Sampler,
    questions: Sequence[Question],
    answers: Answers,
    tokenizer: Tokenizer,
    title: str,
    *,
    max_new_tokens: int,
    temperature: float,
    limits: Limits,
) -> None:
    """Have all questions answered and keep the answers: key, answer (a text without special tokens), tokens, clipped.

    Questions that have an answer already are given too; see `fill`.

    Raises InputError when a batch does not fit into the GPU's memory.
    """

    def answer(batch: list[int]) -> list[JsonObject]:
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
        return [
            {
                "key": question.key,
                **question.about,
                "answer": tokenizer.decode(rollout.completion, skip_special_tokens=True),
                "tokens": len(rollout.completion),
                "clipped": rollout.clipped,
            }
            for question, rollout in zip(part, rollouts, strict=True)
        ]

    lengths = [len(question.prompt.tokens) + max_new_tokens for question in questions]
    fill(answers, [question.key for question in questions], lengths, limits, title, answer)
