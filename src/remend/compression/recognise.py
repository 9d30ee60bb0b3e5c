"""Students that other tools made: which constraint does a file or directory carry, and can it be held?

GGUF files, compressed-tensors directories (llm-compressor's), bitsandbytes nf4, plain directories whose weights hold
exact zeros. What transformers opens but no grid here describes is refused with the reason, unless it is taken as dense.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remend.compression.containers.bitsandbytes import grid_of_bitsandbytes
from remend.compression.containers.compressed_tensors import grid_of_compressed, refuse_sparse
from remend.compression.containers.gguf_blocks import from_gguf_blocks
from remend.compression.grids import Grid, GridFormat
from remend.compression.stored_grid import StoredGrid
from remend.errors import FileError, InputError
from remend.files.atomic import read_json
from remend.models.find import ModelSource, fetch_model, find_model
from remend.models.packed_weights import packing

ZEROS = 0.05
"""A plain directory with a larger share of exact zeros in its linear weights counts as pruned."""

RECORD = "degradation.json"
"""What `remend degrade` writes beside a student."""

PLAIN = "plain weights, no constraint"
SAMPLE_ROWS = 64
"""Rows of a matrix that tell whether its values repeat."""

_GGUF_GRIDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0")
_GGUF_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_READERS = {"compressed-tensors": grid_of_compressed, "bitsandbytes": grid_of_bitsandbytes}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_NO_LINEAR = re.compile(r"embed|lm_head|norm|wte|wpe|rotary")


@dataclass(frozen=True)
class Recognised:
    """What a model's files say of its constraint.

    Attributes:
        kind: 'remend', 'gguf', 'compressed-tensors', 'plain', 'adapter' (the rest is its base's), or the packing's own
            name.
        stored: the grid that the linear weights lie on, or None.
        mask: whether exact zeros are to be kept.
        why: one sentence for the reader: what was found, or why it is held as dense.
        sparsity: share of exact zeros in the linear weights, where it was counted.
        pattern: '2:4' or '4:8' where every group of a row keeps that few, else None.
    """

    kind: str
    stored: StoredGrid | None
    mask: bool
    why: str
    sparsity: float | None = None
    pattern: str | None = None


def recognise(where: str | Path | ModelSource, *, as_dense: bool = False) -> Recognised:
    """Look at a model's files, not at its name.

    Args:
        where: what `models.resolve` takes, or its result.
        as_dense: take what can't be held as plain weights instead of refusing it.

    Raises:
        InputError: the weights are packed in a way that no grid here holds (with the reason).
        FileError: a file that can't be read.
    """
    source = where if isinstance(where, ModelSource) else find_model(str(where))
    if source.base:
        return replace(recognise(source.base, as_dense=as_dense), kind="adapter")
    source = fetch_model(source, weights=True)
    try:
        return _recognise(source, as_dense)
    except SafetensorError as error:
        raise FileError(f"{source.spec}: its weights can't be read: {' '.join(str(error).split())[:200]}") from None


def _recognise(source: ModelSource, as_dense: bool) -> Recognised:
    assert source.path is not None
    if source.kind == "gguf":
        return _gguf(source, as_dense)
    stored = StoredGrid.read(source.path)
    if stored is not None:
        return Recognised("remend", stored, False, f"its weights lie on the grid {stored.format.name}")
    config = packing(source.path)
    if not config:
        return _plain(source.path)
    method = str(config.get("quant_method", "unknown"))
    if method == "compressed-tensors":
        refuse_sparse(config, source.spec)
    else:
        _openable(method, config, source.path)
    try:
        read = _READERS.get(method)
        if read is None:
            raise InputError(f"weights packed by {method} lie on a grid that remend does not hold")
        stored, why = read(source.path, config)
    except InputError as error:
        if as_dense:
            return Recognised(method, None, False, f"held as dense: {error}")
        raise InputError(
            f"{source.spec}: {error}; say --as dense (as_dense: true in a recipe) to train its weights freely"
        ) from None
    return Recognised(method, stored, False, why)


def _openable(method: str, config: dict[str, Any], path: Path) -> None:
    """Raises InputError with transformers' reason when it can't open this packing here."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except Exception as error:  # each method has its own way to say what is missing
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is packed by {method}, which transformers can't open here ({type(error).__name__}: {reason}); "
            "give the model before packing, or a GGUF or compressed-tensors version"
        ) from None


def _gguf(source: ModelSource, as_dense: bool) -> Recognised:
    import gguf

    path = source.path
    assert path is not None
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:  # how it says that a file was cut short
        raise FileError(f"{path}: its weights can't be read: {' '.join(str(error).split())[:200]}") from None
    architecture = str(reader.fields["general.architecture"].contents())
    linear = {t.name: t for t in reader.tensors if _BLOCK.fullmatch(t.name) and len(t.shape) == 2}
    types = Counter(t.tensor_type.name for t in linear.values() if t.tensor_type.name not in ("F32", "F16", "BF16"))
    described = " and ".join(f"{n} {name}" for name, n in types.most_common()) or "only floating-point"
    if len(types) > 1 and types.keys() <= set(_GGUF_GRIDS) and not as_dense:
        raise InputError(
            f"{source.spec}: it has {described} linear matrices, and one grid a model is held. Give a file of one type "
            "(llama-quantize --pure writes those), or say --as dense (as_dense: true in a recipe) to train its weights "
            "freely"
        )
    if len(types) != 1 or next(iter(types)) not in _GGUF_GRIDS:
        return Recognised("gguf", None, False, f"held as dense: {path.name} has {described} linear matrices")
    if architecture not in ("llama", "qwen2", "qwen3") or any(_name(n) is None for n in linear):
        return Recognised("gguf", None, False, f"held as dense: the matrices of a {architecture} file can't be named")
    fmt = GridFormat.parse(f"gguf:{next(iter(types)).lower()}")
    heads = {kind: int(_field(reader, f"{architecture}.attention.{key}")) for kind, key in _HEADS.items()}
    matrices = {
        str(_name(name)): _blocks(tensor, fmt, heads if architecture == "llama" else {}, name)
        for name, tensor in linear.items()
        if tensor.tensor_type.name in types
    }
    return Recognised("gguf", StoredGrid(fmt, matrices), False, f"{described} matrices: the grid {fmt.name}")


_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}


def _field(reader: Any, key: str) -> Any:
    field = reader.fields.get(key) or reader.fields[key.removesuffix("_kv")]
    return field.contents()


def _name(gguf_name: str) -> str | None:
    match = _BLOCK.fullmatch(gguf_name)
    part = _GGUF_LINEAR.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}.weight" if match and part else None


def _blocks(tensor: Any, fmt: GridFormat, heads: dict[str, int], name: str) -> tuple[Tensor, Grid]:
    columns, rows = (int(n) for n in tensor.shape)
    codes, grid = from_gguf_blocks(tensor.data, fmt, (rows, columns))
    count = heads.get(name.split(".")[2])
    if count is None:
        return codes, grid
    # llama.cpp interleaves the two halves of every head of llama's queries and keys; transformers keeps them apart
    order = torch.arange(rows).view(count, -1, 2).transpose(1, 2).reshape(-1)
    zeros = None if grid.zeros is None else grid.zeros[order]
    return codes[order], Grid(grid.scales[order], zeros, grid.outer)


def linear_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every two-dimensional weight of a directory that is no embedding, head or norm, one at a time."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name.endswith(".weight") and not _NO_LINEAR.search(name):
                    tensor = tensors.get_tensor(name)
                    if tensor.ndim == 2 and tensor.is_floating_point():
                        yield name, tensor


def _plain(directory: Path) -> Recognised:
    declared = was_pruned(directory)
    zeros = total = repeated = sampled = 0
    patterns = {"2:4": (2, 4), "4:8": (4, 8)}
    for _, weight in linear_weights(directory):
        is_zero = weight == 0
        zeros, total = zeros + int(is_zero.sum()), total + weight.numel()
        some = weight[:SAMPLE_ROWS]
        repeated, sampled = repeated + _repeats(some), sampled + some.numel()
        patterns = {name: nm for name, nm in patterns.items() if _follows(is_zero, *nm)}
    if not total or (zeros / total <= ZEROS and not (patterns and zeros) and not (declared and zeros)):
        return Recognised("plain", None, False, PLAIN, zeros / total if total else None)
    share, pattern = zeros / total, next(iter(patterns), None)
    if repeated / sampled > 0.25 and not declared:
        why = f"{share:.1%} exact zeros, but the weights repeat a few values: they were quantized, not pruned; no mask"
        return Recognised("plain", None, False, why, share)
    found = f"{share:.1%} of the linear weights are exactly zero" + (f", in the pattern {pattern}" if pattern else "")
    return Recognised("plain", None, True, found, share, pattern)


def was_pruned(directory: Path) -> bool:
    """Whether the record beside the weights says that some were set to zero: the zeros are then no grid's accident."""
    return _set_to_zero(_record(directory))


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _set_to_zero(record: dict[str, Any]) -> bool:
    # removed layers and channels are pruning too, and a zero in what they leave is one of the reference's own
    smaller = str(record.get("method")).startswith(("depth", "width"))
    return record.get("kind") == "pruning" and not smaller and bool(record.get("sparsity"))


def record_to_keep(student: ModelSource, held: Recognised) -> dict[str, Any]:
    """The student's `degradation.json` for the model recovered from it; empty where it would no longer be true.

    A student that was taken as dense left its grid or zeros; an adapter's base keeps its record itself.
    """
    record = _record(student.path) if student.kind == "directory" and student.path else {}
    gone = (record.get("kind") == "quantization" and not held.stored) or (_set_to_zero(record) and not held.mask)
    return {} if gone else record


def _follows(is_zero_OI: Tensor, keep: int, of: int) -> bool:
    rows, columns = is_zero_OI.shape
    return columns % of == 0 and bool((is_zero_OI.view(rows, -1, of).sum(-1) >= of - keep).all())


def _repeats(weight_OI: Tensor) -> int:
    """How many weights equal a neighbour, zeros aside, in sorted windows of 32: many on a grid of few levels."""
    rows, columns = weight_OI.shape
    window = weight_OI[:, : columns // 32 * 32].reshape(rows, -1, 32).sort(-1).values
    return int(((window[..., 1:] == window[..., :-1]) & (window[..., 1:] != 0)).sum())
