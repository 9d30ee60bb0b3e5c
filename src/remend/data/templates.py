"""From prompts to token ids: chat templates and length guards. A prompt is never cut."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from remend.data.bounded_templates import Unbounded, bounded
from remend.data.examples import Example, Message, Prompt, demonstration_of, text_of
from remend.data.tokenizer import Tokenizer
from remend.errors import InputError

Context = Mapping[str, Any]
"""What a chat template is given beside the messages: tools, and variables of its own."""

NAMED = 50
"""Rows that one message names at most."""

PROBE = "4815162342"
"""A text that no template changes by trimming or capitals."""


@dataclass(frozen=True)
class Encoded:
    """A prompt ready for a model: `tokens` end where the answer begins.

    `shown` is the teacher's prompt where that one sees more, None where it sees the same.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    shown: tuple[int, ...] | None = None


DEMONSTRATION = """{prompt}

Here is one worked answer, as an example of a good response:

{demonstration}

Now answer the question yourself, in your own words, with your own reasoning."""
"""What a teacher is told beyond the question (after SDFT, arXiv 2601.19897); a recipe may replace it."""


def with_demonstration(prompt: Prompt, demonstration: str, template: str = DEMONSTRATION) -> Prompt:
    """The teacher's prompt: the user's last message, or the text, with the worked answer put in by the template.

    Raises InputError when the messages end with no user's.
    """

    def filled(text: str) -> str:
        # not str.format: braces in a prompt are text
        return template.replace("{prompt}", "\0p").replace("{demonstration}", demonstration).replace("\0p", text)

    if isinstance(prompt, str):
        return filled(prompt)
    *before, last = prompt
    if last["role"] != "user":
        raise InputError(f"a demonstration goes into the user's message, and the prompt ends with the {last['role']}'s")
    text = filled(text_of(last))
    return [
        *before,
        {**last, "content": text if isinstance(last["content"], str) else [{"type": "text", "text": text}]},
    ]


def template_text(tokenizer: Tokenizer) -> str:
    """The chat template as one text; of several named ones as JSON, "" where there is none."""
    template = tokenizer.chat_template or ""
    return template.strip() if isinstance(template, str) else json.dumps(template, sort_keys=True)


def turns(prompt: Prompt) -> list[Message]:
    """The prompt as messages: a text is one user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def render(tokenizer: Tokenizer, prompt: Prompt, context: Context = MappingProxyType({})) -> str:
    """The prompt as the model sees it: through its chat template where it has one.

    Args:
        context: what the template is given beside the messages; see Example.context.

    Raises InputError when messages or tools are given and the tokenizer has no chat template, when the template
    refuses the messages, and when it shows nothing of the last one, of a tool call or of the tools.
    """
    if not tokenizer.chat_template:
        if "tools" in context:
            raise InputError("the row has tools, and the tokenizer has no chat template that could show them")
        if isinstance(prompt, str):
            return prompt
        raise InputError(
            "the prompt is a list of messages, and the tokenizer has no chat template; give a string instead"
        )
    messages = turns(prompt)
    text = conversation(tokenizer, messages, context, prompting=True)
    *before, last = messages
    other = {**last, "content": PROBE}
    if not shows(text, text_of(last)) and _same(tokenizer, [*before, other], context, text):
        raise InputError(f"the chat template shows nothing of the last message ({last['role']})")
    if "tools" in context and _same(tokenizer, messages, {**context, "tools": None}, text):
        raise InputError(
            "the chat template shows no tools, and the row has some; use a model whose template does, or leave them out"
        )
    for number, message in enumerate(messages, start=1):
        if not all(shows(text, name) for name in called(message)):
            raise InputError(f"the chat template does not show the tool calls of message {number} ({message['role']})")
    return text


def _same(tokenizer: Tokenizer, messages: Sequence[Message], context: Context, text: str) -> bool:
    """Whether the template writes `text` of these messages too."""
    try:
        return conversation(tokenizer, messages, context, prompting=True) == text
    except InputError:
        return False


def conversation(tokenizer: Tokenizer, messages: Sequence[Message], context: Context, *, prompting: bool) -> str:
    """What the chat template writes of messages; `prompting` opens the assistant's next turn.

    A content of one text part is given as its text where the template takes texts alone.

    Raises InputError where the template refuses the messages, or has no place for their parts.
    """
    name, known = context.get("chat_template"), tokenizer.chat_template
    if isinstance(name, str) and "{" not in name and not (isinstance(known, dict) and name in known):
        names = ", ".join(known) if isinstance(known, dict) else "none: it has one without a name"
        raise InputError(f'chat_template is "{name}", and the tokenizer has no template of that name (it has: {names})')

    def by_template(given: Sequence[Message]) -> str:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=prompting, **context))

    def written(given: Sequence[Message]) -> str:
        try:
            return bounded(template_text(tokenizer), lambda: by_template(given))
        except Unbounded:
            raise
        except Exception as error:  # jinja and template code raise anything
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the chat template refuses the messages: {reason}") from None

    parted = [message for message in messages if isinstance(message.get("content"), list)]
    if not parted:
        return written(messages)
    try:
        text = written(messages)
        parts = [part for message in parted for part in message["content"]]
        as_code = any(code in text for part in parts for code in (repr(part), json.dumps(part, ensure_ascii=False)))
        if not as_code and all(shows(text, part["text"]) for part in parts):
            return text
    except InputError:
        pass
    if any(len(message["content"]) > 1 for message in parted):
        raise InputError("the chat template takes a content that is one text; join the text parts of the messages")
    return written([{**m, "content": text_of(m)} if m in parted else m for m in messages])


def shows(text: str, what: str) -> bool:
    """Whether a rendered text holds another one, in whatever case and with whatever blanks."""
    return squashed(what) in squashed(text)


def squashed(text: str) -> str:
    """A text without what templates change by trimming and capitals."""
    return "".join(text.split()).casefold()


def called(message: Message) -> list[str]:
    """The names of the tools that a message calls."""
    return [str(call["function"].get("name", "")) for call in message.get("tool_calls") or []]


def writes_the_time(tokenizer: Tokenizer, example: Example) -> bool:
    """Whether the prompt of another moment would read otherwise, as with templates that write today's date."""
    if example.plain or "strftime_now" not in template_text(tokenizer):
        return False
    try:  # a template that asks for the time fails where the clock is a text
        render(tokenizer, example.prompt, {**example.context, "strftime_now": "no clock"})
    except InputError:
        return True
    return False


def token_hash(prompts: Iterable[Encoded]) -> str:
    """SHA-256 of prompts as they are shown, token by token."""
    return hashlib.sha256(json.dumps([(p.id, p.tokens, p.shown) for p in prompts]).encode()).hexdigest()


def for_row(tokenizer: Tokenizer, example: Example) -> Tokenizer:
    """The tokenizer for an example: without a chat template where the prompt is a text to be continued."""
    if not example.plain or not tokenizer.chat_template:
        return tokenizer
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    return bare


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Render and tokenize one example. A template writes its own special tokens; plain text gets the tokenizer's."""
    tokenizer = for_row(tokenizer, example)
    text = render(tokenizer, example.prompt, example.context)
    return Encoded(example.id, tokenized(tokenizer, text), text)


def tokenized(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """A rendered text as token ids, open at its end."""
    tokens = list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    if not tokenizer.chat_template and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()  # some tokenizers close plain text, and nothing would be left to answer
    return tuple(tokens)


def encode_within(
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    limit: int,
    *,
    template: str | None = None,
    rows: int | None = None,
) -> tuple[list[Encoded], list[str]]:
    """Encode examples; those over `limit` tokens are left out and their ids returned: (kept, ids of dropped).

    With a template, each also carries the teacher's prompt with the row's demonstration, which counts for the limit.

    Args:
        rows: of the model's embedding, where they are known: a token beyond them can't be read.

    Raises InputError that names every row that can't be rendered, has no tokens, or has some beyond `rows`; and for a
    row without a demonstration where a template asks for one.
    """
    kept, dropped, refused = [], [], Refused()
    for example in examples:
        with refused.collecting(example.id):
            encoded = encode(tokenizer, example)
            if template is not None:
                answer = demonstration_of(example.row, f'row "{example.id}"')
                shown = encode(tokenizer, replace(example, prompt=with_demonstration(example.prompt, answer, template)))
                encoded = replace(encoded, shown=shown.tokens)
            require_readable(tokenizer, (*encoded.tokens, *(encoded.shown or ())), rows)
            if len(encoded.shown or encoded.tokens) > limit:
                dropped.append(example.id)
            else:
                kept.append(encoded)
    refused.raise_all()
    return kept, dropped


@dataclass
class Refused:
    """Rows that can't be used, by reason."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def collecting(self, name: str) -> Iterator[None]:
        """Note the row if the block raises InputError."""
        try:
            yield
        except InputError as error:
            self.rows.setdefault(str(error), []).append(name)

    def raise_all(self) -> None:
        """Raise one InputError with a line for every reason."""
        if self.rows:
            raise InputError("\n".join(f"{row_names(names)}: {reason}" for reason, names in self.rows.items()))


def row_names(names: Sequence[str]) -> str:
    """'row a' or 'rows a, b, c'; of very many the first ones, and how many there are."""
    shown = ", ".join(names[:NAMED]) + (f", … ({len(names)} in all)" if len(names) > NAMED else "")
    return f"{'row' if len(names) == 1 else 'rows'} {shown}"


def require_readable(tokenizer: Tokenizer, tokens: Sequence[int], rows: int | None) -> None:
    """Raise InputError for no tokens at all, and for a token that the model's embedding has no row for."""
    if not tokens:
        raise InputError(
            "the tokenizer makes no tokens of the prompt, so nothing predicts the answer; take the row out"
        )
    beyond = next((token for token in tokens if rows is not None and token >= rows), None)
    if beyond is not None:
        raise InputError(
            f"the text holds {tokenizer.decode([beyond])!r}, which is token {beyond}, and the model has rows for "
            f"{rows} tokens; use the tokenizer that it was trained with, or resize its embeddings"
        )


def dropped_text(dropped: Sequence[str], total: int, what: str, limit: str) -> str:
    """'3 of 40 training prompts have over max_prompt_tokens = 1024 tokens and are dropped, not cut (a, b, c)'."""
    named = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
    return f"{len(dropped)} of {total} {what} have over {limit} tokens and are dropped, not cut ({named})"


def display(prompt: Prompt) -> str:
    """The prompt as one reads it in a report: its text, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    return text_of(next((m for m in reversed(prompt) if m["role"] == "user"), prompt[-1]))
