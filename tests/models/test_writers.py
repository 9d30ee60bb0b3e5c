"""What a block's layers write into the residual stream, and by which way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers.random_text import random_text
from helpers.watching import architecture
from remend.models.activations.passes import start
from remend.models.activations.walkable import blocks_of, modules_of_matrices
from remend.models.activations.writers import Writer, gain_of, sizes, writers_of

TEXT = random_text()[:1]
PLAIN = ["o_proj", "down_proj"]

NORMS = {
    "gemma2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "gemma3-text": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "glm4": ["post_self_attn_layernorm", "post_mlp_layernorm"],
}
BESIDE = {
    "phi": ["dense", "fc2"],
    "gpt-neox": ["dense", "dense_4h_to_h"],
    "falcon": ["dense", "dense_4h_to_h"],
    "cohere": PLAIN,
    "llama": PLAIN,
    "mixtral": ["o_proj", "experts"],
    "deepseek-v3": ["o_proj", "down_proj"],
    "granite": PLAIN,
}


def found(name: str) -> tuple[nn.Module, list[Writer] | None]:
    """The first block and its writers."""
    model = architecture(name)
    blocks = blocks_of(model, [[*TEXT[0].prompt, *TEXT[0].completion]])
    with torch.no_grad():
        probe = start(blocks, TEXT, nullcontext())
        return blocks.items[0], writers_of(blocks.items[0], probe, 0, modules_of_matrices(model))


@pytest.mark.parametrize("name", [*NORMS, *BESIDE])
def test_writers_are_found_with_what_lies_behind_them(name: str) -> None:
    _, writers = found(name)
    assert writers is not None
    given = [writer.given.rpartition(".")[2] for writer in writers]
    assert given == {**NORMS, **BESIDE}[name]
    assert all((writer.offset is not None) == (name in NORMS) for writer in writers)
    assert [round(writer.share, 5) for writer in writers] == [0.22 if name == "granite" else 1] * 2


@pytest.mark.parametrize("name", list(NORMS))
def test_a_norm_divides_by_the_size_and_multiplies_by_the_gain(name: str) -> None:
    block, writers = found(name)
    assert writers
    norm, offset = block.get_submodule(writers[0].given), writers[0].offset
    assert offset == (1.0 if "gemma" in name else 0.0)
    y_ND = 3 * torch.randn(5, gain_of(norm, offset).shape[0])
    assert torch.allclose(norm(y_ND), y_ND / sizes(norm, y_ND) * gain_of(norm, offset), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-next"])
def test_what_is_taken_through_a_gate_is_not_explained(name: str) -> None:
    assert found(name)[1] is None
