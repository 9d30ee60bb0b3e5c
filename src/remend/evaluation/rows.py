"""A task's rows, checked and told apart by id, and as prompts for a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from remend.data import tasks
from remend.data.examples import Row, example_of
from remend.data.tasks import Task
from remend.data.templates import Encoded, dropped_text, encode_within
from remend.data.tokenizer import Tokenizer
from remend.errors import InputError


@dataclass(frozen=True)
class TaskRows:
    """Rows by id, in the order given.

    origin: where they come from, in words; repeated: rows that stood there before and are graded once.
    """

    task: Task
    rows: Mapping[str, Row]
    origin: str
    repeated: int

    @property
    def digest(self) -> str:
        """SHA-256 over ids and rows, in order."""
        digest = hashlib.sha256()
        for name, row in self.rows.items():
            line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
            digest.update(f"{name}\0{line}\0".encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Material:
    """Rows with their prompts, in the same order, and the ids of those that no prompt could be made of."""

    table: TaskRows
    prompts: list[Encoded]
    dropped: list[str]

    @property
    def rows(self) -> list[Row]:
        """The rows that are asked, in the prompts' order."""
        return [self.table.rows[prompt.id] for prompt in self.prompts]


def read(name: str, data: str | None, limit: int | None) -> TaskRows:
    """A task's rows: of `data`, or the held-out ones that it makes, the same ones for every model.

    `limit` takes the first ones; None is all rows of `data`, and the task's `graded_rows` made ones.

    Raises:
        FileError: the data can't be read.
        InputError: there are no rows, one lacks a column, or one id stands for two rows.
    """
    task = tasks.get(name)
    if data is None:
        count = limit or task.graded_rows
        given: list[Row] = list(task.rows("held_out", count))
        origin = f"the first {count} held-out rows of {name}"
    else:
        given, origin = [example.row for example in task.load(data)][:limit], data
    rows: dict[str, Row] = {}
    for number, row in enumerate(given, start=1):
        where = f"{origin}, row {number}"
        task.check(row, where)
        key = task.id(row)
        if rows.setdefault(key, row) != row:
            raise InputError(f'{where}: the id "{key}" stands for another row already; give each an id of its own')
    return TaskRows(task, rows, origin, len(given) - len(rows))


def encode(
    table: TaskRows, tokenizer: Tokenizer, context: int | None, reserve: int, vocabulary: int | None = None
) -> Material:
    """The rows as prompts; those that leave no room for `reserve` tokens in the model's context are dropped, not cut.

    `vocabulary` is how many token ids the model has rows for, where that is known.

    Raises InputError when none is left, or a prompt has tokens beyond these, or can't be put into the chat template.
    """
    room = (context - reserve) if context else 2**62
    if room < 1:
        raise InputError(
            f"max_new_tokens is {reserve}, and the model's context is {context} tokens: no room for a prompt; "
            "give a smaller max_new_tokens"
        )
    examples = [replace(example_of(row, name), id=name) for name, row in table.rows.items()]
    prompts, dropped = encode_within(tokenizer, examples, room, rows=vocabulary)
    material = Material(table, prompts, dropped)
    if not prompts:
        raise InputError(
            f"{table.task.name}: {dropped_note(material, context, reserve)}. None is left; "
            "give a model with a longer context, or a smaller max_new_tokens"
        )
    return material


def dropped_note(material: Material, context: int | None, reserve: int) -> str:
    """Which prompts are dropped, in one line."""
    limit = f"{context} (the model's context) − {reserve} (its answer)"
    return dropped_text(material.dropped, len(material.table.rows), "prompts", limit)
