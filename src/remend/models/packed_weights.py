"""Weights that other tools packed: what config.json says of them, and unpacking without a rounding."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject
from remend.files.reading import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D


_PACKED = re.compile(r"weight_(packed|scale|shape|zero_point|global_scale|g_idx)")
"""Local names that only a packed layer has."""


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
        content = read_object(path) if path.is_file() else {}
    except FileError:
        return {}
    return content if isinstance(content, dict) else {}


def merges_experts(model_type: str) -> bool:
    """Whether transformers makes one tensor of all experts of a layer, which files of this type hold one by one."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    steps = [
        step
        for entry in get_checkpoint_conversion_mapping(model_type) or []
        for step in getattr(entry, "operations", [])
    ]
    return any(type(step).__name__ == "MergeModulelist" for step in steps)


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


def require_fitting(config: JsonObject, files: Sequence[Path], model_type: str, what: str) -> None:
    """Raises FileError for packed tensors of compressed-tensors that are missing, or that `config` does not describe.

    transformers drops the names that a format does not use, lets scales of another shape be spread, and unpacks all
    layers by one of several schemes, and all experts by one.
    """
    from compressed_tensors.compressors import BaseCompressor
    from transformers import CompressedTensorsConfig
    from transformers.integrations import compressed_tensors as integration

    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    for name, group in groups.items():
        # what was done to weights alone is in them already
        if any(not str(apply.get("location")).startswith("weight") for apply in group.get("apply", [])):
            raise FileError(
                f"{what} transforms its activations (transform_config in config.json, {name}), which transformers "
                "leaves out: it would be another model. Give the model before packing"
            )
    schemes = CompressedTensorsConfig(**config).quantization_config
    if schemes is None or not schemes.config_groups:
        return
    merged, missing = merges_experts(model_type), []
    for module, tensors in _modules(files).items():
        expert = merged and ".experts." in module
        own_name, own = _described(schemes.config_groups, module)
        # before it unpacked all layers by one scheme, the package compressed-tensors unpacked each by its own
        chosen = getattr(integration, "get_experts_scheme" if expert else "get_dense_scheme", lambda _, own=own: own)
        scheme = chosen(schemes)
        if scheme is None:
            continue
        form = scheme.format or schemes.format
        if own is not None and _how(own, schemes.format) != _how(scheme, schemes.format):
            raise FileError(
                f"config.json of {what} describes {module} by {own_name}, and transformers unpacks it by another of "
                f"its {len(schemes.config_groups)} config_groups: it would be another model. Give the model before "
                "packing, or a version of which all layers are packed in one way"
            )
        if scheme.weights is None or form == "dense":
            continue
        if {"weight", "weight_packed"} <= tensors.keys():
            raise FileError(
                f"the model of {what} can't be put together: {module} has a weight and a weight_packed, and only one "
                "can be meant; remove the other from the files"
            )
        named = set(BaseCompressor.get_value_from_registry(form).compression_param_names(scheme))
        used = {"weight_shape", *named}
        if expert and 32 % scheme.weights.num_bits == 0:
            named.discard("weight_shape")  # follows from the packed tensor
        missing += [f"{module}.{local}" for local in sorted(named - tensors.keys()) if local.startswith("weight")]
        if "fp4" not in form and "fp6" not in form:
            used.add("weight_zero_point")  # taken off even where the scheme is symmetric
        if expert:
            used -= {"weight_global_scale", "weight_zero_point"}  # where transformers forgets them
        for local in sorted(tensors.keys() - used):
            if local in ("weight_global_scale", "weight_zero_point"):
                raise FileError(
                    f"the files of {what} hold {module}.{local}, which transformers does not use in the format {form} "
                    "of config.json: without it it would be another model. Correct config.json where it does not "
                    "describe these weights, or give the model before packing"
                )
        for local, needed in _shapes(tensors, form, scheme.weights).items():
            got = tensors[local][0] if local in tensors else needed
            if got != needed and not (needed == [1] and math.prod(got) == 1):
                raise FileError(
                    f"the model of {what} does not fit its configuration: {module}.{local} is {got} in the files, and "
                    f"{needed} by config.json; give the configuration that belongs to these weights"
                )
    if missing:
        more = ", …" if len(missing) > 3 else ""
        raise FileError(
            f"the model of {what} is incomplete: {len(missing)} tensors are missing ({', '.join(missing[:3])}{more})"
        )


def _described(groups: Mapping[str, Any], module: str) -> tuple[str, Any]:
    """The group of config.json, by name, that describes a linear layer: one that names it, else one of its kind."""
    from compressed_tensors.utils.match import is_match, match_name

    layer = nn.Linear(1, 1, device="meta")
    for matches in (match_name, lambda name, target: is_match(name, layer, target)):
        for name, group in groups.items():
            if any(matches(module, target) for target in group.targets):
                return name, group
    return "", None


def _how(scheme: Any, form: str) -> tuple[object, ...]:
    """What tells one way of unpacking weights from another."""
    weights, form = scheme.weights, scheme.format or form
    if weights is None:
        return (form,)
    layout = (weights.symmetric, weights.strategy, weights.group_size, weights.block_structure)
    if form in ("naive-quantized", "int-quantized", "float-quantized"):
        return ("quantized", *layout)  # value times scale, whatever the values' type
    return (form, weights.num_bits, weights.type, *layout)


def _modules(files: Sequence[Path]) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
    """Shape of each tensor of a quantized module by its local name, and of weight_shape the numbers too."""
    modules: dict[str, dict[str, tuple[list[int], list[int]]]] = defaultdict(dict)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                module, _, local = name.rpartition(".")
                if local.startswith("weight"):
                    numbers = file.get_tensor(name).tolist() if local == "weight_shape" else []
                    modules[module][local] = (list(file.get_slice(name).get_shape()), numbers)
    return {name: tensors for name, tensors in modules.items() if any(map(_PACKED.fullmatch, tensors))}


def _shapes(tensors: dict[str, tuple[list[int], list[int]]], form: str, weights: Any) -> dict[str, list[int]]:
    """The shapes that the scheme `weights` asks for, by local name; of what it leaves open none."""
    whole = tensors["weight"][0] if "weight" in tensors else tensors.get("weight_shape", ([], []))[1]
    if not whole and "weight_packed" in tensors and "fp4" in form:
        rows, columns = tensors["weight_packed"][0]
        whole = [rows, columns * 2]
    if len(whole) != 2:
        return {}
    rows, columns = whole
    if weights.strategy in ("group", "tensor_group"):
        scale = [rows, math.ceil(columns / weights.group_size)]
    elif weights.strategy == "block":
        scale = [math.ceil(size / block) for size, block in zip(whole, weights.block_structure, strict=True)]
    elif weights.strategy == "channel":
        scale = [rows, 1]
    elif weights.strategy == "tensor":
        scale = [1]
    else:
        return {}
    needed = {"weight_scale": scale, "weight_zero_point": scale}
    if form == "pack-quantized":
        several = 32 / weights.num_bits
        needed["weight_packed"] = [rows, math.ceil(columns / several)]
        if not weights.symmetric and weights.strategy in ("group", "channel"):
            needed["weight_zero_point"] = [math.ceil(rows / several), scale[1]]
        if 32 % weights.num_bits:  # where numbers lie across words
            needed = {"weight_scale": scale}
    return needed


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply scale and value in float32 while transformers lets compressed-tensors decompress.

    It multiplies in the scale's own dtype (bfloat16 or float16, as most writers store it) and unpacks fp4 to bfloat16.
    That rounds the products: the weights would lie beside their grid. Float32 scales give the same with and without.

    Raises FileError where the transformers that is installed unpacks otherwise.
    """
    try:
        from compressed_tensors.compressors.nvfp4 import base as fp4
        from transformers.integrations.compressed_tensors import CompressedTensorsDequantize as Operation
    except ImportError:
        raise FileError(
            "weights packed by compressed-tensors can't be unpacked exactly by the versions of transformers "
            f"({version('transformers')}) and compressed-tensors ({version('compressed-tensors')}) that are installed; "
            "5.23 and 0.20 can: pip install -U transformers compressed-tensors"
        ) from None

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
        from transformers.pytorch_utils import Conv1D

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
    from transformers.pytorch_utils import Conv1D

    weight_OI, bias_O = linear.get_parameter("weight"), linear.get_parameter("bias")
    layer = Conv1D(*weight_OI.shape)
    layer.weight, layer.bias = nn.Parameter(weight_OI.detach().T.contiguous()), bias_O
    return layer


def _widen(scale: Tensor) -> Tensor:
    return scale.float() if scale.dtype in (torch.float16, torch.bfloat16) else scale
