"""What a run would train on, as the model will read it: some prompts of each stream, and where training begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from remend.data.examples import Example
from remend.data.templates import Encoded, encode
from remend.models.protocols import Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.recovery.plan import Plan
from remend.recovery.prompts import StreamData
from remend.recovery.streams import Stream

SHOWN = 3
"""Prompts that are shown in all, as long as each stream has one."""

LONGEST = 96
"""Tokens of a text that are shown; of a longer one the middle is left out."""

STANDS_FOR = Example("(one)", "(a prompt that the reference writes)", {})
"""Shown where the reference has yet to write the prompts: the chat template around them is known."""


@dataclass(frozen=True)
class Piece:
    """A stretch of tokens as text, special tokens included.

    trained: the loss is taken at them.
    left_out: they stand for so many tokens that are not shown; 0 for text.
    """

    text: str
    trained: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt as the student reads it.

    id: of its row; tokens: of the prompt alone.
    pieces: the prompt, and the answer where one is stored already.
    answer: what follows, in words; "" where the answer is among the pieces.
    teacher: what the teacher reads in its place, where it is shown more.
    """

    id: str
    tokens: int
    pieces: Sequence[Piece]
    answer: str
    teacher: Sequence[Piece] = ()


@dataclass(frozen=True)
class StreamPreview:
    """Of one stream: how many prompts it trains on (None where they are yet to be written), and some of them."""

    name: str
    prompts: int | None
    shown: Sequence[ShownPrompt]


def previews(plan: Plan) -> list[StreamPreview]:
    """Each stream of a plan, with its first prompts in the order of the data."""
    each = max(1, SHOWN // len(plan.prompts.streams))
    return [_preview(plan, data, each) for data in plan.prompts.streams]


def _preview(plan: Plan, data: StreamData, count: int) -> StreamPreview:
    stream, tokenizer = data.stream, plan.tokenizer
    brought = plan.teachers[stream.teacher.name].brings()
    if brought is not None:
        shown = [_stored(tokenizer, rollout, stream) for rollout in brought[0][:count]]
        return StreamPreview(stream.name, len(brought[0]), shown)
    follows = _answer(plan, stream)
    if data.unwritten:
        shown = [_asked(tokenizer, encode(tokenizer, STANDS_FOR), follows)]
        return StreamPreview(stream.name, None, [replace(one, tokens=0) for one in shown])
    return StreamPreview(
        stream.name, len(data.train), [_asked(tokenizer, prompt, follows) for prompt in data.train[:count]]
    )


def _asked(tokenizer: Tokenizer, prompt: Encoded, answer: str) -> ShownPrompt:
    teacher = cut(tokenizer, prompt.shown) if prompt.shown else ()
    return ShownPrompt(prompt.id, len(prompt.tokens), cut(tokenizer, prompt.tokens), answer, teacher)


def _stored(tokenizer: Tokenizer, rollout: Rollout, stream: Stream) -> ShownPrompt:
    """A prompt with the answer that its teacher brought along."""
    skipped, rest = rollout.completion[: stream.skip_first], rollout.completion[stream.skip_first :]
    pieces = [
        *cut(tokenizer, rollout.prompt),
        *cut(tokenizer, skipped),
        *(replace(piece, trained=bool(stream.weight)) for piece in cut(tokenizer, rest)),
    ]
    return ShownPrompt(rollout.id, len(rollout.prompt), pieces, "")


def cut(tokenizer: Tokenizer, tokens: Sequence[int], longest: int = LONGEST) -> list[Piece]:
    """Tokens as text with special ones in it; of more than `longest` the first and the last half, and how many lie
    between."""
    if not tokens:
        return []
    if len(tokens) <= longest:
        return [Piece(_text(tokenizer, tokens))]
    half = longest // 2
    ends = _text(tokenizer, tokens[:half]), _text(tokenizer, tokens[-half:])
    return [Piece(ends[0]), Piece("", left_out=len(tokens) - 2 * half), Piece(ends[1])]


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens. What would move a terminal's cursor or change its colours is replaced."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _answer(plan: Plan, stream: Stream) -> str:
    """Who answers a prompt of the stream, how long, and which of the answer's tokens are trained on."""
    first, last = stream.lengths
    length = f"up to {last} tokens" if first == last else f"up to {first} tokens at first and {last} at the end"
    if stream.on_policy == 1:
        who = "the student's answer"
    elif stream.on_policy == 0:
        who = "the teacher's answer"
    else:
        who = f"the student's answer ({stream.on_policy:.0%} of the time, else the teacher's)"
    if stream.on_policy and plan.config.bootstrap != "off":
        who += ", in the first steps the teacher's"
    if not stream.weight:
        return f"{who} follows, {length}; none of it is trained on (weight 0)"
    if stream.skip_first:
        return f"{who} follows, {length}; it is trained on but for its first {stream.skip_first} tokens"
    return f"{who} follows, {length}; all of it is trained on"
