"""What is published with a model: no place on the machine that made it."""

from __future__ import annotations

from pathlib import Path

import remend
from remend.exporting import export


def test_no_local_path_in_what_is_published(reference_dir: Path, tmp_path: Path) -> None:
    remend.quantize(str(reference_dir), tmp_path / "student", format="int4-g32-sym", probe=False)
    export(str(tmp_path / "student"), tmp_path / "exported", format="dense")
    export(str(reference_dir), tmp_path / "gguf", format="gguf")
    files = [path for name in ("student", "exported", "gguf") for path in (tmp_path / name).rglob("*")]
    places = {str(reference_dir.parent).encode(), str(tmp_path).encode()}
    assert len(files) > 10
    assert not [path for path in files if path.is_file() and any(place in path.read_bytes() for place in places)]
    assert b'"model": "reference"' in (tmp_path / "student" / "degradation.json").read_bytes()
    assert b'"source": "student"' in (tmp_path / "exported" / "export.json").read_bytes()
