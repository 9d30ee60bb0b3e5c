"""Whether a micro-batch's activations fit, or layers must be recomputed in the backward pass."""

from __future__ import annotations

from typing import Any

from remend.models.sizes import FOUR_NORMS, NORMED_HEADS, largest
from remend.recovery.estimate import Train

SHARE = 0.5
"""Of the free memory that activations may take: the estimate leaves out what the allocator wastes."""

STATE_BYTES, COPY_BYTES = 12, 4
"""A trained parameter in float32: its gradient and AdamW's two moments; and one copy of it (the teachers `ema` and
`initial`). None of these exist yet when memory is read."""


def activation_bytes(config: Any, rows: int, tokens: int, itemsize: int = 4, train: Train = "all") -> int:
    """What the backward pass of one micro-batch keeps without recomputation, in bytes; no attention matrix is kept.

    Counted for a block with a gated MLP in float32: of each norm the input, what it is divided into and, where a
    matrix follows, the output; queries, keys, values, attention's output and a number for each head; and four tensors
    of the MLP's width (arXiv 2205.05198, section 4.1, counts 16-bit ones likewise). Norms of queries and keys keep what
    they are given and what it is divided into. A block
    without attention heads is one of states: it keeps four tensors of its width for every number of a state. In a
    hybrid every block is counted as one of both kinds. A token's experts keep four tensors of their width each, and
    its copy and answer.

    Of Llama, Qwen2.5, Qwen3 and Gemma 3 it is what autograd keeps, within 2%. Elsewhere it is no bound: on tiny models
    tensors that autograd kept were 0.2 (Mamba-2) to 1.5 times as much, of Gemma 3n 2.0 and of Qwen3-Next, whose delta
    rule is not counted, 2.9 times.

    Args:
        config: the model's text configuration, or a shape of models.shapes.
        rows: sequences of the micro-batch.
        tokens: its longest sequence, prompt and completion.
        itemsize: bytes of a number of the products; the stream and what norms keep are float32.
        train: what moves. A matrix that stays keeps no input, unless an adapter reads it too, and a norm that stays
            does not keep what it multiplies.
    """
    width, kind = largest(config, "hidden_size"), getattr(config, "model_type", "")
    inner = largest(config, "intermediate_size") or 4 * width
    streams = width * (largest(config, "altup_num_inputs") or 1)
    norms = (4 if kind in FOUR_NORMS else 2) * streams * (1 if train == "adapter" else 2)
    # no matrix follows a norm that stands behind a layer
    each = 3 * inner if train == "norms" else 2 * streams + 4 * inner
    heads = largest(config, "num_attention_heads")
    if heads:
        head = largest(config, "head_dim") or width // heads
        keys = (largest(config, "num_key_value_heads") or heads) * head
        each += 2 * heads * head + 2 * keys + heads
        normed = (1 if train == "adapter" else 2) * (heads * head + keys)
        each += normed if kind in NORMED_HEADS else 0
        scan = largest(config, "mamba_d_ssm") or largest(config, "mamba_expand") * width
        each += 4 * scan * largest(config, "mamba_d_state")
    else:
        each += 4 * inner * largest(config, "state_size")
    expert = largest(config, "moe_intermediate_size") or inner
    each += largest(config, "num_experts_per_tok") * (4 * expert + 2 * width)
    return int((4 * norms + itemsize * each) * largest(config, "num_hidden_layers") * rows * tokens)


def must_recompute(
    config: Any,
    rows: int,
    tokens: int,
    trained: int,
    free: int,
    copies: int = 0,
    itemsize: int = 4,
    train: Train = "all",
) -> bool:
    """Whether a micro-batch's activations take over SHARE of what `free` bytes leave beside the training's state.

    That is the state of so many `trained` parameters, of which teachers keep `copies`; see `activation_bytes`.
    """
    state = (STATE_BYTES + COPY_BYTES * copies) * trained
    return activation_bytes(config, rows, tokens, itemsize, train) > SHARE * (free - state)
