"""From prompts to token ids: chat templates and length guards. A prompt is never cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from remend.data import Example, Prompt
from remend.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """A prompt ready for a model: `tokens` end where the answer begins."""

    id: str
    tokens: tuple[int, ...]
    text: str


def render(tokenizer: Any, prompt: Prompt) -> str:
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


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Render and tokenize one example. A template writes its own special tokens; plain text gets the tokenizer's."""
    text = render(tokenizer, example.prompt)
    tokens = list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    if not tokenizer.chat_template and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()  # some tokenizers close plain text, and nothing would be left to answer
    return Encoded(example.id, tuple(tokens), text)


def encode_within(tokenizer: Any, examples: Iterable[Example], limit: int) -> tuple[list[Encoded], list[str]]:
    """Encode examples; those over `limit` tokens are left out and their ids returned: (kept, ids of dropped)."""
    kept, dropped = [], []
    for example in examples:
        encoded = encode(tokenizer, example)
        if len(encoded.tokens) > limit:
            dropped.append(example.id)
        else:
            kept.append(encoded)
    return kept, dropped


def display(prompt: Prompt) -> str:
    """The prompt as one reads it in a report: its text, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])
