"""Rows as other tools have them, brought into remend's shape: a prompt, and the answer where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from remend.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One way in which rows come.

    name: as a user knows it.
    has: whether a row is of it.
    read: the row in remend's shape; what else it holds stays. Raises InputError that says what is wrong.
    plain: its prompts are texts to be continued, without a chat template.
    """

    name: str
    has: Callable[[Row], bool]
    read: Callable[[Row], Row]
    plain: bool = False


SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""Who speaks in ShareGPT's conversations, as a role of a chat."""

LONGEST = 512
"""Characters of a plain text that are its prompt at most."""

SHORTEST = 16
"""Characters of a plain text without blanks at least."""


def _prompt(row: Row) -> Row:
    return {**row, "prompt": _parsed(row["prompt"])}


def _messages(row: Row) -> Row:
    """A chat: its last message is the answer where the assistant gives it."""
    messages = _parsed(row["messages"])
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages must be a list of messages, got {type(messages).__name__}")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        if len(messages) < 2:
            raise InputError("messages holds the assistant's alone; a prompt is what stands before it")
        return {**row, "messages": messages, "prompt": messages[:-1]}
    return {**{k: v for k, v in row.items() if k != "messages"}, "prompt": messages}


def _conversations(row: Row) -> Row:
    """ShareGPT's form: {from, value}, or {role, content}, with the system's text beside it or as its first turn."""
    turns = _parsed(row["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError("conversations must be a list of turns like {from: human, value: …}")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _messages({**{k: v for k, v in row.items() if k != "conversations"}, "messages": messages})


def _turn(turn: Row, number: int) -> Row:
    if "from" not in turn:
        return turn
    if turn["from"] not in SPEAKERS:
        more = " (calls of tools: give messages with tool_calls)" if turn["from"] == "function_call" else ""
        raise InputError(f'turn {number} of conversations is from "{turn["from"]}"{more}; known: {", ".join(SPEAKERS)}')
    return {"role": SPEAKERS[turn["from"]], "content": turn.get("value")}


def _alpaca(row: Row) -> Row:
    """The instruction, and its input two lines below it; `history` holds earlier questions with their answers."""
    asked = [row["instruction"], *([row["input"]] if row.get("input") else [])]
    if not all(isinstance(text, str) for text in asked):
        raise InputError("instruction and input must be texts")
    before = row.get("history") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in before):
        raise InputError("history must be a list of [question, answer]")
    earlier = [
        {"role": role, "content": text}
        for pair in before
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    text = "\n\n".join(asked)
    prompt = [*system, *earlier, {"role": "user", "content": text}] if system or earlier else text
    answer = {"completion": row["output"]} if row.get("output") is not None else {}
    return {**row, "prompt": prompt, **answer}


def _text(row: Row) -> Row:
    """A text to be continued: its first half, at most LONGEST characters and up to a blank, is the prompt."""
    text = row["text"]
    if not isinstance(text, str) or (len(text.split()) < 2 and len(text) < SHORTEST):
        raise InputError(
            f"text must hold at least two words or {SHORTEST} characters: its beginning is the prompt, its rest the "
            "answer"
        )
    lead = len(text) - len(text.lstrip())
    end = lead + min(LONGEST, max(1, (len(text.rstrip()) - lead) // 2))
    blank = max((at for at in range(lead + 1, end + 1) if text[at].isspace()), default=end)
    return {**row, "prompt": text[:blank], "completion": text[blank:]}


def _parsed(value: Any) -> Any:
    """Messages that a table holds as JSON in a text."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ", "[\n"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


PROMPT = "prompt"
"""The name of remend's own shape."""

SHAPES = (
    Shape(PROMPT, lambda row: "prompt" in row, _prompt),
    Shape("messages", lambda row: "messages" in row, _messages),
    Shape("ShareGPT", lambda row: "conversations" in row, _conversations),
    Shape("Alpaca", lambda row: "instruction" in row, _alpaca),
    Shape("plain text", lambda row: "text" in row, _text, plain=True),
)
"""The first that a row has is taken."""

KNOWN = (
    "prompt; prompt and completion; messages; conversations (ShareGPT); instruction, input, output (Alpaca); text "
    "(to be continued)"
)


def shaped(row: object) -> tuple[Shape, Row]:
    """A row in remend's shape. Raises InputError that says what is wrong, without the place."""
    if not isinstance(row, Mapping):
        raise InputError(f'a row must be an object like {{"prompt": "…"}}, got {type(row).__name__}')
    for shape in SHAPES:
        if shape.has(row):
            return shape, shape.read(row)
    raise InputError(
        f'the row has no "prompt" (it has: {", ".join(map(str, row)) or "nothing"}). Known shapes: {KNOWN}. Anything '
        "else needs a mapping, as in columns: {prompt: question, completion: answer}"
    )
