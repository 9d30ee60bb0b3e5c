"""Quantize a model's linear layers onto a grid and save it as a plain transformers directory.

remend degrade quantize smollm2 --format int3-g64 --out student

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from remend.compression.grids import Grid, GridFormat, decode
from remend.compression.grids import quantize as quantize_matrix
from remend.compression.solvers import gptq
from remend.compression.stored_grid import StoredGrid
from remend.degrade.job import DENSE_BITS, Changed, Job, Options, chosen_layers, run_job, share_of_zeros
from remend.errors import InputError
from remend.models.activations import walk
from remend.registry import Registry

Method = Callable[[Tensor, Tensor | None, GridFormat], tuple[Tensor, Grid]]
METHODS: Registry[Method] = Registry("quantization method")
CALIBRATED = ("gptq",)
"""Methods that look at a layer's inputs."""


@METHODS.register("rtn", source="round to nearest; the baseline of GPTQ, arXiv 2210.17323")
def round_to_nearest(weight_OI: Tensor, gram_II: Tensor | None, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Codes and grid from each group's own weights, as the format's own writer makes them."""
    return quantize_matrix(weight_OI, fmt)


@METHODS.register("gptq", source="arXiv 2210.17323")
def compensated(weight_OI: Tensor, gram_II: Tensor | None, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Each column's rounding error is made good by the columns not yet rounded."""
    assert gram_II is not None
    rounded = gptq(weight_OI, gram_II, fmt)
    return rounded.codes, rounded.grid


def _fitting(layers: Mapping[str, nn.Linear], fmt: GridFormat) -> None:
    bad = [f"{name} ({layer.in_features})" for name, layer in layers.items() if layer.in_features % (fmt.group or 1)]
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise InputError(
            f"group {fmt.group} of {fmt.name} does not divide the input width of {named}; choose a format with a "
            "smaller group, or skip those layers"
        )


@torch.no_grad()
def quantize_in_place(
    model: Any, fmt: GridFormat, method: str = "rtn", *, skip: Sequence[str] = (), job: Job | None = None
) -> StoredGrid:
    """Put every linear layer of the decoder on the grid; returns what describes it.

    Args:
        model: changed in place.
        fmt, method: the grid, and a name of METHODS.
        skip: patterns of layer names that stay as they are.
        job: where a calibrated method gets its text; not needed by 'rtn'.

    Raises InputError that names the layers whose rows the group size does not divide.
    """
    layers = chosen_layers(model, skip)
    _fitting(layers, fmt)
    apply, matrices = METHODS.get(method), {}

    def settle(name: str, layer: nn.Linear, gram_II: Tensor | None) -> None:
        codes, grid = apply(layer.weight, gram_II, fmt)
        layer.weight.copy_(decode(codes, grid, fmt))
        matrices[f"{name}.weight"] = (codes, grid)

    def visit(sites: walk.Sites) -> None:
        for name, layer in zip(sites.names, sites.layers, strict=True):
            if name in layers:
                settle(name, layer, sites.gram_II)

    if method in CALIBRATED:
        assert job is not None
        walk.walk(model, job.calibration(), visit, title=f"quantizing ({method})")
    else:
        for name, layer in layers.items():
            settle(name, layer, None)
    return StoredGrid(fmt, matrices)


def _described(student: Any, stored: StoredGrid, entry: dict[str, Any]) -> Changed:
    fmt = stored.format
    quantized = sum(codes.numel() for codes, _ in stored.matrices.values())
    bits = sum(codes.numel() * fmt.bits_per_weight(codes.shape[1]) for codes, _ in stored.matrices.values())
    weights = dict(student.named_parameters())
    parameters = sum(p.numel() for p in weights.values())
    entry = {
        "kind": "quantization",
        **entry,
        "matrices": len(stored.matrices),
        "weights_on_grid": quantized,
        "weights_in_all": parameters,
        "sparsity": share_of_zeros([weights[name] for name in stored.matrices]),
    }
    packed = round(bits / 8) + DENSE_BITS // 8 * (parameters - quantized)
    return Changed(student, entry, stored.write, bits_per_weight=bits / quantized, packed_bytes=packed)


def quantize(
    model: str,
    out: str | Path,
    *,
    format: str = "int3-g64",
    method: str = "rtn",
    skip: Sequence[str] = (),
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Quantize a model and save it with its grid.

    Args:
        model: what to quantize: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory.
        format: as `GridFormat.parse` reads it: 'int3-g64', 'int4-g32-sym', 'gguf:q4_0', 'nvfp4' …
        method: 'rtn', or 'gptq' (calibrated on the reference's own completions).
        skip: patterns of layer names that stay as they are, e.g. '*.down_proj'. Head and embeddings always do.
        **options: see job.Options.

    Returns:
        The content of degradation.json.

    Raises:
        InputError, FileError: unknown format or method, unreadable model, occupied directory.
    """
    fmt = GridFormat.parse(format)
    METHODS.get(method)

    def change(job: Job) -> Changed:
        stored = quantize_in_place(job.student, fmt, method, skip=skip, job=job)
        return _described(job.student, stored, {"format": fmt.name, "method": method, "skip": list(skip)})

    return run_job(
        model,
        out,
        change,
        title=f"quantizing to {fmt.name} ({method})",
        **options,
    )
