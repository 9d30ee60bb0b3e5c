"""Layers that hold codes give what the dense layers give, in every bit and for every format, in few bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import SKIPPED, build_model, put_on_grid
from remend.compression.formats import GridFormat
from remend.compression.grids import decode, quantize
from remend.compression.packed_linear import CHUNK, PackedLinear, pack_layers
from remend.errors import InputError
from remend.models import adapters
from remend.models.frozen_base import held_in, over_the_same_weights, widen

TOKENS = torch.arange(3, 23).reshape(2, 10)
FORMATS = ["int2-g32", "int3-g64-sym", "int4-g32-sym", "int4-g64-zp", "int8-g32-sym", "gguf:q4_0", "gguf:q4_1"]
FORMATS += ["gguf:q5_0", "gguf:q8_0", "gguf:mxfp4", "mxfp4", "nvfp4", "nf4", "fp8-e4m3"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_grids_in_every_bit_and_takes_its_bits(name: str) -> None:
    fmt, rows = GridFormat.parse(name), CHUNK // 64 + 3  # more than one chunk
    weight_OI = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1))
    codes, grid = quantize(weight_OI, fmt)
    layer = PackedLinear(nn.Linear(128, rows, device="meta"), codes, grid, fmt)
    wanted = decode(codes, grid, fmt)
    assert layer.weight.equal(wanted)
    assert layer.dense(torch.bfloat16).equal(wanted.bfloat16())
    held = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    stored = 4 if fmt.bits <= 4 else 8  # of a code: two in a byte, or one
    zeros = 0 if fmt.zero is None else 8 * fmt.zero.itemsize
    shared = (8 * fmt.scale.itemsize + zeros) / (fmt.group or 128)
    assert held == pytest.approx(weight_OI.numel() * (stored + shared) / 8, abs=4)


def test_a_row_of_an_odd_length_is_held_too() -> None:
    fmt = GridFormat.parse("fp8-e4m3")
    codes, grid = quantize(torch.randn(4, 7), fmt)
    layer = PackedLinear(nn.Linear(7, 4), codes, grid, fmt)
    assert layer.weight.equal(decode(codes, grid, fmt))


def pair(name: str) -> tuple[Any, Any]:
    """A model on a grid, dense and packed."""
    dense, packed = (build_model(72).requires_grad_(False) for _ in range(2))
    put_on_grid(dense, name)
    pack_layers(packed, put_on_grid(packed, name))
    return dense, packed


def gradients(model: Any) -> dict[str, Tensor]:
    adapters.add_lora(model, rank=2, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    model(TOKENS).logits.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["int4-g32-sym", "nf4"])
@pytest.mark.parametrize("mixed", [False, True])
def test_logits_and_gradients_are_those_of_the_dense_model(name: str, mixed: bool) -> None:
    dense, packed = pair(name)
    assert held_in(packed) == f"float32 and {name}"  # one layer is off the grid
    assert type(packed.get_submodule(SKIPPED)) is nn.Linear
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert dense(TOKENS).logits.equal(packed(TOKENS).logits)
        wanted, got = gradients(dense), gradients(packed)
    assert wanted.keys() == got.keys()
    assert all(wanted[name].equal(got[name]) for name in wanted)
    assert not any(name.endswith("base_layer.weight") for name, p in packed.named_parameters() if "up_proj" not in name)


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    _, packed = pair("int4-g32-sym")
    # without the shape of the layer that is off the grid and plain, whose weight autograd does keep
    shapes = {tuple(m.outline.shape) for m in packed.modules() if isinstance(m, PackedLinear)} - {(128, 64)}
    adapters.add_lora(packed, rank=2)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed(TOKENS).logits.sum()
    assert kept
    assert len(shapes) == 3
    assert not shapes & {*kept, *(shape[::-1] for shape in kept)} - {(64, 128)}


def test_the_same_codes_serve_another_model_and_wide_again_they_are_dense() -> None:
    dense, packed = pair("int4-g32-sym")
    other = over_the_same_weights(packed)
    theirs = dict(other.named_buffers())
    assert all(buffer.data_ptr() == theirs[name].data_ptr() for name, buffer in packed.named_buffers())
    assert other(TOKENS).logits.equal(dense(TOKENS).logits)
    widen(other)
    ours, wanted = other.state_dict(), dense.state_dict()
    assert ours.keys() == wanted.keys()
    assert all(ours[name].equal(wanted[name]) for name in wanted)


def test_weights_off_the_grid_are_refused() -> None:
    model = build_model(72)
    stored = put_on_grid(model, "int4-g32-sym")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight does not lie on its grid"):
        pack_layers(model, stored)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
