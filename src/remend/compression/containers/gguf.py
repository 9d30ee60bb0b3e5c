"""GGUF, the file of llama.cpp: matrices on their grid, everything else as F32.

Names, the row order of llama's queries and keys, hyperparameters and vocabulary follow llama.cpp's
convert_hf_to_gguf.py; the file is written and read back by the `gguf` package.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from torch import Tensor

from remend.compression.containers import CONTAINERS, Container, Measured, Recognised
from remend.compression.containers.gguf_blocks import from_gguf_blocks, to_gguf_blocks
from remend.compression.containers.gguf_tokenizer import add_vocabulary, require_same_tokens
from remend.compression.grids import Grid, GridFormat
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError
from remend.files.reading import FETCH, understood
from remend.models.find import ModelSource
from remend.models.gguf_header import header
from remend.models.protocols import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_NAME = "model.gguf"
MXFP4_FILE = 38
"""llama.cpp's LLAMA_FTYPE_MOSTLY_MXFP4_MOE, which older gguf packages don't name."""

SAME_VALUES = {"int4-g32-sym": "gguf:q4_0", "int8-g32-sym": "gguf:q8_0", "mxfp4": "gguf:mxfp4"}
"""Grids that are a GGUF type under another name: scale * (code - 8) is q4_0, scale * (code - 128) is q8_0."""

_GRIDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _reads(source: ModelSource) -> bool:
    return source.kind == "gguf"


def _recognise(source: ModelSource, as_dense: bool) -> Recognised:
    path = source.path
    assert path is not None
    with understood(path, FETCH, kinds=(Exception,)):  # numbers and arrays of the header may be anything
        return _held(source, path, as_dense)


def _held(source: ModelSource, path: Path, as_dense: bool) -> Recognised:
    reader = header(path)
    architecture = str(reader.fields["general.architecture"].contents())
    linear = {t.name: t for t in reader.tensors if _BLOCK.fullmatch(t.name) and len(t.shape) == 2}
    types = Counter(t.tensor_type.name for t in linear.values() if t.tensor_type.name not in ("F32", "F16", "BF16"))
    described = " and ".join(f"{n} {name}" for name, n in types.most_common()) or "only floating-point"
    if len(types) > 1 and types.keys() <= set(_GRIDS) and not as_dense:
        raise InputError(
            f"{source.spec}: it has {described} linear matrices, and one grid a model is held. Give a file of one type "
            "(llama-quantize --pure writes those), or say --as dense (as_dense: true in a recipe) to train its weights "
            "freely"
        )
    if len(types) != 1 or next(iter(types)) not in _GRIDS:
        return Recognised("gguf", None, False, f"held as dense: {path.name} has {described} linear matrices")
    if architecture not in ARCHITECTURES or any(_name(n) is None for n in linear):
        return Recognised("gguf", None, False, f"held as dense: the matrices of a {architecture} file can't be named")
    fmt = GridFormat.parse(f"gguf:{next(iter(types)).lower()}")
    heads = _heads(reader, architecture)
    matrices = {
        str(_name(name)): _matrix(tensor, fmt, heads.get(name.split(".")[2]))
        for name, tensor in linear.items()
        if tensor.tensor_type.name in types
    }
    return Recognised("gguf", StoredGrid(fmt, matrices), False, f"{described} matrices: the grid {fmt.name}")


def _name(gguf_name: str) -> str | None:
    match = _BLOCK.fullmatch(gguf_name)
    part = _LINEAR.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}.weight" if match and part else None


def _heads(reader: gguf.GGUFReader, architecture: str) -> dict[str, int]:
    """Of the matrices whose rows llama.cpp reorders, how many heads they have."""
    if architecture != "llama":
        return {}
    count = reader.fields["llama.attention.head_count"]
    of_keys = reader.fields.get("llama.attention.head_count_kv") or count
    return {"attn_q": int(count.contents()), "attn_k": int(of_keys.contents())}


def _matrix(tensor: gguf.ReaderTensor, fmt: GridFormat, heads: int | None) -> tuple[Tensor, Grid]:
    """Codes and grid, rows in transformers' order."""
    columns, rows = (int(n) for n in tensor.shape)
    codes, grid = from_gguf_blocks(tensor.data, fmt, (rows, columns))
    if heads is None:
        return codes, grid
    order = _interleaved(rows, heads).argsort()
    return codes[order], _rows(grid, order)


def _fits(grid: str, kind: str) -> str | None:
    if kind == "f32":
        return None  # every grid's values are float32
    if kind:
        try:
            GridFormat.parse(f"gguf:{kind}")
        except InputError as unknown:
            k_quant = "_k" in kind.lower()  # llama.cpp chooses their scales by a search of its own
            how = (
                " K-quants are not written: export gguf:f32, and quantize that file with llama.cpp." if k_quant else ""
            )
            return f"{unknown}{how}"
    own = _type_of(grid)
    if own is None:
        return f"{_why_not(grid)}; use --format gguf:f32 (the same weights, unpacked) or dense"
    if kind and kind != own:
        other = "" if own == "f32" else ", gguf:f32"
        return (
            f"the model lies on {'no grid' if grid == 'none' else grid}, so writing it as gguf:{kind} would change "
            f"its weights after they were measured; use --format gguf:{own}{other} or dense, or quantize to "
            f"gguf:{kind} first: remend degrade quantize"
        )
    return None


def _type_of(grid: str) -> str | None:
    """The GGUF type of matrices on a grid, e.g. 'q4_0'; 'f32' on no grid, None where there is none."""
    if grid == "none":
        return "f32"
    name = SAME_VALUES.get(grid, grid)
    return name.removeprefix("gguf:") if name.startswith("gguf:") else None


def _why_not(grid: str) -> str:
    if grid.startswith("int3"):
        return (
            f"{grid} fits no GGUF type: the 3-bit Q3_K has blocks of 256, of which widths such as 576 are no multiple, "
            "and quantizes its scales once more"
        )
    if grid.endswith("-asym"):
        return f"{grid} fits no GGUF type: its zero is a real number, and scale x zero no float16 minimum as in Q4_1"
    return f"{grid} fits no GGUF type: none has its values and groups"


def _write(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    """`model.gguf`. Raises InputError for an architecture or tokenizer that can't be written exactly."""
    type_name = kind or str(_type_of(measured.grid))
    config = measured.model.config
    architecture = _architecture(config)
    writer = gguf.GGUFWriter(target / FILE_NAME, gguf.MODEL_ARCH_NAMES[architecture])
    name = (measured.run or measured.source.path or Path("model")).name
    _add_hyperparameters(writer, config, name, type_name)
    notes = add_vocabulary(writer, measured.model, measured.tokenizer)
    _add_tensors(writer, measured, gguf.get_tensor_name_map(architecture, config.num_hidden_layers), type_name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    require_same_tokens(target / FILE_NAME, measured.tokenizer)
    measured.model.generation_config.save_pretrained(target)
    return {"container": f"gguf:{type_name}", "file": FILE_NAME, **({"note": "; ".join(notes)} if notes else {})}


def _architecture(config: PreTrainedConfig) -> gguf.MODEL_ARCH:
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


def _add_hyperparameters(writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str, type_name: str) -> None:
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
    known = MXFP4_FILE if label == "MOSTLY_MXFP4" else gguf.LlamaFileType[label]
    writer.add_file_type(known)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tensors(writer: gguf.GGUFWriter, measured: Measured, names: gguf.TensorNameMap, type_name: str) -> None:
    matrices = measured.stored.matrices if measured.stored and type_name != "f32" else {}
    fmt = GridFormat.parse(f"gguf:{type_name}") if matrices else None
    for name, parameter in measured.model.named_parameters():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise InputError(f"the tensor {name} has no name in GGUF; use --format dense")
        order = _row_order(name, measured.model.config, parameter.shape[0])
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


def _row_order(name: str, config: PreTrainedConfig, rows: int) -> Tensor | None:
    """The order in which llama.cpp stores the rows of llama's queries and keys, or None where it keeps them."""
    if config.model_type != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return None if heads is None else _interleaved(rows, heads)


def _interleaved(rows: int, heads: int) -> Tensor:
    """llama.cpp's order of llama's rows. Whole rows move, and their scales with them.

    transformers rotates the two halves of a head against each other, llama.cpp's llama neighbouring rows, so
    convert_hf_to_gguf interleaves the halves.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _differing(file: Path, model: CausalLM) -> list[str]:
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
        order = _row_order(name, config, parameter.shape[0])
        expected = parameter.detach().float() if order is None else parameter.detach().float()[order]
        if not torch.equal(values.reshape(expected.shape), expected):
            different.append(name)
    return different


CONTAINERS.register("gguf", source="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md")(
    Container(_reads, _recognise, _fits, _write, _differing, reader="the gguf package")
)
