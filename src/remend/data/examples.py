"""Prompts from JSON lines or a `datasets` id, validated row by row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from remend.errors import FileError, InputError
from remend.files.atomic import JsonRow, read_json

Message = Mapping[str, str]
Prompt = str | Sequence[Message]

Row = JsonRow
"""One row of a data file: columns of any kind that JSON has."""

Convert = Callable[[Row], Sequence[Row]]

_DATASET_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?")


@dataclass(frozen=True)
class Example:
    """One prompt: a user's text, or a list of chat messages ({role, content})."""

    id: str
    prompt: Prompt
    row: Row


def prompt_key(prompt: Prompt) -> str:
    """Canonical text of a prompt: equal prompts, and only those, have equal keys."""
    return json.dumps(
        prompt if isinstance(prompt, str) else [dict(m) for m in prompt], sort_keys=True, ensure_ascii=False
    )


def prompt_id(prompt: Prompt) -> str:
    """12 hex digits of the SHA-256 of the canonical prompt."""
    return hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:12]


def load_examples(source: str, convert: Convert | None = None) -> list[Example]:
    """Read prompts from a JSON lines file, or a datasets id ('org/name[@revision][:split]').

    Args:
        source: the file or id; a .json file may hold one list of objects.
        convert: makes rows with a prompt of each row that is read, none where it is to be left out.

    Raises:
        FileError: the file can't be read, or the data set can't be fetched.
        InputError: a line is not JSON, or a row has no usable `prompt`; the message names file and line.
    """
    return [example for _, example in _load(source, convert)]


def load_pairs(source: str) -> list[tuple[Example, str]]:
    """Read prompts with their completions, as `load_examples` does; see `completion_of` for where they stand.

    Raises:
        FileError, InputError: as `load_examples`; a row has no usable completion.
    """
    return [(example, completion_of(example.row, where)) for where, example in _load(source)]


def _load(source: str, convert: Convert | None = None) -> list[tuple[str, Example]]:
    path = Path(source)
    match = _DATASET_ID.fullmatch(source)
    if path.exists() or not match or path.suffix in {".jsonl", ".json"}:
        rows = _read_jsonl(path)
    else:
        rows = _read_dataset(source, match["name"], match["revision"], match["split"] or "train")
    if convert is not None:
        rows = [(where, made) for where, row in rows for made in convert(row)]
    if not rows:
        raise InputError(f"data {source} has no rows; it needs some with a prompt")
    examples: dict[str, tuple[str, Example]] = {}
    placed = []
    for where, row in rows:
        example = example_of(row, where)
        before, same = examples.setdefault(example.id, (where, example))
        if prompt_key(same.prompt) != prompt_key(example.prompt):
            raise InputError(f'{where}: the id "{example.id}" stands for another prompt already ({before})')
        placed.append((where, example))
    return placed


Placed = tuple[str, Any]
"""Where a value stands ('file:line'), and the value as JSON gave it."""


def read_lines(path: Path, what: str = "data") -> list[Placed]:
    """('file:line', parsed value) for every non-empty line of a JSON lines file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise FileError(f"{what} file {path} can't be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from None
    return rows


def _read_jsonl(path: Path) -> list[Placed]:
    rows = _whole_list(path) or read_lines(path)
    if not rows:
        raise InputError(f"data file {path} is empty; it needs one JSON object a line with a prompt")
    return rows


def _whole_list(path: Path) -> list[Placed]:
    """The objects of a .json file that is one list of them; [] for anything else."""
    if path.suffix != ".json":
        return []
    try:
        values = read_json(path)
    except FileError:
        return []
    return [(f"{path}, {i}", value) for i, value in enumerate(values, start=1)] if isinstance(values, list) else []


def _read_dataset(source: str, name: str, revision: str | None, split: str) -> list[Placed]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, revision=revision, split=split)
    except Exception as error:  # the library raises many kinds; the user needs one message
        raise FileError(
            f'data "{source}": no such file, and as a data set of the hub it can\'t be loaded '
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Give a JSON lines file, or "
            "run with a network."
        ) from None
    return [(f"{source}:{i}", dict(row)) for i, row in enumerate(rows)]


def example_of(row: object, where: str) -> Example:
    """Validate one row. Raises InputError that starts with `where`."""
    if not isinstance(row, Mapping):
        raise InputError(f'{where}: a row must be an object like {{"prompt": "…"}}, got {type(row).__name__}')
    prompt = row["prompt"] if "prompt" in row else _chat(row)
    if prompt is None and "prompt" not in row:
        raise InputError(f'{where}: the row has no "prompt" (it has: {", ".join(map(str, row)) or "nothing"})')
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt is empty")
    elif isinstance(prompt, Sequence):
        _validate_messages(prompt, where)
    else:
        raise InputError(f"{where}: prompt must be a string or a list of messages, got {type(prompt).__name__}")
    try:
        prompt_key(prompt).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the prompt holds half of a surrogate pair, which is no valid text") from None
    given = row.get("id")
    return Example(str(given) if given is not None else prompt_id(prompt), prompt, row)


COMPLETION_KEYS = ("completion", "response", "golden_response", "demonstration", "answer")
"""Where a completion may stand, best first: a row with a worked demonstration and a bare answer gives the former."""


DEMONSTRATION_KEYS = ("demonstration", "privileged_context", *(k for k in COMPLETION_KEYS if k != "demonstration"))
"""Where a worked answer may stand that only the teacher sees; privileged_context is TRL's name for it."""


def completion_of(row: Row, where: str) -> str:
    """The answer to train on: a text under one of COMPLETION_KEYS, or the last message where the assistant gives it.

    A key may also hold one assistant message in a list, as TRL's prompt-completion rows do.

    Raises InputError that starts with `where`.
    """
    return _answer(row, where, "completion", COMPLETION_KEYS)


def demonstration_of(row: Row, where: str) -> str:
    """The row's worked answer: a text under one of DEMONSTRATION_KEYS, or as `completion_of` finds it.

    Raises InputError that starts with `where`.
    """
    return _answer(row, where, "demonstration", DEMONSTRATION_KEYS)


def _answer(row: Row, where: str, what: str, keys: Sequence[str]) -> str:
    key = next((k for k in keys if row.get(k) is not None), None)
    value = row[key] if key else None
    if key is None and _chat(row) is not None:
        key, value = "messages", row["messages"][-1:]
    if key is None:
        raise InputError(
            f"{where}: the row has no {what} (it has: {', '.join(map(str, row)) or 'nothing'}); allowed keys: "
            f"{', '.join(keys)}, or messages that end with the assistant's"
        )
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "assistant" else value
    if not isinstance(value, str):
        raise InputError(
            f"{where}: {key} must be a text or one assistant message in a list, got {type(value).__name__}"
        )
    if not value.strip():
        raise InputError(f"{where}: the {key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the {key} holds half of a surrogate pair, which is no valid text") from None
    return value


def _chat(row: Row) -> list[Message] | None:
    """The prompt of a row that is a whole conversation (GKD's form): all messages but the assistant's last."""
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], Mapping):
        return None
    return messages[:-1] if messages[-1].get("role") == "assistant" else None


def _validate_messages(messages: Sequence[Message], where: str) -> None:
    if not messages:
        raise InputError(f"{where}: the prompt is an empty list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'{where}: message {number} must be an object with "role" and "content"')
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise InputError(f"{where}: message {number} ({message['role']}) has no text in its content")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's; a prompt ends where the model's answer begins")


def split_held_out(examples: Sequence[Example], held_out: int | None, seed: int) -> tuple[list[Example], list[Example]]:
    """Set prompts apart for measuring: (training, held-out).

    The choice depends on each prompt's text and the seed alone, so that adding or shuffling rows moves few others;
    rows with equal prompts fall on the same side.

    Args:
        examples: all examples.
        held_out: how many distinct prompts; None is the smaller of 64 and 10% (at least 1).
        seed: other seeds choose others.

    Raises:
        InputError: nothing would be left to train on.
    """
    distinct = {prompt_key(e.prompt): e for e in examples}
    count = held_out if held_out is not None else max(1, min(64, len(distinct) // 10))
    if count >= len(distinct):
        raise InputError(
            f"held_out is {count} and there are {len(distinct)} distinct prompts: none is left to train on. "
            "Give more data, a smaller held_out, or eval_data."
        )
    ranked = sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen = set(ranked[:count])
    train = [e for e in examples if prompt_key(e.prompt) not in chosen]
    return train, [distinct[key] for key in ranked[:count]]


def bundled(split: str, *, mixed: bool = True) -> list[Example]:
    """The bundled prompts of one split, 'train' or 'held_out': no topic is in both.

    Mixed, their order goes round the topics, so that the first n are as varied as n can be; else it is the file's.
    """
    source = resources.files("remend") / "data" / "prompts.jsonl"
    with resources.as_file(source) as path:
        rows = [(where, row) for where, row in read_lines(path) if row["split"] == split]
    topics: dict[str, list[Example]] = {}
    for where, row in rows:
        topics.setdefault(row["topic"], []).append(example_of(row, where))
    depth = max(map(len, topics.values()))
    if not mixed:
        return [example for topic in topics.values() for example in topic]
    return [topic[i] for i in range(depth) for topic in topics.values() if i < len(topic)]


def choose(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` distinct prompts (all, where there are fewer), settled by text and seed alone; in the order given."""
    distinct = {prompt_key(e.prompt): e for e in examples}
    ranked = sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen = set(ranked[:count])
    return [e for key, e in distinct.items() if key in chosen]


def without(examples: Iterable[Example], others: Iterable[Example]) -> list[Example]:
    """The examples whose prompt is not among `others`' prompts."""
    keys = {prompt_key(e.prompt) for e in others}
    return [e for e in examples if prompt_key(e.prompt) not in keys]


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over ids and canonical prompts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\0{prompt_key(example.prompt)}\0".encode())
    return digest.hexdigest()
