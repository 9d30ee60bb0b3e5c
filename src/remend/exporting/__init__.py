"""Write a measured model into a container that others read, and prove that it is the same model.

remend export runs/mine --format gguf:q4_0 --out mine-gguf
"""

from __future__ import annotations

from pathlib import Path

from remend.compression.containers import CONTAINERS, Container
from remend.compression.record import RECORD
from remend.compression.stored_grid import GRID_FILE
from remend.console import stage
from remend.errors import InputError, did_you_mean
from remend.exporting.card import write_card
from remend.exporting.check import compare_file, verify
from remend.exporting.measured import open_measured
from remend.files.atomic import JsonObject, new_directory, write_json, write_text
from remend.files.run_directory import occupied

__all__ = ["CONTAINERS", "export", "verify"]

EXPORT_FILE = "export.json"


def export(source: str, out: str | Path, *, format: str, trust_remote_code: bool = False) -> JsonObject:
    """Write a model as it was measured, read it back and compare.

    Args:
        source: a run directory (its recovered model is taken), or a model: directory, GGUF file, hub id or smollm2.
        out: a new directory.
        format: 'dense', 'compressed-tensors', 'gguf' (the type that the grid has) or 'gguf:q4_0' and the like.
        trust_remote_code: let the model's own code run.

    Returns:
        The content of export.json: container, grid, bytes, and `check` as `verify` returns it.

    Raises:
        InputError: unknown format, a grid that fits no such container (with the reason), an occupied `out`.
        FileError: the model can't be read, or what was written is not what was measured.
    """
    name, _, kind = format.partition(":")
    container = _writable(name)
    out = Path(out)
    problem = occupied(out)
    if problem:
        raise InputError(problem)
    measured = open_measured(source, trust_remote_code=trust_remote_code)
    assert container.write is not None
    reason = container.fits(measured.grid, kind)
    if reason:
        raise InputError(reason)
    with new_directory(out) as target:
        with stage(f"writing {format}"):
            facts = container.write(measured, target, kind)
        with stage("reading it back"):
            check = compare_file(target, measured)
        if measured.degradation is not None:
            write_json(target / RECORD, measured.degradation)
        write_text(target / "README.md", write_card(measured, facts["container"], check))
        result = {
            "source": source,
            "format": format,
            **facts,
            "grid": measured.grid,
            "matrices_on_grid": len(measured.stored.matrices) if measured.stored else 0,
            "bytes": sum(
                f.stat().st_size
                for f in target.iterdir()
                if f.suffix in {".safetensors", ".gguf"} and f.name != GRID_FILE
            ),
            "check": check,
        }
        write_json(target / EXPORT_FILE, result)
    return result


def _writable(name: str) -> Container:
    known = [other for other in CONTAINERS.names() if CONTAINERS.get(other).write]
    if name not in known:
        raise InputError(f'unknown container "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    return CONTAINERS.get(name)
