"""GGUF, the file of llama.cpp: matrices on their grid, everything else as F32.

Names, the row order of llama's queries and keys, hyperparameters and vocabulary follow llama.cpp's
convert_hf_to_gguf.py; the file is written and read back by the `gguf` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from remend.compression.containers.gguf_blocks import to_gguf_blocks
from remend.compression.containers.gguf_tokenizer import add_vocabulary
from remend.compression.containers.measured import CONTAINERS, Measured
from remend.compression.grids import Grid, GridFormat
from remend.errors import InputError

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_NAME = "model.gguf"

SAME_VALUES = {"int4-g32-sym": "gguf:q4_0", "int8-g32-sym": "gguf:q8_0", "mxfp4": "gguf:mxfp4"}
"""Grids that are a GGUF type under another name: scale * (code - 8) is q4_0, scale * (code - 128) is q8_0."""


def gguf_type_of(measured: Measured, wanted: str = "") -> str:
    """The GGUF type of a model's matrices, e.g. 'q4_0'; 'f32' for a model on no grid.

    Raises InputError with the reason when the grid is no GGUF type, or not the one that is wanted.
    """
    grid = measured.grid
    if wanted not in ("", "f32"):
        GridFormat.parse(f"gguf:{wanted}")  # raises for an unknown type, and lists the known
    if grid == "none":
        found = "f32"
    else:
        name = SAME_VALUES.get(grid, grid)
        if not name.startswith("gguf:"):
            raise InputError(f"{_why_not(grid)}; use --format dense")
        found = name.removeprefix("gguf:")
    if wanted and wanted != found:
        raise InputError(
            f"the model lies on {'no grid' if grid == 'none' else grid}, so writing it as gguf:{wanted} would change "
            f"its weights after they were measured; use --format gguf:{found} or dense, or quantize to gguf:{wanted} "
            "first: remend degrade quantize"
        )
    return found


def _why_not(grid: str) -> str:
    if grid.startswith("int3"):
        return (
            f"{grid} fits no GGUF type: the 3-bit Q3_K has blocks of 256, of which widths such as 576 are no multiple, "
            "and quantizes its scales once more"
        )
    if grid.endswith("-asym"):
        return f"{grid} fits no GGUF type: its zero is a real number, and scale x zero no float16 minimum as in Q4_1"
    return f"{grid} fits no GGUF type: none has its values and groups"


@CONTAINERS.register("gguf", source="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md")
def write_gguf(measured: Measured, target: Path, kind: str) -> dict[str, Any]:
    """Write `model.gguf`. Raises InputError for an architecture, tokenizer or grid that can't be written exactly."""
    type_name = gguf_type_of(measured, kind)
    config = measured.model.config
    architecture = _architecture(config)
    writer = gguf.GGUFWriter(target / FILE_NAME, gguf.MODEL_ARCH_NAMES[architecture])
    name = (measured.run or measured.source.path or Path("model")).name
    _add_hyperparameters(writer, config, name, type_name)
    add_vocabulary(writer, measured.model, measured.tokenizer)
    _add_tensors(writer, measured, gguf.get_tensor_name_map(architecture, config.num_hidden_layers), type_name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    measured.model.generation_config.save_pretrained(target)
    return {"container": f"gguf:{type_name}", "file": FILE_NAME}


def _architecture(config: Any) -> Any:
    """Raises InputError for a model whose configuration GGUF or its readers would not reproduce."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"a {kind} model can't be written as GGUF here; allowed are {known}; use --format dense")
    rope = config.rope_parameters or {}
    reasons = []
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its rope is scaled ({rope['rope_type']}), which transformers does not read back from GGUF")
    if config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act}; llama.cpp computes silu")
    if getattr(config, "use_sliding_window", False):
        reasons.append("it attends within a sliding window, which llama.cpp does not do for this architecture")
    if kind == "qwen3" and config.head_dim != 128:
        reasons.append(f"its heads are {config.head_dim} wide, and transformers reads qwen3 GGUF files with 128")
    if kind == "llama" and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        reasons.append("it has biases, which transformers does not read back from a llama GGUF")
    if reasons:
        raise InputError(f"this {kind} model can't be written as GGUF: {'; '.join(reasons)}; use --format dense")
    return ARCHITECTURES[kind]


def _add_hyperparameters(writer: Any, config: Any, name: str, type_name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.rope_parameters or {})["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    label = "ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"
    known = {"MOSTLY_MXFP4": "MOSTLY_MXFP4_MOE"}.get(label, label)
    writer.add_file_type(gguf.LlamaFileType[known])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tensors(writer: Any, measured: Measured, names: Any, type_name: str) -> None:
    matrices = measured.stored.matrices if measured.stored else {}
    fmt = GridFormat.parse(f"gguf:{type_name}") if matrices else None
    for name, parameter in measured.model.named_parameters():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise InputError(f"the tensor {name} has no name in GGUF; use --format dense")
        order = row_order(name, measured.model.config, parameter.shape[0])
        if name in matrices and fmt is not None:
            codes, grid = matrices[name]  # under either name the same codes and scales
            codes, grid = (codes, grid) if order is None else (codes[order], _rows(grid, order))
            blocks = np.ascontiguousarray(to_gguf_blocks(codes, grid, fmt))
            writer.add_tensor(mapped, blocks, raw_dtype=gguf.GGMLQuantizationType[type_name.upper()])
        else:
            values = parameter.detach() if order is None else parameter.detach()[order]
            writer.add_tensor(mapped, values.float().contiguous().numpy())


def _rows(grid: Grid, order: Tensor) -> Grid:
    zeros = None if grid.zeros is None else grid.zeros[order]
    return grid._replace(scales=grid.scales[order], zeros=zeros)


def row_order(name: str, config: Any, rows: int) -> Tensor | None:
    """The order in which llama.cpp stores the rows of llama's queries and keys, or None where it keeps them.

    transformers rotates the two halves of a head against each other, llama.cpp's llama neighbouring rows, so
    convert_hf_to_gguf interleaves the halves. Whole rows move, and their scales with them.
    """
    if config.model_type != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def differing_tensors(file: Path, model: Any) -> list[str]:
    """Names of parameters that the `gguf` package does not read back bit for bit from `file`."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    different = []
    for name, parameter in model.named_parameters():
        tensor = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if tensor is None:
            different.append(name)
            continue
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        order = row_order(name, config, parameter.shape[0])
        expected = parameter.detach().float() if order is None else parameter.detach().float()[order]
        if not torch.equal(values.reshape(expected.shape), expected):
            different.append(name)
    return different
