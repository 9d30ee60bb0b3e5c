"""Weights that other tools packed: what config.json says of them, and unpacking without a rounding."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packing(directory: Path | None) -> JsonObject:
    """`quantization_config` of a model directory's config.json; empty for plain weights.

    Model-Optimizer keeps its own beside it, in hf_quant_config.json, which transformers does not read.
    """
    if directory is None:
        return {}
    config = _content(directory / "config.json")
    # of several modalities, the text's
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    apart = _content(directory / "hf_quant_config.json").get("quantization") or {}
    if not given and (apart.get("quant_algo") or apart.get("quantized_layers")):
        given = {"quant_method": "modelopt", **apart}
    return dict(given or {})


def _content(path: Path) -> JsonObject:
    try:
        content = read_json(path) if path.is_file() else {}
    except FileError:
        return {}
    return content if isinstance(content, dict) else {}


def merges_experts(model_type: str) -> bool:
    """Whether transformers makes one tensor of all experts of a layer, which files of this type hold one by one."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    steps = [step for entry in get_checkpoint_conversion_mapping(model_type) or [] for step in _operations(entry)]
    return any(type(step).__name__ == "MergeModulelist" for step in steps)


def _operations(entry: object) -> list[object]:
    return list(getattr(entry, "operations", []))


def require_openable(directory: Path) -> None:
    """Raises InputError with transformers' reason when it can't open a directory's packed weights here."""
    from transformers.quantizers import AutoHfQuantizer

    config = packing(directory)
    try:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except Exception as error:  # each method has its own way to say what is missing
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{directory} is packed by {config.get('quant_method', 'unknown')}, which transformers can't open here "
            f"({type(error).__name__}: {reason}); give the model before packing, or a GGUF or compressed-tensors "
            "version"
        ) from None


def require_compressed_tensors(what: str) -> None:
    """Raises FileError with the line that installs compressed-tensors when it is absent."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise FileError(
            f"{what} needs the package compressed-tensors, which is not installed. "
            "Install it with: pip install compressed-tensors"
        )


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply scale and value in float32 while transformers lets compressed-tensors decompress.

    It multiplies in the scale's own dtype (bfloat16 or float16, as most writers store it) and unpacks fp4 to bfloat16.
    That rounds the products: the weights would lie beside their grid. Float32 scales give the same with and without.
    """
    from compressed_tensors.compressors.nvfp4 import base as fp4
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize as Operation

    unpack, convert = fp4.unpack_fp4_from_uint8, Operation.convert

    def widened(
        self: Operation, input_dict: dict[str, Tensor | list[Tensor]], *args: object, **kwargs: object
    ) -> object:
        scales = {name: scale for name, scale in input_dict.items() if name.endswith("weight_scale")}
        wide = {
            n: [_widen(s) for s in scale] if isinstance(scale, list) else _widen(scale) for n, scale in scales.items()
        }
        return convert(self, {**input_dict, **wide}, *args, **kwargs)

    fp4.unpack_fp4_from_uint8, Operation.convert = partial(unpack, dtype=torch.float32), widened
    try:
        with warnings.catch_warnings():  # that `dequantize` goes before what config.json says: it is meant to
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        fp4.unpack_fp4_from_uint8, Operation.convert = unpack, convert


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain weights, where transformers loaded it packed; saved, it does not claim to be packed.

    Raises what transformers raises for a packing that it can't undo.
    """
    if getattr(model, "is_quantized", False) and not getattr(
        model.hf_quantizer.quantization_config, "dequantize", False
    ):
        for module in model.modules():  # bitsandbytes would round to the type that the weights once had
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                state.dtype = torch.float32
        turned = [n for n, m in model.named_modules() if issubclass(getattr(m, "source_cls", nn.Module), Conv1D)]
        model = model.dequantize()
        for name in turned:
            model.set_submodule(name, _conv1d(model.get_submodule(name)))
        model._weight_conversions = None  # transformers would undo the packing's own when it saves, and can't
    elif merges_experts(model.config.get_text_config().model_type):
        model._weight_conversions = None  # likewise: packed experts were put together on their way in
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    return model


def _conv1d(linear: nn.Module) -> Conv1D:
    """GPT-2's own layer, in whose place bitsandbytes put a Linear: without it config.json would not fit the weights."""
    weight_OI, bias_O = linear.get_parameter("weight"), linear.get_parameter("bias")
    layer = Conv1D(*weight_OI.shape)
    layer.weight, layer.bias = nn.Parameter(weight_OI.detach().T.contiguous()), bias_O
    return layer


def _widen(scale: Tensor) -> Tensor:
    return scale.float() if scale.dtype in (torch.float16, torch.bfloat16) else scale
