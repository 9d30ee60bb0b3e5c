"""Dense: a plain transformers directory. Every model fits, and every reader of transformers models opens it.

A grid lies in remend/grid.safetensors. Without one, weights with many exact zeros were pruned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from remend.compression.containers import CONTAINERS, Container, Measured, Recognised, packed_by, was_pruned
from remend.compression.stored_grid import StoredGrid
from remend.models.blocks.opening import from_disk
from remend.models.blocks.saving import planned_model
from remend.models.blocks.writing import PlannedFiles, write_parts
from remend.models.find import ModelSource
from remend.models.load import save_model
from remend.models.matrices import EXPERT_PRODUCTS, STACKS
from remend.models.protocols import CausalLM

ZEROS = 0.05
"""A plain directory with a larger share of exact zeros in its linear weights counts as pruned."""

PLAIN = "plain weights, no constraint"
SAMPLE_ROWS = 64
"""Rows of a matrix that tell whether its values repeat."""

_NO_MATRIX = re.compile(
    r"embed|lm_head|norm|wte|wpe|rotary|conv1d|bias|A_log|router|(^|[.])gate[.]|shared_expert_gate"
    r"|vision|visual|audio|multi_modal"
)
_INPUTS_FIRST = re.compile(r"[.]c_(attn|proj|fc)[.]weight$")
"""GPT-2's Conv1D, whose weights are [I, O]."""
_SEVERAL = (*EXPERT_PRODUCTS, *{own for kind in STACKS.values() for own in kind if own != "weight"}, "_linear.weight")
"""Ends of names of tensors that hold several matrices; those of JetMoE are called input_linear and output_linear."""
_PILED, _PILED_INPUTS_FIRST = re.compile(r"experts[.]mlp[.][wv][12]$"), re.compile(r"experts[.]mlp[.]w2$")
"""DBRX lays them one below the other, [E · O, I] or [E · I, O]."""


def _reads(source: ModelSource) -> bool:
    return source.kind == "directory" and packed_by(source) is None


def _recognise(source: ModelSource, as_dense: bool) -> Recognised:
    assert source.path is not None
    stored = StoredGrid.read(source.path)
    if stored is not None:
        return Recognised("remend", stored, False, f"its weights lie on the grid {stored.format.name}")
    return _zeros(source.path)


def _zeros(directory: Path) -> Recognised:
    declared = was_pruned(directory)
    zeros = total = repeated = sampled = 0
    patterns = {"2:4": (2, 4), "4:8": (4, 8)}
    for weight in _matrix_weights(directory):
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
    why = f"{share:.1%} of the linear weights are exactly zero" + (f", in the pattern {pattern}" if pattern else "")
    return Recognised("plain", None, True, why, share, pattern)


def _matrix_weights(directory: Path) -> Iterator[Tensor]:
    """Every matrix weight [O, I] of a directory that is no embedding, head, norm or router, one at a time.

    A tensor of all experts of a layer is given as [E · O, I].
    """
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if _NO_MATRIX.search(name):
                    continue
                tensor: Tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                if tensor.ndim == 2 and name.endswith(".weight"):
                    yield tensor.T if _INPUTS_FIRST.search(name) else tensor
                elif tensor.ndim == 2 and _PILED.search(name):
                    yield tensor.T if _PILED_INPUTS_FIRST.search(name) else tensor
                elif tensor.ndim == 3 and name.endswith(_SEVERAL):
                    yield _inputs_last(tensor).flatten(0, 1)


def _inputs_last(experts: Tensor) -> Tensor:
    """Experts as [E, O, I]. Architectures store them either way round; zeros of a pattern tell which one it is."""
    zero = experts == 0
    turned = _follows(zero.mT.flatten(0, 1), 2, 4) and not _follows(zero.flatten(0, 1), 2, 4)
    return experts.mT if turned else experts


def _follows(is_zero_OI: Tensor, keep: int, of: int) -> bool:
    rows, columns = is_zero_OI.shape
    return columns % of == 0 and bool((is_zero_OI.reshape(rows, -1, of).sum(-1) >= of - keep).all())


def _repeats(weight_OI: Tensor) -> int:
    """How many weights equal a neighbour, zeros aside, in sorted windows of 32: many on a grid of few levels."""
    rows, columns = weight_OI.shape
    window = weight_OI[:, : columns // 32 * 32].reshape(rows, -1, 32).sort(-1).values
    return int(((window[..., 1:] == window[..., :-1]) & (window[..., 1:] != 0)).sum())


def _fits(grid: str, kind: str) -> str | None:
    return f'format "dense:{kind}" is unknown; dense has no kinds, write --format dense' if kind else None


def _write(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    """Float32 safetensors, and the grid beside them where there is one."""
    save_model(measured.model, measured.tokenizer, target, max_shard_size=measured.max_shard_size)
    if measured.stored:
        measured.stored.write(target)
    return _facts(measured)


def _write_by_block(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    """The same files, written one block after the other."""
    model, stored = measured.model, measured.stored
    weights = planned_model(model, measured.tokenizer, target, max_shard_size=measured.max_shard_size)
    files = PlannedFiles([*weights, *([stored.planned(target)] if stored else [])])
    write_parts(model, files, lambda modules: stored.parts_in(model, modules) if stored else {})
    if stored:
        files.write(stored.carried_tensors())
    return _facts(measured)


def _facts(measured: Measured) -> dict[str, str]:
    if measured.mask:
        return {"container": f"dense with zeros ({measured.mask}); the zeros are stored like any other weight"}
    return {"container": "dense"}


def _opened_by_block(source: ModelSource, device: torch.device) -> CausalLM:
    return from_disk(source, device=device)


CONTAINERS.register("dense", source="safetensors, one float32 tensor a weight")(
    Container(
        _reads,
        _recognise,
        _fits,
        _write,
        sharded=True,
        write_by_block=_write_by_block,
        opened_by_block=_opened_by_block,
    )
)
