"""From prompts to token ids: chat templates and length guards. A prompt is never cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from remend.data.examples import Example, Prompt, demonstration_of
from remend.data.tokenizer import Tokenizer
from remend.errors import InputError


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
    return [*before, {**last, "content": filled(last["content"])}]


def render(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt as the model sees it: through its chat template where it has one.

    Raises InputError when messages are given and the tokenizer has no chat template, or the template refuses them.
    """
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        raise InputError(
            "the prompt is a list of messages, and the tokenizer has no chat template; give a string instead"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # jinja and template code raise anything
        raise InputError(f"the chat template refuses the messages: {' '.join(str(error).split())[:200]}") from None


def encode(tokenizer: Tokenizer, example: Example) -> Encoded:
    """Render and tokenize one example. A template writes its own special tokens; plain text gets the tokenizer's."""
    text = render(tokenizer, example.prompt)
    tokens = list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    if not tokenizer.chat_template and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()  # some tokenizers close plain text, and nothing would be left to answer
    return Encoded(example.id, tuple(tokens), text)


def encode_within(
    tokenizer: Tokenizer, examples: Iterable[Example], limit: int, *, template: str | None = None
) -> tuple[list[Encoded], list[str]]:
    """Encode examples; those over `limit` tokens are left out and their ids returned: (kept, ids of dropped).

    With a template, each also carries the teacher's prompt with the row's demonstration, which counts for the limit.

    Raises InputError for a row without a demonstration where a template asks for one.
    """
    kept, dropped = [], []
    for example in examples:
        encoded = encode(tokenizer, example)
        if template is not None:
            answer = demonstration_of(example.row, f'row "{example.id}"')
            shown = encode(tokenizer, replace(example, prompt=with_demonstration(example.prompt, answer, template)))
            encoded = replace(encoded, shown=shown.tokens)
        if len(encoded.shown or encoded.tokens) > limit:
            dropped.append(example.id)
        else:
            kept.append(encoded)
    return kept, dropped


def dropped_text(dropped: Sequence[str], total: int, what: str, limit: str) -> str:
    """'3 of 40 training prompts have over max_prompt_tokens = 1024 tokens and are dropped, not cut (a, b, c)'."""
    named = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
    return f"{len(dropped)} of {total} {what} have over {limit} tokens and are dropped, not cut ({named})"


def display(prompt: Prompt) -> str:
    """The prompt as one reads it in a report: its text, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])
