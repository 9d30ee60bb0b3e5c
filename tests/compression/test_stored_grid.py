"""remend/grid.safetensors: what is no grid, or one of another shape, is refused with the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.grid_training import pair
from remend.compression.stored_grid import GRID_FILE, StoredGrid
from remend.errors import FileError, InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pair()[2].write(tmp_path)
    return tmp_path / "remend" / GRID_FILE


def test_no_file_is_no_grid(tmp_path: Path) -> None:
    assert StoredGrid.read(tmp_path) is None
    assert StoredGrid.read(tmp_path / "missing") is None


def test_a_grid_is_the_same_file_each_time(path: Path, tmp_path: Path) -> None:
    stored = pair()[2]
    for i in range(8):  # several entries of a header would stand in one of several orders
        (tmp_path / str(i)).mkdir()
        stored.write(tmp_path / str(i))
        assert (tmp_path / str(i) / "remend" / GRID_FILE).read_bytes() == path.read_bytes()


def test_a_grid_beside_the_weights_is_read_as_version_0_1_wrote_it(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    save_file(load_file(path), old / GRID_FILE, metadata={"remend_grid": "2", "format": "int3-g64-asym", "formula": ""})
    before, now = StoredGrid.read(old), StoredGrid.read(tmp_path)
    assert before is not None
    assert now is not None
    assert before.format == now.format
    assert all(codes.equal(now.matrices[name][0]) for name, (codes, _) in before.matrices.items())


@pytest.mark.parametrize("content", [b"not a safetensors file at all", b"", "cut short"])
def test_what_is_no_safetensors_file_is_a_file_error(path: Path, content: Any) -> None:
    path.write_bytes(path.read_bytes()[:10_000] if content == "cut short" else content)
    with pytest.raises(FileError, match=rf"{GRID_FILE} can't be read as a quantization grid"):
        StoredGrid.read(path.parent.parent)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("scales", None),
        ("zeros", None),
        ("scales", torch.ones(3, 5, dtype=torch.float16)),
        ("codes", torch.full((64, 64), 8, dtype=torch.uint8)),  # beyond the 8 levels
        ("codes", torch.zeros(64, 64, dtype=torch.int32)),
        ("codes", torch.zeros(64, 60, dtype=torch.uint8)),
    ],
)
def test_a_tensor_that_is_missing_or_does_not_fit_is_a_file_error(path: Path, key: str, tensor: Any) -> None:
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert tensors.pop(f"{name}.{key}") is not None
    changed = {} if tensor is None else {f"{name}.{key}": tensor}
    save_file({**tensors, **changed}, path, metadata={"format": "int3-g64-asym"})
    with pytest.raises(FileError, match=rf"{GRID_FILE} can't be read as a quantization grid"):
        StoredGrid.read(path.parent.parent)


@pytest.mark.parametrize("metadata", [None, {"format": "int7-g64"}, {"remend_grid": "{"}, {"remend_grid": "[3]"}])
def test_a_format_that_is_missing_or_unknown_is_a_file_error(path: Path, metadata: Any) -> None:
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(FileError, match=rf"{GRID_FILE} can't be read as a quantization grid"):
        StoredGrid.read(path.parent.parent)


def test_a_grid_of_another_model_is_refused() -> None:
    _, student, stored = pair()
    name = list(stored.matrices)[3]
    with torch.no_grad():
        student.get_parameter(name)[0, 0] += 1e-4
    with pytest.raises(InputError, match=f"{name} does not lie on its grid: {GRID_FILE} belongs to another model"):
        stored.check(student)
    codes, grid = stored.matrices[name]
    for odd in ({f"{name}.more": (codes, grid)}, {name: (codes[:, :32], grid)}):
        with pytest.raises(InputError, match=r"the grid describes model\.layers.* which the model does not have"):
            StoredGrid(stored.format, odd).check(student)
