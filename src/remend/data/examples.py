"""Prompts with their rows, validated one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from remend.data.shapes import shaped
from remend.data.sources import Columns, Problems, read_lines, read_rows
from remend.errors import InputError
from remend.files.atomic import JsonRow

Message = Mapping[str, Any]
"""A chat message as templates take it: role, content (a text, or a list of text parts), and what else they show."""

Prompt = str | Sequence[Message]

Answer = str | Message
"""What is trained on: a text, or the assistant's message where that holds more (thoughts, tool calls, parts)."""

Row = JsonRow
"""One row of a data file: columns of any kind that JSON has."""

Convert = Callable[[Row], Sequence[Row]]


@dataclass(frozen=True)
class Example:
    """One prompt: a user's text, or a list of chat messages ({role, content}).

    shape: how the row came, see remend.data.shapes; plain: the prompt is a text to be continued, without a template.
    """

    id: str
    prompt: Prompt
    row: Row
    shape: str = "prompt"
    plain: bool = False

    @property
    def context(self) -> Mapping[str, Any]:
        """What the chat template is given beside the messages: the row's `tools` and its `chat_template_kwargs`."""
        return _context(self.row, f'row "{self.id}"')

    @property
    def key(self) -> str:
        """`prompt_key`, with the context where there is some."""
        return _key(self.prompt, self.context, self.plain)


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


def _key(prompt: Prompt, context: Mapping[str, Any], plain: bool) -> str:
    more = {**context, **({"plain": True} if plain else {})}
    return prompt_key(prompt) + (json.dumps(more, sort_keys=True, ensure_ascii=False) if more else "")


def load_examples(source: str, convert: Convert | None = None, *, columns: Columns | None = None) -> list[Example]:
    """Read prompts from a file, a folder or an id of the hub; see remend.data.sources and remend.data.shapes.

    Args:
        source: where the rows are.
        convert: makes rows with a prompt of each row that is read, none where it is to be left out.
        columns: the data's names for columns that are read under another one.

    Raises:
        FileError: the file can't be read, or the data set can't be fetched.
        InputError: rows that can't be used, up to 20 of them by file and line.
    """
    return [example for _, example in _load(source, convert, columns)]


def load_pairs(source: str, *, columns: Columns | None = None) -> list[tuple[Example, Answer]]:
    """Read prompts with their completions, as `load_examples` does; see `answer_of` for where they stand.

    Raises:
        FileError, InputError: as `load_examples`; rows have no usable completion.
    """
    pairs, problems = [], Problems([])
    for where, example in _load(source, None, columns):
        try:
            pairs.append((example, answer_of(example.row, where)))
        except InputError as error:
            problems.lines.append(str(error))
    problems.raise_all()
    return pairs


def shapes_text(examples: Sequence[Example]) -> str:
    """How the rows came, as "40 rows, ShareGPT"."""
    counts = Counter(example.shape for example in examples)
    return "; ".join(f"{count} {'row' if count == 1 else 'rows'}, {shape}" for shape, count in counts.items())


def _load(source: str, convert: Convert | None, columns: Columns | None) -> list[tuple[str, Example]]:
    rows = read_rows(source, columns)
    if convert is not None:
        rows = [(where, made) for where, row in rows for made in convert(row)]
    if not rows:
        raise InputError(f"data {source} has no rows; it needs some with a prompt")
    examples: dict[str, tuple[str, Example]] = {}
    placed, problems = [], Problems([])
    for where, row in rows:
        try:
            example = example_of(row, where)
        except InputError as error:
            problems.lines.append(str(error))
            continue
        before, same = examples.setdefault(example.id, (where, example))
        if same.key != example.key:
            problems.lines.append(f'{where}: the id "{example.id}" stands for another prompt already ({before})')
        placed.append((where, example))
    problems.raise_all()
    return placed


def example_of(row: object, where: str) -> Example:
    """Validate one row of any shape. Raises InputError that starts with `where`."""
    try:
        shape, row = shaped(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt is empty")
    elif isinstance(prompt, Sequence):
        _validate_messages(prompt, where)
    else:
        raise InputError(f"{where}: prompt must be a string or a list of messages, got {type(prompt).__name__}")
    try:
        key, given = _key(prompt, _context(row, where), shape.plain), row.get("id")
    except TypeError as error:  # a data set may hold dates, say
        raise InputError(f"{where}: the prompt holds what JSON has no form for: {error}") from None
    for what, text in (("prompt", key), ("id", str(given))):
        _require_text(text, what, where)
    return Example(str(given) if given is not None else _digits(key), prompt, row, shape.name, shape.plain)


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
    if key is None and (last := _last_turn(row)):
        key, value = "messages", [last]
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


def _last_turn(row: Row) -> Message | None:
    """The assistant's message that ends a row's conversation, None where none does."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    return last if isinstance(last, Mapping) and last.get("role") == "assistant" else None


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
    count = held_out_count(held_out, len(distinct))
    if count >= len(distinct):
        prompts = "prompt" if len(distinct) == 1 else "prompts"
        raise InputError(
            f"held_out is {count}, and the data have {len(distinct)} distinct {prompts} (rows: {len(examples)}): none "
            "is left to train on. Give more data, a smaller held_out, or eval_data."
        )
    ranked = sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen = set(ranked[:count])
    train = [e for e in examples if e.key not in chosen]
    return train, [distinct[key] for key in ranked[:count]]


def held_out_count(held_out: int | None, distinct: int) -> int:
    """How many of so many distinct prompts are set apart; None is the smaller of 64 and 10% (at least 1)."""
    return held_out if held_out is not None else max(1, min(64, distinct // 10))


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
