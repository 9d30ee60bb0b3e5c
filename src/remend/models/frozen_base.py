"""A base that no training changes: its linear layers in their files' dtype, and several models over one copy of it.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from remend.models.frozen_linear import FrozenLinear, NarrowLinear
from remend.models.matrices import matrices
from remend.models.protocols import CausalLM


@torch.no_grad()
def narrow(model: CausalLM, dtype: torch.dtype) -> None:
    """Hold the decoder's linear layers in `dtype`, in place, each of them where that rounds nothing.

    Embeddings, head, vectors, and what is no nn.Linear (experts) stay in float32.

    Args:
        model: float32; its linear layers will not be trained.
        dtype: bfloat16 or float16; float32 changes nothing.
    """
    for name, matrix in matrices(model).items() if dtype != torch.float32 else ():
        layer = matrix.module
        if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32:
            continue
        held_OI = layer.weight.to(dtype)
        if torch.equal(held_OI.float(), layer.weight):
            model.set_submodule(name, NarrowLinear(layer, held_OI))


@torch.no_grad()
def widen(model: CausalLM) -> None:
    """Make every frozen layer a plain one again, with a float32 weight of its own, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FrozenLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
            model.set_submodule(name, plain)


def over_the_same_weights(model: CausalLM, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Another model whose weights are those of `model`, in the same memory; its modules and parameters are its own.

    What is put into one of them, an adapter, is not in the other. Vectors are copied, since some adapters bring biases
    of their own; nothing may write into the other weights.

    Args:
        model: float32, with frozen linear layers or without.
        dtype: of the other model. In another one than float32 it has copies of all parameters, and frozen layers are
            multiplied in that dtype, without a copy.
    """
    memo: dict[int, object] = {id(buffer): buffer for buffer in cast(nn.Module, model).buffers()}
    for parameter in model.parameters():
        data = parameter.detach().to(dtype, copy=parameter.ndim < 2)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    other: CausalLM = copy.deepcopy(model, memo)
    return other


def held_in(model: CausalLM) -> str:
    """In what the decoder's matrices are held, in words: dtypes and names of grids, 'float32' for plain ones."""
    layers = [matrix.module for matrix in matrices(model).values()]
    return " and ".join(sorted({m.held_as if isinstance(m, FrozenLinear) else "float32" for m in layers}))
