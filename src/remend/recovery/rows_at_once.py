"""How many rows are sampled at once: what the free memory has room for.

A row draws from its own seed, so its answer follows from its prompt. But products of other numbers of rows may be
summed in another order, which can turn one token into another: hardly ever in float32, often in bfloat16. So the number
is settled once, when a run begins, and stands in its manifest: a resumed run keeps it, whatever is free then.
"""

from __future__ import annotations

from remend.models.sampling.transformers_engine import ROWS
from remend.models.sizes import Size
from remend.recovery.estimate import Facts, tokens_of
from remend.recovery.footprint import moment_bytes
from remend.recovery.memory import COPY_BYTES

SHARE = 0.25
"""Of the free memory that one batch of rows may take: the estimate leaves out what the allocator wastes."""

GPU_ROWS = 512
"""On a GPU at most; a CPU samples more than ROWS hardly faster."""

LOGIT_BYTES = 24
"""Of one token of the vocabulary while a row's next one is drawn: logits, as float32, shares, and float64 sums."""

GROWTH = 1.5
"""A key-value cache that is full grows by half."""


def bytes_of_row(size: Size, tokens: int, activation: int) -> int:
    """What one row takes while it is sampled, in bytes: its keys and values in float32, a block's states, its logits.

    Args:
        size: of the model.
        tokens: of prompt and answer.
        activation: bytes that all blocks keep of a token in a backward pass; sampling has those of one block alone.
    """
    block = activation // max(1, size.layers)
    return int(tokens * (GROWTH * 4 * size.cached + block) + LOGIT_BYTES * size.vocabulary)


def rows_that_fit(free: int, each: int, most: int) -> int:
    """The largest power of two, from 1 to `most`, so that rows of `each` bytes take SHARE of `free` at most.

    A power of two, so that runs which find nearly as much memory free take as many rows.
    """
    rows = most
    while rows > 1 and rows * each > SHARE * free:
        rows //= 2
    return rows


def rows_at_once(facts: Facts, free: int) -> int:
    """For a run of these facts, whose models are loaded and leave `free` bytes. Training's own state is left room for:
    a gradient, moments and teachers' copies of what is trained, and masters."""
    state = COPY_BYTES * ((1 + facts.copies) * facts.trained + facts.held) + moment_bytes(facts)
    largest = max((facts.student, facts.reference or facts.student), key=lambda size: size.cached)
    tokens = max(tokens_of(facts).longest, *(round(s.shown) + s.answer for s in facts.streams))
    each = bytes_of_row(largest, tokens, facts.activation)
    return rows_that_fit(free - state, each, ROWS if facts.device == "cpu" else GPU_ROWS)
