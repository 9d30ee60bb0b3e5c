"""On a CPU, multiply with weights that oneDNN has laid out beforehand.

Decoding multiplies the same weights with a handful of rows once a token. A plain product lays the weight out anew each
time, and under autocast it converts a frozen weight each time too; here both happen once. The products are the
same but for the order of sums (docs/measurements/speed.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from remend.models.frozen_linear import NarrowLinear
from remend.models.protocols import CausalLM

MOST_BYTES = 4 * 2**30
"""Of packed weights; a larger model is decoded as it is, rather than held twice."""


@contextmanager
def packed_linears(model: CausalLM) -> Iterator[None]:
    """Inside, the model's linear layers use packed copies of the weights that they have at the start.

    Does nothing off the CPU, without oneDNN, in a dtype that it can't pack here, for layers whose forward is replaced,
    and for models above MOST_BYTES. The weights must not change inside. Blocks that are read from the disk while they
    run are packed as often: that wins no time, and gives the same sums in the same order.

    Args:
        model: a transformers model, float32 or bfloat16; under CPU autocast the copies have autocast's dtype.
    """
    layers: list[nn.Linear] = []
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        plain = (m for m in model.modules() if type(m) is nn.Linear or type(m) is NarrowLinear)
        layers = [m for m in plain if "forward" not in vars(m)]
    given = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtypes = {m: given or _multiplied_in(m) for m in layers}
    kept = [m for m in layers if _packs(dtypes[m])]
    if sum(m.out_features * m.in_features * dtypes[m].itemsize for m in kept) > MOST_BYTES:
        kept = []
    with torch.no_grad():
        for layer in kept:
            if layer.weight.is_meta:  # its numbers come with its block, and go with it
                layer.forward = partial(_packed_anew, layer, dtypes[layer])  # type: ignore[method-assign]
            else:
                layer.forward = _packed(layer, dtypes[layer])  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in kept:
            del layer.forward


def _multiplied_in(layer: nn.Linear) -> torch.dtype:
    """The dtype of a layer's products without autocast; a frozen one is held in a narrower one."""
    return torch.float32 if isinstance(layer, NarrowLinear) else layer.weight.dtype


def _packed(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer's product with a packed copy of the weight that it has now."""
    weight_OI = layer.weight.detach().to(dtype)
    bias_O = None if layer.bias is None else layer.bias.detach().to(weight_OI.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return partial(_product, packed, bias_O, weight_OI.dtype)


def _packed_anew(layer: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    return _packed(layer, dtype)(x)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays such weights out; bfloat16 ones on processors that have AVX-512 or the like alone."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(packed: Tensor, bias_O: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias_O, "none", [], "")
    return y
