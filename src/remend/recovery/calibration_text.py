"""What a repair is fitted to: the teacher's answers to so many prompts, or rows that the user gives (`repair_text`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from remend.data.examples import load_pairs
from remend.data.order import Order
from remend.data.templates import Encoded, dropped_text
from remend.errors import FileError, InputError
from remend.models.protocols import Tokenizer
from remend.models.room import Room
from remend.models.sampling.rollout import Rollout
from remend.models.vocabulary import unreadable
from remend.recovery.findings import Findings
from remend.recovery.prompts import StreamData
from remend.recovery.settings import SELF, RecoverConfig
from remend.training.supervised import encode_pairs

Item = TypeVar("Item")

TOKENS = 64
"""Of a calibration sample, the reference's own completion of a training prompt."""

MOST_ROWS = 65_536
"""Tokens of calibration text, prompts included: long prompts would else cost hours and tens of gigabytes."""


@dataclass(frozen=True)
class Reader:
    """Who reads the text: the student's tokenizer and its ends of answers, what both models can read, and which ids
    the teacher of that name does not know."""

    tokenizer: Tokenizer
    ends: Sequence[int]
    room: Room
    teacher: str
    unknown: frozenset[int]


@dataclass(frozen=True)
class RepairText:
    """Rows of prompt and completion that a repair is fitted to, and the SHA-256 of all that the file has."""

    rows: Sequence[Rollout]
    hash: str

    @property
    def prompt(self) -> float:
        """Tokens of a prompt on average."""
        return sum(len(row.prompt) for row in self.rows) / len(self.rows)

    @property
    def answer(self) -> int:
        """Tokens of a completion on average, rounded up."""
        return -(-sum(len(row.completion) for row in self.rows) // len(self.rows))


def calibration_prompts(prompts: Sequence[Encoded], samples: int, seed: int) -> list[Encoded]:
    """From the end of training's order, as far as MOST_ROWS reaches; one at least, and some twice where they are few.

    The order is varied (files go by topic), and training begins at its other end: with what repair has not seen.
    """
    return as_far_as(prompts, samples, seed, lambda prompt: len(prompt.tokens) + TOKENS)


def as_far_as(items: Sequence[Item], samples: int, seed: int, tokens: Callable[[Item], int]) -> list[Item]:
    """So many of the items as `calibration_prompts` takes them, where each makes so many tokens of text."""
    chosen: list[Item] = []
    rows = 0
    for _, item in reversed(Order(items, seed).take(0, max(samples, len(items)))):
        rows += tokens(item)
        if chosen and (rows > MOST_ROWS or len(chosen) == samples):
            break
        chosen.append(item)
    return chosen


def read_repair_text(
    config: RecoverConfig, reader: Reader, streams: Sequence[StreamData], count: int, say: Findings
) -> RepairText | None:
    """The recipe's `repair_text`, of which `count` rows are needed; what can't be used of it is a problem.

    A row needs an answer, or is a text. One whose prompt is held out is left out, and one that is too long as well;
    which ones are taken follows from the recipe's seed.
    """
    source = config.repair_text
    assert source is not None
    what = f"repair_text {source}"
    if source == SELF:
        say.problems.append(
            f"{what}: it is a file of rows with their answers; leave it out, and the teacher writes the answers"
        )
        return None
    try:
        pairs = load_pairs(source, columns=config.columns)
        limit, why = reader.room.prompt_limit(config.max_prompt_tokens, 0)
        rows, long = encode_pairs(reader.tokenizer, pairs, max_tokens=limit, eos=reader.ends, rows=reader.room.rows)
    except (InputError, FileError) as error:
        say.problems.append(f"{what} can't be used as calibration text: {error}")
        return None
    held_out = {prompt.tokens for data in streams for prompt in data.held_out}
    apart = [row for row in rows if row.prompt not in held_out]
    left_out = [dropped_text(long, len(pairs), "rows", why or f"max_prompt_tokens = {limit}")] if long else []
    if len(apart) < len(rows):
        left_out.append(f"{len(rows) - len(apart)} rows have prompts that are held out, and are left out")
    if len(apart) < count:
        fewer = f", or set repair_samples to {len(apart)}" if apart else ""
        left = "1 row is" if len(apart) == 1 else f"{len(apart)} rows are"
        few = f"{left} left, and repair is fitted to {count}; give more{fewer}"
        say.problems.append(f"{what}: {'; '.join([*left_out, few])}")
        return None
    say.warnings += [f"{what}: {text}" for text in left_out]
    whole = [Encoded(row.id, (*row.prompt, *row.completion), "") for row in apart]
    alien = unreadable(reader.tokenizer, whole, reader.unknown, f"teacher {reader.teacher}")
    say.problems += [f"{what}: {problem}" for problem in alien]
    digest = hashlib.sha256(json.dumps([(row.id, row.prompt, row.completion) for row in rows]).encode())
    taken = as_far_as(apart, count, config.seed, lambda row: len(row.prompt) + len(row.completion))
    return RepairText(taken, digest.hexdigest())
