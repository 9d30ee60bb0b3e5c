"""A container from outside the package: one file, one registration. Each of the package's own has its own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.packed import needs_exact_unpacking
from helpers.patching import replace_everywhere
from helpers.tiny import build_model, put_on_grid
from remend.compression.containers import CONTAINERS, Container, Measured, Recognised, packed_by
from remend.compression.grids import Grid, GridFormat
from remend.compression.recognise import recognise
from remend.compression.stored_grid import StoredGrid
from remend.errors import InputError
from remend.exporting import export
from remend.models.find import ModelSource, find_model
from remend.models.load import save_model
from remend.registry import Registry

FILE = "scales.npz"


def reads(source: ModelSource) -> bool:
    return packed_by(source) is None and (source.path / FILE).is_file()


def recognised(source: ModelSource, as_dense: bool) -> Recognised:
    arrays = {name: torch.from_numpy(array) for name, array in np.load(source.path / FILE).items()}
    names = [name.removesuffix(".codes") for name in arrays if name.endswith(".codes")]
    matrices = {name: (arrays[f"{name}.codes"], Grid(arrays[f"{name}.scales"])) for name in names}
    return Recognised("npz", StoredGrid(GridFormat.parse("int4-g32-sym"), matrices), False, "npz: int4-g32-sym")


def fits(grid: str, kind: str) -> str | None:
    return None if grid == "int4-g32-sym" and not kind else f"npz holds int4-g32-sym, not {grid}"


def write(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    save_model(measured.model, measured.tokenizer, target)
    matrices = measured.stored.matrices.items()
    parts = {f"{n}.codes": codes.numpy() for n, (codes, _) in matrices}
    np.savez(target / FILE, **parts, **{f"{n}.scales": grid.scales.numpy() for n, (_, grid) in matrices})
    return {"container": "npz"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[Container]:
    """The package's containers and one more, until the test ends."""
    fresh: Registry[Container] = Registry("container")
    for name in CONTAINERS.names():
        fresh.register(name, source="the package")(CONTAINERS.get(name))
    fresh.register("npz", source="this test")(Container(reads, recognised, fits, write))
    replace_everywhere(monkeypatch, CONTAINERS, fresh)
    return fresh


def test_a_container_from_outside_is_written_read_and_listed(registry: Any, on_grid: Any, tmp_path: Path) -> None:
    student = on_grid("int4-g32-sym")
    result = export(str(student), tmp_path / "out", format="npz")
    assert (result["container"], result["check"]["weights_equal"]) == ("npz", True)
    held = recognise(tmp_path / "out")
    assert (held.kind, held.stored.format.name) == ("npz", "int4-g32-sym")
    theirs = StoredGrid.read(student).matrices
    assert all(codes.equal(theirs[name][0]) for name, (codes, _) in held.stored.matrices.items())
    assert recognise(student).kind == "remend", "the others are asked as before"
    with pytest.raises(InputError, match="npz holds int4-g32-sym, not nf4"):
        export(str(on_grid("nf4")), tmp_path / "no", format="npz")
    with pytest.raises(InputError, match=r"known: compressed-tensors, dense, gguf, npz\. Did you mean .npz."):
        export(str(student), tmp_path / "no", format="npx")


@needs_exact_unpacking
def test_every_container_claims_its_own_files_alone(on_grid: Any, tmp_path: Path, tokenizer: Any) -> None:
    student = on_grid("int4-g32-sym")
    for name in ("dense", "compressed-tensors", "gguf"):
        export(str(student), tmp_path / name, format=name)
        file = tmp_path / name / "model.gguf"
        source = find_model(str(file if file.is_file() else tmp_path / name))
        assert [n for n in CONTAINERS.names() if CONTAINERS.get(n).reads(source)] == [name]
    model = build_model(len(tokenizer))
    put_on_grid(model, "nf4").write(tmp_path / "compressed-tensors")  # remend's own description goes first
    assert packed_by(find_model(str(tmp_path / "compressed-tensors"))) is None
