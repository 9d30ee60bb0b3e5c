"""Quantize a model's linear layers onto a grid and save it as a plain transformers directory.

remend degrade quantize smollm2 --format int3-g64 --out student
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remend import models, run
from remend.constraints import StoredGrid
from remend.errors import InputError
from remend.grids import Grid, GridFormat, decode, encode, fit
from remend.progress import stage
from remend.registry import Registry

Method = Callable[[Tensor, GridFormat], tuple[Tensor, Grid]]
METHODS: Registry[Method] = Registry("quantization method")


@METHODS.register("rtn", source="round to nearest; the baseline of GPTQ, arXiv 2210.17323")
def round_to_nearest(weight_OI: Tensor, fmt: GridFormat) -> tuple[Tensor, Grid]:
    """Codes and grid from each group's own minimum and maximum."""
    grid = fit(weight_OI, fmt)
    return encode(weight_OI, grid, fmt), grid


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder by name: not the head, not embeddings."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def quantize_in_place(model: Any, fmt: GridFormat, method: str = "rtn") -> StoredGrid:
    """Put every linear layer of the decoder on the grid; returns what describes it.

    Raises InputError that names the layers whose rows the group size does not divide.
    """
    layers = linear_layers(model)
    bad = [f"{name} ({layer.in_features})" for name, layer in layers.items() if layer.in_features % fmt.group]
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise InputError(f"group {fmt.group} does not divide the input width of {named}; choose a smaller group")
    apply = METHODS.get(method)
    matrices = {}
    for name, layer in layers.items():
        codes, grid = apply(layer.weight, fmt)
        layer.weight.copy_(decode(codes, grid, fmt))
        matrices[f"{name}.weight"] = (codes, grid)
    return StoredGrid(fmt, matrices)


def quantize(model: str, out: str | Path, *, format: str = "int3-g64", method: str = "rtn") -> dict[str, Any]:
    """Quantize a model and save it with its grid.

    Args:
        model: what to quantize: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory.
        format: 'int{2,3,4,8}-g{32,64,128}', with '-sym' or '-asym' (the default).
        method: 'rtn'.

    Returns:
        The content of degradation.json.

    Raises:
        InputError, FileError: unknown format or method, unreadable model, occupied directory.
    """
    fmt, source, out = GridFormat.parse(format), models.resolve(model), Path(out)
    METHODS.get(method)
    problem = run.occupied(out)
    if problem:
        raise InputError(problem)
    tokenizer = models.load_tokenizer(source)
    with stage(f"loading {model}"):
        loaded = models.load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    with stage(f"quantizing to {fmt.name} ({method})"):
        hashes = models.hash_files(source)
        began = time.perf_counter()
        stored = quantize_in_place(loaded, fmt, method)
        seconds = time.perf_counter() - began
    quantized = sum(codes.numel() for codes, _ in stored.matrices.values())
    degradation = {
        "kind": "quantization",
        "format": fmt.name,
        "method": method,
        "reference": {"model": model, "files": hashes},
        "matrices": len(stored.matrices),
        "weights_on_grid": quantized,
        "weights_in_all": sum(p.numel() for p in loaded.parameters()),
        "bits_per_weight": fmt.bits_per_weight,
        "seconds": round(seconds, 3),
    }
    note = models.origin_note(source)
    if note:
        degradation["note"] = note
    with stage(f"saving {out}"), run.new_directory(out) as target:
        models.save_model(loaded, tokenizer, target)
        stored.write(target)
        run.write_json(target / "degradation.json", degradation)
    return degradation
