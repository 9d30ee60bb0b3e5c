"""Write a measured model into a container that others read, and prove that it is the same model.

remend export runs/mine --format gguf:q4_0 --out mine-gguf
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from remend.compression.containers import CONTAINERS, Container, Measured, read_record
from remend.compression.recognise import recognise
from remend.console import console, stage
from remend.errors import InputError, did_you_mean
from remend.exporting.card import told_of, write_card
from remend.exporting.check import compare_file, verify
from remend.files.atomic import JsonObject, new_directory, write_json, write_text
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST, occupied
from remend.files.settings import Placement, shard_size
from remend.files.signed import signed
from remend.models.adapters import is_adapter
from remend.models.blocks import by_block
from remend.models.blocks.placement import numbers_in, place
from remend.models.find import ModelSource, fetch_model, find_model
from remend.models.load import load_tokenizer
from remend.models.written import EXPORT_FILE, FILES, RECORD, hashes_of
from remend.report.card import named

BYTES = 13
"""Of a number of the model: what is written, what was measured and what is read back, in float32, and codes."""

CPU = torch.device("cpu")

__all__ = ["CONTAINERS", "export", "verify"]


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    max_shard_size: str | None = None,
    placement: Placement = "auto",
    trust_remote_code: bool = False,
) -> JsonObject:
    """Write a model as it was measured, read it back and compare.

    Args:
        source: a run directory (its recovered model is taken), or a model: directory, GGUF file, hub id or smollm2.
        out: a new directory.
        format: 'dense', 'compressed-tensors', 'gguf' (the type that the grid has) or 'gguf:q4_0' and the like.
        max_shard_size: of one file of weights, such as 5GB; by default transformers' limit.
        placement: where the model's weights are meanwhile: auto, device, host or disk. With disk each block is read,
            written and read back by itself, and no other program opens the result, since that would hold all of it.
        trust_remote_code: let the model's own code run.

    Returns:
        The content of export.json: container, grid, bytes, `note` on what the container can't hold, if there is
        such a thing, and `check` as `verify` returns it.

    Raises:
        InputError: unknown format, a grid that fits no such container (with the reason), an occupied `out`.
        FileError: the model can't be read, or what was written is not what was measured.
    """
    name, _, kind = format.partition(":")
    container = _writable(name)
    source, out = os.fspath(source), Path(out)
    if problem := occupied(out):
        raise InputError(problem)
    shard = _shard(name, container, max_shard_size)
    assert container.write is not None
    measured = open_measured(
        source,
        lambda grid: container.fits(grid, kind),
        placement="device" if container.write_by_block is None and placement == "auto" else placement,
        trust_remote_code=trust_remote_code,
    )
    write = container.write_by_block if by_block(measured.model) else container.write
    if write is None:
        raise InputError(
            f"placement {placement} can't be had for {name}, which is written as a whole; leave it to auto"
        )
    measured = replace(measured, max_shard_size=shard)
    told = told_of(measured)
    with new_directory(out) as target:
        with stage(f"writing {format}"):
            facts = write(measured, target, kind)
        with stage("reading it back"):
            check = compare_file(target, measured, container)
        if measured.degradation is not None:
            write_json(target / RECORD, signed(measured.degradation))
        write_text(target / "README.md", write_card(measured, told, facts, check))
        result = {
            "source": named(source),
            "format": format,
            **facts,
            "grid": measured.grid,
            "matrices_on_grid": len(measured.stored.matrices) if measured.stored else 0,
            "bytes": sum(f.stat().st_size for f in target.iterdir() if f.suffix in {".safetensors", ".gguf"}),
            "check": check,
            FILES: hashes_of(target),
        }
        write_json(target / EXPORT_FILE, signed(result))
    return result


def _shard(name: str, container: Container, size: str | None) -> str | None:
    """The size of a file of weights, checked. Raises InputError."""
    if size is None:
        return None
    if not container.sharded:
        raise InputError(f"max_shard_size has no effect on {name}, which writes one file; leave it out")
    try:
        return shard_size(size)
    except ValueError as error:
        raise InputError(f'max_shard_size is "{size}"; {error}') from None


def _writable(name: str) -> Container:
    known = [other for other in CONTAINERS.names() if CONTAINERS.get(other).write]
    if name not in known:
        raise InputError(f'unknown container "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    return CONTAINERS.get(name)


def open_measured(
    source: str,
    unfit: Callable[[str], str | None] = lambda grid: None,
    *,
    placement: Placement = "device",
    trust_remote_code: bool = False,
) -> Measured:
    """Load a run's recovered model, or any model, in float32 on the CPU.

    Args:
        source: a run or a model.
        unfit: the grid's name or 'none' → why it can't be used, which is asked before any weights are loaded.
        placement: where its weights are to be.
        trust_remote_code: let the model's own code run.

    Raises InputError when a run has no model yet, the grid is unfit or the weights don't lie on the grid beside them,
    and FileError when the model can't be read.
    """
    path = Path(source)
    of_run = path if (path / MANIFEST).is_file() else None
    finished = (path / "model" / "config.json").is_file() or is_adapter(path / "model")
    if of_run and not finished:
        raise InputError(
            f"the run {path} has no recovered model yet; finish it with remend recover --resume {path}, then export"
        )
    where = find_model(str(path / "model") if of_run else source, trust_remote_code=trust_remote_code)
    if where.kind == "adapter":
        raise InputError(
            f"{where.spec} is an adapter, which stays apart from its base: it is a peft directory already, and merged "
            "it would move the base's weights off what was measured. Export the base, and load the adapter on it"
        )
    where = fetch_model(where, weights=True)
    held = recognise(where, as_dense=True)
    reason = unfit(held.stored.format.name if held.stored else "none")
    if reason:
        raise InputError(reason)
    numbers = numbers_in(where)
    placed = place(placement, where, None if numbers is None else BYTES * numbers, CPU, "export")
    if placed.why:
        console.print(placed.why, soft_wrap=True)
    with stage(f"loading {where.spec}"):
        tokenizer = load_tokenizer(where)
        model = placed.load(where, dtype=torch.float32, device=CPU)
    if held.stored:
        held.stored.check(model)
    mask = held.why if held.mask else None
    return Measured(where, model, tokenizer, held.stored, mask, _degradation(where, of_run), of_run)


def _degradation(where: ModelSource, of_run: Path | None) -> JsonObject | None:
    """degradation.json from the model's directory, else from the student that the run began with."""
    places = [where.path] if where.kind == "directory" else []
    if of_run:
        student = read_object(of_run / MANIFEST).get("recipe", {}).get("student")
        places += [Path(student)] if isinstance(student, str) else []
    records = (read_record(place) for place in places if place)
    return next((record for record in records if record), None)
