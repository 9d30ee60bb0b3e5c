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
from remend.files.atomic import JsonRow

Message = Mapping[str, Any]
"""A chat message as templates take it: role, content (a text, or a list of text parts), and what else they show."""

Prompt = str | Sequence[Message]

Answer = str | Message
"""What is trained on: a text, or the assistant's message where that holds more (thoughts, tool calls, parts)."""

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

    @property
    def context(self) -> Mapping[str, Any]:
        """What the chat template is given beside the messages: the row's `tools` and its `chat_template_kwargs`."""
        return _context(self.row, f'row "{self.id}"')

    @property
    def key(self) -> str:
        """`prompt_key`, with the context where there is some."""
        return _key(self.prompt, self.context)


def prompt_key(prompt: Prompt) -> str:
    """Canonical text of a prompt: equal prompts, and only those, have equal keys."""
    return json.dumps(
        prompt if isinstance(prompt, str) else [dict(m) for m in prompt], sort_keys=True, ensure_ascii=False
    )


def prompt_id(prompt: Prompt) -> str:
    """12 hex digits of the SHA-256 of the canonical prompt."""
    return _digits(prompt_key(prompt))


def text_of(message: Message) -> str:
    """A message's content as text: the texts of its parts joined, "" where it has none."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def _digits(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _key(prompt: Prompt, context: Mapping[str, Any]) -> str:
    return prompt_key(prompt) + (json.dumps(context, sort_keys=True, ensure_ascii=False) if context else "")


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


def load_pairs(source: str) -> list[tuple[Example, Answer]]:
    """Read prompts with their completions, as `load_examples` does; see `answer_of` for where they stand.

    Raises:
        FileError, InputError: as `load_examples`; a row has no usable completion.
    """
    return [(example, answer_of(example.row, where)) for where, example in _load(source)]


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
        if same.key != example.key:
            raise InputError(f'{where}: the id "{example.id}" stands for another prompt already ({before})')
        placed.append((where, example))
    return placed


Placed = tuple[str, Any]
"""Where a value stands ('file:line'), and the value as JSON gave it."""


OTHER_FILES = {
    ".gz": "unpack it with gunzip",
    ".zip": "unpack it with unzip",
    ".parquet": "write it as JSON lines with datasets.Dataset.from_parquet(FILE).to_json(NEW)",
    ".arrow": "write it as JSON lines with datasets.Dataset.from_file(FILE).to_json(NEW)",
    ".csv": "write it as JSON lines with datasets.Dataset.from_csv(FILE).to_json(NEW)",
    ".tsv": 'write it as JSON lines with datasets.Dataset.from_csv(FILE, sep="\\t").to_json(NEW)',
}
"""What people have in place of JSON lines, by suffix, and how it becomes such."""


def read_lines(path: Path, what: str = "data") -> list[Placed]:
    """('file:line', parsed value) for every non-empty line of a JSON lines file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise InputError(f"{what} file {path} {why}{_instead(path)}") from None
    except OSError as error:
        raise FileError(f"{what} file {path} can't be read: {error.strerror}{_instead(path)}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            why = f"not valid JSON: {error.msg} (column {error.colno}){_instead(path)}"
            raise InputError(f"{path}:{number}: {why}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: {_beyond(error)}") from None
    return rows


def _instead(path: Path) -> str:
    """How a file or directory of another kind becomes JSON lines; "" for what looks like JSON."""
    how = OTHER_FILES.get(path.suffix.lower())
    if path.is_dir():
        how = "give a file of it; a data set, or one of its splits, becomes one with load_from_disk(…).to_json(…)"
    return f"; what is read is JSON lines, one object a line with a prompt: {how}" if how else ""


def _beyond(error: ValueError | RecursionError) -> str:
    """What JSON may hold and can't be read."""
    deep = isinstance(error, RecursionError)
    what = "lists or objects nested too deeply" if deep else "a whole number of too many digits"
    return f"the row holds {what} to be read; take it out, or write it as a text"


def _read_jsonl(path: Path) -> list[Placed]:
    rows = _whole_list(path) or read_lines(path)
    if not rows or rows[0][1] == []:
        raise InputError(f"data file {path} is empty; it needs one JSON object a line with a prompt")
    return rows


def _whole_list(path: Path) -> list[Placed]:
    """The objects of a .json file that is one list of them; [] for anything else."""
    if path.suffix != ".json":
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        return []  # JSON lines, perhaps
    except (OSError, UnicodeDecodeError):
        return []  # read_lines says why
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {_beyond(error)}") from None
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
        key, given = _key(prompt, _context(row, where)), row.get("id")
    except TypeError as error:  # a data set may hold dates, say
        raise InputError(f"{where}: the prompt holds what JSON has no form for: {error}") from None
    for what, text in (("prompt", key), ("id", str(given))):
        _require_text(text, what, where)
    return Example(str(given) if given is not None else _digits(key), prompt, row)


def _require_text(text: str, what: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the {what} holds half of a surrogate pair, which is no valid text") from None


NOT_GIVEN = {
    *("conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    "sanitize_control_tokens",
}
"""What `chat_template_kwargs` can't hold: the arguments of transformers' apply_chat_template that are set here."""


def _context(row: Row, where: str) -> dict[str, Any]:
    tools, variables = _column(row, "tools", where), _column(row, "chat_template_kwargs", where)
    if not isinstance(tools or [], list) or not all(isinstance(tool, Mapping) for tool in tools or []):
        raise InputError(
            f"{where}: tools must be a list of objects (JSON schemas of functions), or such a list as text"
        )
    if not isinstance(variables or {}, Mapping):
        raise InputError(f"{where}: chat_template_kwargs must be an object, got {type(variables).__name__}")
    if taken := sorted(NOT_GIVEN & set(variables or {})):
        raise InputError(
            f"{where}: chat_template_kwargs can't set {taken[0]}; it holds variables of the template, such as "
            "enable_thinking, and chat_template, the name of one of several templates"
        )
    return {**(variables or {}), **({"tools": tools} if tools else {})}


def _column(row: Row, name: str, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(
            f"{where}: {name} is a text that is no JSON; rename the column if the template is not to see it"
        ) from None


COMPLETION_KEYS = ("completion", "response", "golden_response", "demonstration", "answer")
"""Where a completion may stand, best first: a row with a worked demonstration and a bare answer gives the former."""


DEMONSTRATION_KEYS = ("demonstration", "privileged_context", *(k for k in COMPLETION_KEYS if k != "demonstration"))
"""Where a worked answer may stand that only the teacher sees; privileged_context is TRL's name for it."""


def answer_of(row: Row, where: str) -> Answer:
    """The answer to train on, under one of COMPLETION_KEYS, or the last message where the assistant gives it.

    A key may hold a text, or one assistant message in a list, as TRL's prompt-completion rows do. What such a message
    holds beside a text, such as reasoning_content and tool_calls, is left to the chat template.

    Raises InputError that starts with `where`.
    """
    return _answer(row, where, "completion", COMPLETION_KEYS)


def completion_of(row: Row, where: str) -> str:
    """The text of `answer_of`. Raises InputError that starts with `where`, also for an answer that is more."""
    return _text_alone(answer_of(row, where), "completion", where)


def demonstration_of(row: Row, where: str) -> str:
    """The row's worked answer: a text under one of DEMONSTRATION_KEYS, or as `completion_of` finds it.

    Raises InputError that starts with `where`.
    """
    return _text_alone(_answer(row, where, "demonstration", DEMONSTRATION_KEYS), "demonstration", where)


THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where an assistant's message may hold its thoughts."""


def _text_alone(answer: Answer, what: str, where: str) -> str:
    if isinstance(answer, str):
        return answer
    more = [key for key in (*THOUGHTS, "tool_calls") if answer.get(key)]
    if more:
        raise InputError(
            f"{where}: the {what} has {more[0]}, and it is read as a text here; write that into the content, or leave "
            "it out"
        )
    return text_of(answer)


def _answer(row: Row, where: str, what: str, keys: Sequence[str]) -> Answer:
    key = next((k for k in keys if row.get(k) is not None), None)
    value = row[key] if key else None
    if key is None and _chat(row) is not None:
        key, value = "messages", row["messages"][-1:]
    if key is None:
        raise InputError(
            f"{where}: the row has no {what} (it has: {', '.join(map(str, row)) or 'nothing'}); allowed keys: "
            f"{', '.join(keys)}, or messages that end with the assistant's"
        )
    turn = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) else {}
    if turn.get("role") == "assistant":
        value = _checked_turn(turn, key, where)
    if isinstance(value, Mapping) and turn:
        return value
    if not isinstance(value, str):
        raise InputError(
            f"{where}: {key} must be a text or one assistant message in a list, got {type(value).__name__}"
        )
    if not value.strip():
        raise InputError(f"{where}: the {key} is empty")
    _require_text(value, key, where)
    return value


def _checked_turn(turn: Message, key: str, where: str) -> Answer:
    """An assistant's message as it was given: its text where it holds nothing else.

    A null is a field that the row doesn't have, as for transformers; so is an empty list of calls, which some
    templates refuse.
    """
    said = {name: value for name, value in turn.items() if value is not None and (name, value) != ("tool_calls", [])}
    if isinstance(turn.get("content"), str) and said.keys() <= {"role", "content"}:
        return str(turn["content"])
    _check_content(turn, f"{where}: the {key}")
    _require_text(json.dumps(turn, ensure_ascii=False, default=str), key, where)
    return said


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
        _check_content(message, f"{where}: message {number} ({message['role']})")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's; a prompt ends where the model's answer begins")


def _check_content(message: Message, which: str) -> None:
    """Content is a text or a list of text parts; a turn that calls tools and what a tool gave back may have none."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InputError(
                f"{which} has a part of type {kind}; supported are texts and text parts, "
                '{"type": "text", "text": "…"}'
            )
    texts = [part.get("text") for part in parts] if parts else [content]
    if calls and not (
        isinstance(calls, list)
        and all(isinstance(c, Mapping) and isinstance(c.get("function"), Mapping) for c in calls)
    ):
        raise InputError(f'{which} has tool_calls that are no list of {{"type": "function", "function": {{…}}}}')
    silent = calls or message["role"] in ("tool", "ipython", "function")
    if silent and content in (None, "", []):
        return
    if not all(isinstance(text, str) for text in texts) or not (silent or "".join(map(str, texts)).strip()):
        raise InputError(f"{which} has no text in its content")


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
    distinct = {e.key: e for e in examples}
    count = held_out if held_out is not None else max(1, min(64, len(distinct) // 10))
    if count >= len(distinct):
        raise InputError(
            f"held_out is {count} and there are {len(distinct)} distinct prompts: none is left to train on. "
            "Give more data, a smaller held_out, or eval_data."
        )
    ranked = sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen = set(ranked[:count])
    train = [e for e in examples if e.key not in chosen]
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
    distinct = {e.key: e for e in examples}
    ranked = sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen = set(ranked[:count])
    return [e for key, e in distinct.items() if key in chosen]


def without(examples: Iterable[Example], others: Iterable[Example]) -> list[Example]:
    """The examples whose prompt is not among `others`' prompts."""
    keys = {e.key for e in others}
    return [e for e in examples if e.key not in keys]


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over ids and canonical prompts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\0{example.key}\0".encode())
    return digest.hexdigest()
