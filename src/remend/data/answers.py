"""A prompt with the answer that is trained on, tokenized as one text, as the chat template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

from remend.data.examples import THOUGHTS, Answer, Example, Message, text_of
from remend.data.templates import (
    PROBE,
    Context,
    called,
    conversation,
    for_row,
    render,
    shows,
    squashed,
    template_text,
    tokenized,
    turns,
)
from remend.data.tokenizer import Tokenizer
from remend.errors import InputError
from remend.files.reading import parsed

OPENERS = ("<think>", "[THINK]")
"""What opens a block of thoughts."""

_TAG = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")

SWITCHES = ("enable_thinking", "thinking", "clear_thinking", "preserve_thinking")
"""Variables by which templates show or hide such a block."""

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, and of the completion that is trained on."""


def ending(tokenizer: Tokenizer, eos: Sequence[int]) -> tuple[int, ...]:
    """The token that closes an answer: what the chat template writes after one, else the tokenizer's own.

    Args:
        tokenizer: with or without a chat template.
        eos: the ids at which sampling ends; a template's ending counts only if it is one of them.
    """
    if tokenizer.chat_template:
        try:
            rest = _written_after(tokenizer, [{"role": "user", "content": "a"}], {})
        except InputError:  # a template may want a system turn; its rows have one
            rest = ""
        closing = next((t for t in tokenizer.encode(rest, add_special_tokens=False) if t in eos), None)
        if closing is not None:
            return (int(closing),)
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def with_answer(tokenizer: Tokenizer, example: Example, answer: Answer, eos: Sequence[int]) -> Pair:
    """A prompt and its answer up to and including the token that ends it, parted where the rendered prompt ends.

    With a chat template these are the tokens of the whole conversation as it writes it; without one, of prompt and
    answer joined by a space, unless either brings its own. Where the border falls into a token, that token belongs to
    the completion. An ending that the template does not write is added.

    Raises InputError where the template refuses the conversation, shows the answer otherwise than the prompt opens it,
    or leaves some of it out.
    """
    tokenizer = for_row(tokenizer, example)
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not tokenizer.chat_template:
        prompt, text = render(tokenizer, example.prompt, example.context), _plain(answer)
        joint = "" if prompt[-1:].isspace() or text[:1].isspace() else " "
        asked, tokens = tokenized(tokenizer, prompt), tokenized(tokenizer, prompt + joint + text)
        start = _common(asked, tokens)
        return asked[:start], (*tokens[start:], *own)
    context = example.context
    turn: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    prompt = render(tokenizer, example.prompt, context)
    whole = conversation(tokenizer, [*turns(example.prompt), turn], context, prompting=False)
    why = _unlike(prompt, whole, turn)
    if why:
        raise InputError(f"{why}. {_help(tokenizer, example, turn)}")
    rest = _written_after(tokenizer, turns(example.prompt), context)
    closings = sum(token in eos for token in tokenizer.encode(rest, add_special_tokens=False))
    if not closings and rest:
        whole = whole.removesuffix(rest)
    asked, tokens = tokenized(tokenizer, prompt), tokenized(tokenizer, whole)
    start = _common(asked, tokens)
    completion = tokens[start:]
    if not closings:
        return asked[:start], (*completion, *own)
    ends = [at for at, token in enumerate(completion, start=1) if token in eos]
    if len(ends) < closings:
        raise InputError(f"the chat template writes no token after the answer at which sampling ends: {whole[-100:]!r}")
    return asked[:start], completion[: ends[-closings]]


def _plain(answer: Answer) -> str:
    if isinstance(answer, str):
        return answer
    more = [key for key in (*THOUGHTS, "tool_calls") if answer.get(key)]
    if more:
        raise InputError(f"the answer has {more[0]}, and the tokenizer has no chat template that could show it")
    return text_of(answer)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many leading tokens, or characters, two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _written_after(tokenizer: Tokenizer, messages: Sequence[Message], context: Context) -> str:
    """What the template writes after the content of an answer to these messages."""
    text = conversation(tokenizer, [*messages, {"role": "assistant", "content": PROBE}], context, prompting=False)
    return text.rpartition(PROBE)[2] if PROBE in text else ""


def _unlike(prompt: str, whole: str, turn: Message) -> str:
    """Why the conversation is not the prompt with its answer; "" where it is."""
    if not whole.startswith(prompt):
        at = _common(prompt, whole)
        return (
            "the chat template opens an answer otherwise than it shows one: the prompt ends in "
            f"{prompt[max(0, at - 40) :]!r}, and the conversation goes on {whole[max(0, at - 40) : at + 60]!r}"
        )
    said = text_of(turn)
    given = {"content": said, **{key: turn[key] for key in THOUGHTS if isinstance(turn.get(key), str)}}
    for key, text in given.items():
        # the prompt may open the block of thoughts that the answer begins with
        after = whole[len(prompt) - min(64, len(text), len(prompt)) :]
        if not shows(after, text):
            return f"the chat template does not show all of the answer's {key}, {text[:100]!r}: it writes {after!r}"
    rest = whole[len(prompt) :]
    if not _shows_calls(rest, list(given.values()), turn):
        return f"the chat template does not show the answer's tool calls: it writes {rest!r}"
    near = squashed(whole[max(0, len(prompt) - 24) :])
    doubled = next(
        (o for o in OPENERS if squashed(said).count(o.casefold()) not in (0, near.count(o.casefold()))), None
    ) or next(filter(None, (_opened_twice(whole[max(0, len(prompt) - 64) :], text) for text in given.values())), None)
    if doubled:
        return f"the chat template writes {doubled} beside the answer's own: {after[:200]!r}"
    return ""


def _opened_twice(written: str, text: str) -> str | None:
    """The tag that a text begins with, where the same one stands in front of it already, open or as an empty block."""
    tag = _TAG.match(text.lstrip())
    if tag is None:
        return None
    before = squashed(written).rpartition(squashed(text))[0]
    twice = re.search(f"{re.escape(squashed(tag[0]))}({_TAG.pattern})?$", before)
    return tag[0] if twice else None


def _shows_calls(written: str, texts: Sequence[str], turn: Message) -> bool:
    """Whether the names and arguments of a message's tool calls are written, and not only by its texts."""
    rest = squashed(written)
    for text in texts:
        rest = rest.replace(squashed(text), "", 1)
    bare = _bare(rest)

    def shown(value: object) -> bool:
        if isinstance(value, Mapping):
            return all(map(shown, value.values()))
        if isinstance(value, list):
            return all(map(shown, value))
        forms = (str(value), json.dumps(value, ensure_ascii=False, default=str), json.dumps(value, default=str))
        return value is None or any(_bare(form) in bare for form in forms)  # tables fill up arguments with nulls

    arguments = [call["function"].get("arguments") or {} for call in turn.get("tool_calls") or []]
    return all(shows(rest, name) for name in called(turn)) and all(shown(a) or shown(_parsed(a)) for a in arguments)


def _bare(text: str) -> str:
    """A text without what quoting adds."""
    return squashed(text.translate({ord(c): None for c in "\\\"'"}))


def _parsed(arguments: object) -> object:
    """Arguments that are given as JSON in a text."""
    try:
        return parsed(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _help(tokenizer: Tokenizer, example: Example, turn: Message) -> str:
    """The template's variables under which prompt and answer would fit."""
    names = [name for name in SWITCHES if name in template_text(tokenizer)]
    for variables in ({name: value} for name in names for value in (False, True)):
        context = {**example.context, **variables}
        try:
            prompt = render(tokenizer, example.prompt, context)
            whole = conversation(tokenizer, [*turns(example.prompt), turn], context, prompting=False)
        except InputError:
            continue
        if not _unlike(prompt, whole, turn):
            return f'Give the rows "chat_template_kwargs": {json.dumps(variables)}, with which they fit'
    return (
        "No chat_template_kwargs are known that would help; give answers in the form that the template shows, with the "
        "thoughts that it opens or without those that it drops, or change the model's chat template"
    )
