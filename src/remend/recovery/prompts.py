"""The prompts of one stream: read, split, encoded, with what the teacher is shown beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from remend.data import tasks
from remend.data.examples import Example, data_hash, load_examples, split_held_out, without
from remend.data.templates import DEMONSTRATION, Encoded, dropped_text, encode_within
from remend.errors import InputError
from remend.recovery.settings import SELF, RecoverConfig
from remend.recovery.streams import Stream
from remend.training.teachers.cache import TeacherCache

DROPPED_LIMIT = 0.2
"""Above this share of prompts over the length limit, dropping them would change what is trained on: a problem."""


@dataclass
class StreamData:
    """What a stream trains on and is measured on.

    `examples` holds the held-out rows by id. A stream of self-written prompts gets its training prompts (and without
    eval_data its held-out ones) from `write` once the reference is in memory.
    """

    stream: Stream
    by_reference: bool
    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    examples: dict[str, Example] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def unwritten(self) -> bool:
        """Whether the reference has yet to write the prompts."""
        return self.stream.data == SELF and not self.train


def load_stream(
    stream: Stream, config: RecoverConfig, tokenizer: Any, cache: TeacherCache | None, *, by_reference: bool
) -> StreamData:
    """Read a stream's data. What is wrong with prompts goes to `problems` and `warnings`.

    Raises InputError and FileError for data that can't be used.
    """
    data = StreamData(stream, by_reference)
    if cache is not None:
        data.train, data.held_out = (
            [Encoded(r.id, r.prompt, "") for r in part] for part in (cache.train, cache.held_out)
        )
        data.hashes = {"cache": data_digest(cache)}
        return data
    held_out = load_examples(stream.eval_data) if stream.eval_data else []
    if stream.data == SELF:
        _encode(data, config, tokenizer, [], held_out)
        return data
    assert stream.data is not None
    prepare(data, config, tokenizer, load_examples(stream.data), held_out)
    return data


def data_digest(cache: TeacherCache) -> str:
    """SHA-256 over the cache's own record of what it holds."""
    return hashlib.sha256(json.dumps(dict(cache.record), sort_keys=True).encode()).hexdigest()


def prepare(
    data: StreamData, config: RecoverConfig, tokenizer: Any, train: Sequence[Example], held_out: Sequence[Example]
) -> None:
    """Split examples (where no held-out ones are given) and encode them into `data`."""
    total = len(train)
    if held_out:
        train = without(train, held_out)
        if total > len(train):
            data.warnings.append(f"{total - len(train)} training prompts are also in eval_data and are not trained on")
        if not train:
            data.problems.append(f"no example is left to train on: all prompts of {data.stream.data} are in eval_data")
            return
    else:
        train, held_out = split_held_out(train, data.stream.held_out, config.seed)
    _encode(data, config, tokenizer, train, held_out)


def keep_apart(streams: Sequence[StreamData]) -> tuple[list[str], list[str]]:
    """Take out of every stream's training prompts what another is measured on: (problems, warnings)."""
    wrong, said = [], []
    held = {p.tokens for data in streams for p in data.held_out}
    for data in streams:
        left, name = [p for p in data.train if p.tokens not in held], data.stream.name
        if len(left) < len(data.train):
            count = len(data.train) - len(left)
            said.append(f"{count} prompts of {name} are held out in another stream and are not trained on")
            if not left:
                wrong.append(f"streams.{name}: no prompt is left to train on")
            data.train = left
    return wrong, said


def _gradable(data: StreamData, held_out: Sequence[Example]) -> None:
    """A task grades the held-out rows, so each needs the answer that it is graded by."""
    if data.stream.task not in tasks.names():
        return  # none, or one that the settings' checks have refused
    task, source = tasks.get(data.stream.task), data.stream.eval_data or data.stream.data
    for example in held_out:
        try:
            task.check(example.row, f'task {data.stream.task} of {data.stream.name}, {source}, row "{example.id}"')
        except InputError as error:
            data.problems.append(str(error))
            return


def _encode(
    data: StreamData, config: RecoverConfig, tokenizer: Any, train: Sequence[Example], held_out: Sequence[Example]
) -> None:
    data.train = _within(data, "training", train, config, tokenizer)
    data.held_out = _within(data, "held-out", held_out, config, tokenizer)
    data.examples = {e.id: e for e in held_out}
    _gradable(data, held_out)
    data.hashes = {"train": data_hash(train), "held_out": data_hash(held_out)}


def _within(
    data: StreamData, what: str, examples: Sequence[Example], config: RecoverConfig, tokenizer: Any
) -> list[Encoded]:
    template = (config.demonstration_template or DEMONSTRATION) if data.stream.demonstrations else None
    try:
        kept, dropped = encode_within(tokenizer, examples, config.max_prompt_tokens, template=template)
    except InputError as error:
        source = (data.stream.eval_data if what == "held-out" else None) or data.stream.data
        raise InputError(f"data {source} of stream {data.stream.name}: {error}") from None
    if dropped:
        name = what if data.by_reference else f"{data.stream.name}/{what}"
        data.dropped[name] = dropped
        shown = " with their demonstrations" if template else ""
        limit = f"max_prompt_tokens = {config.max_prompt_tokens}"
        text = dropped_text(dropped, len(examples), f"{what} prompts{shown}", limit)
        share = len(dropped) / len(examples)
        if share > DROPPED_LIMIT or not kept:
            rest = "no example is left" if not kept else f"that is {share:.0%}, above the {DROPPED_LIMIT:.0%} limit"
            data.problems.append(f"{text}; {rest}. Raise max_prompt_tokens or shorten the prompts.")
        else:
            data.warnings.append(text)
    return kept
