"""The prompts of one stream: read, split, encoded, with what the teacher is shown beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from remend.data import tasks
from remend.data.examples import Example, data_hash, load_examples, shapes_text, split_held_out, without
from remend.data.shapes import PROMPT
from remend.data.templates import (
    DEMONSTRATION,
    Encoded,
    dropped_text,
    encode_within,
    row_names,
    token_hash,
    turns,
    writes_the_time,
)
from remend.errors import InputError
from remend.models.protocols import Tokenizer
from remend.models.room import Room
from remend.recovery.findings import Findings
from remend.recovery.settings import SELF, RecoverConfig
from remend.recovery.streams import Stream
from remend.training.teachers.teacher import NamedTeacher

DROPPED_LIMIT = 0.2
"""Above this share of prompts over the length limit, dropping them would change what is trained on: a problem."""


KINDS = 50
"""Of how many kinds of rows one is looked at for a date that the chat template writes."""


@dataclass(frozen=True)
class StreamData:
    """What a stream trains on and is measured on.

    by_reference: the healthy reference is its teacher.
    train, held_out: prompts as token ids; `examples` holds the held-out rows by id.
    apart: training prompts that nothing is trained on or fitted to (`steps: auto` looks at them).
    hashes: SHA-256 of the rows, by part.
    dropped: ids of prompts over the length limit, by part.
    room: what student and teacher can read; answer: tokens that follow a prompt at most.
    token_hash: SHA-256 of all prompts as they are shown, token by token.
    """

    stream: Stream
    by_reference: bool
    train: Sequence[Encoded] = ()
    held_out: Sequence[Encoded] = ()
    examples: Mapping[str, Example] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, list[str]] = field(default_factory=dict)
    room: Room | None = None
    answer: int = 0
    token_hash: str = ""
    apart: Sequence[Encoded] = ()

    @property
    def unwritten(self) -> bool:
        """Whether the reference has yet to write the prompts."""
        return self.stream.data == SELF and not self.train


@dataclass(frozen=True)
class Prompts:
    """The prompts of all streams.

    warnings: what was noticed as the reference's own were split and encoded; a plan's are among its own warnings.
    """

    streams: Sequence[StreamData]
    warnings: Sequence[str] = ()

    @property
    def main(self) -> StreamData:
        """The stream whose held-out prompts say how much was recovered: the first that the reference teaches."""
        return next((s for s in self.streams if s.by_reference), self.streams[0])

    @property
    def hashes(self) -> Mapping[str, object]:
        """Of the one stream, or by stream."""
        hashes = {s.stream.name: dict(s.hashes) for s in self.streams}
        return dict(self.main.hashes) if len(hashes) == 1 else hashes

    @property
    def token_hash(self) -> str:
        """SHA-256 of the prompts as tokens, but for those that the reference is to write."""
        told = [s.token_hash for s in self.streams if not s.unwritten]
        return hashlib.sha256("".join(told).encode()).hexdigest()

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Ids of prompts over the length limit, by part."""
        return {part: ids for s in self.streams for part, ids in s.dropped.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """How many prompts each stream has."""
        return {s.stream.name: {"train": len(s.train), "held_out": len(s.held_out)} for s in self.streams}


def load_stream(
    data: StreamData, config: RecoverConfig, tokenizer: Tokenizer, teacher: NamedTeacher, findings: Findings
) -> StreamData:
    """A stream with its prompts, read from its data or brought along by its opened teacher.

    What is wrong with prompts goes to `findings`. Raises InputError and FileError for data that can't be used.
    """
    stream, brought = data.stream, teacher.brings()
    if brought is not None:
        train, held = ([Encoded(r.id, r.prompt, "") for r in part] for part in brought[:2])
        positions = data.room.positions if data.room else None
        long = [
            r.id for part in brought[:2] for r in part if positions and len(r.prompt) + len(r.completion) > positions
        ]
        if long:
            findings.problems.append(
                f"{row_names(long)} of {teacher.name}: the answers end beyond the student's {positions} positions; "
                "write the cache with a smaller max_prompt_tokens or max_new_tokens"
            )
        return replace(data, train=train, held_out=held, hashes={"cache": brought[2]})
    held_out = load_examples(stream.eval_data, columns=stream.columns) if stream.eval_data else []
    if stream.data == SELF:
        return _encoded(data, config, tokenizer, ([], held_out), findings)
    assert stream.data is not None
    rows = load_examples(stream.data, columns=stream.columns)
    if any(example.shape != PROMPT for example in rows):
        findings.notes.append(f"data {stream.data}: {shapes_text(rows)}")
    return with_prompts(data, config, tokenizer, rows, held_out, findings)


def with_prompts(
    data: StreamData,
    config: RecoverConfig,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    held_out: Sequence[Example],
    findings: Findings,
) -> StreamData:
    """The stream with examples, split where no held-out ones are given, and encoded."""
    total = len(train)
    if not held_out:
        parts = split_held_out(train, data.stream.held_out, config.seed)
        return _encoded(data, config, tokenizer, parts, findings)
    train = without(train, held_out)
    if total > len(train):
        findings.warnings.append(f"{total - len(train)} training prompts are also in eval_data and are not trained on")
    if not train:
        findings.problems.append(f"no example is left to train on: all prompts of {data.stream.data} are in eval_data")
        return data
    return _encoded(data, config, tokenizer, (train, held_out), findings)


def kept_apart(streams: Sequence[StreamData], findings: Findings) -> list[StreamData]:
    """The streams without training prompts that another is measured on."""
    held = {p.tokens for data in streams for p in data.held_out}
    apart = []
    for data in streams:
        left, name = [p for p in data.train if p.tokens not in held], data.stream.name
        if len(left) < len(data.train):
            count = len(data.train) - len(left)
            findings.warnings.append(f"{count} prompts of {name} are held out in another stream and are not trained on")
            if not left:
                findings.problems.append(f"streams.{name}: no prompt is left to train on")
        apart.append(replace(data, train=left))
    return apart


def _check_gradable(data: StreamData, held_out: Sequence[Example], findings: Findings) -> None:
    """A task grades the held-out rows, so each needs the answer that it is graded by."""
    if data.stream.task not in tasks.names():
        return  # none, or one that the settings' checks have refused
    task, source = tasks.get(data.stream.task), data.stream.eval_data or data.stream.data
    for example in held_out:
        try:
            task.check(example.row, f'task {data.stream.task} of {data.stream.name}, {source}, row "{example.id}"')
        except InputError as error:
            findings.problems.append(str(error))
            return


def _beyond(prompts: Sequence[Encoded], what: str, data: StreamData) -> list[str]:
    """Warnings of prompts whose answers may end where the model was not meant to read."""
    room = data.room
    if room is None or room.positions is not None:
        return []

    def longer(limit: int) -> list[str]:
        return [p.id for p in prompts if len(p.shown or p.tokens) + data.answer > limit]

    way = "lower max_prompt_tokens or max_new_tokens"
    if room.factors and (names := longer(room.factors)):
        return [
            f"{what} {row_names(names)}: prompt and answer may go beyond {room.factors} tokens, where the model's rope "
            f"takes other factors, for all rows of a batch; {way}"
        ]
    if room.trained and (names := longer(room.trained)):
        return [
            f"{what} {row_names(names)}: prompt and answer may go beyond the {room.trained} positions that the model's "
            f"configuration names; {way}"
        ]
    return []


def _kind(example: Example) -> str:
    """What a chat template may branch by: the roles, and what it is given beside the messages (of tools, that)."""
    context = example.context
    told = {**context, "tools": "tools" in context}
    return json.dumps([sorted({str(turn["role"]) for turn in turns(example.prompt)}), told], sort_keys=True)


def _encoded(
    data: StreamData,
    config: RecoverConfig,
    tokenizer: Tokenizer,
    parts: tuple[Sequence[Example], Sequence[Example]],
    findings: Findings,
) -> StreamData:
    """The examples that fit the length limit, encoded; those that don't are noted in `dropped`."""
    stream, room, encoded, dropped, refused = data.stream, data.room, [], {}, list[str]()
    limit, why = room.prompt_limit(config.max_prompt_tokens, data.answer) if room else (config.max_prompt_tokens, "")
    template = (config.demonstration_template or DEMONSTRATION) if stream.demonstrations else None
    for what, examples in zip(("training", "held-out"), parts, strict=True):
        try:
            kept, too_long = encode_within(
                tokenizer, examples, limit, template=template, rows=room.rows if room else None
            )
        except InputError as error:
            source = (stream.eval_data if what == "held-out" else None) or stream.data
            refused.append(f"data {source} of stream {stream.name}: {error}")
            continue
        encoded.append(kept)
        findings.warnings += _beyond(kept, what, data)
        if not too_long:
            continue
        dropped[what if data.by_reference else f"{stream.name}/{what}"] = too_long
        shown = " with their demonstrations" if template else ""
        text = dropped_text(too_long, len(examples), f"{what} prompts{shown}", why or f"max_prompt_tokens = {limit}")
        share = len(too_long) / len(examples)
        if share <= DROPPED_LIMIT and kept:
            findings.warnings.append(text)
            continue
        rest = "no example is left" if not kept else f"that is {share:.0%}, above the {DROPPED_LIMIT:.0%} limit"
        way = "Lower max_new_tokens" if why else "Raise max_prompt_tokens"
        findings.problems.append(f"{text}; {rest}. {way} or shorten the prompts.")
    if refused:
        raise InputError("\n".join(refused))
    train, held_out = parts
    kinds = {_kind(example): example for example in (*train, *held_out)}
    if any(writes_the_time(tokenizer, example) for example in islice(kinds.values(), KINDS)):
        findings.warnings.append(
            "the chat template writes the date or time into the prompts: an interrupted run can be resumed only while "
            "it writes the same. Where the template has a variable for it, such as date_string, rows can fix it in "
            "their chat_template_kwargs"
        )
    _check_gradable(data, held_out, findings)
    return replace(
        data,
        token_hash=token_hash([*encoded[0], *encoded[1]]),
        train=encoded[0],
        held_out=encoded[1],
        examples={e.id: e for e in held_out},
        hashes={"train": data_hash(train), "held_out": data_hash(held_out)},
        dropped=dropped,
    )
