"""A GGUF file's header is parsed once a process, and again when the file is another."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf.gguf_reader
import pytest

from remend.models.gguf_header import forget, parsed_once


def test_readers_are_shared_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Reader:
        def __init__(self, path: str) -> None:
            made.append(path)

    monkeypatch.setattr(gguf.gguf_reader, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    forget()
    with parsed_once():
        first = gguf.GGUFReader(path)
        assert gguf.GGUFReader(str(path)) is first
    with parsed_once():
        assert gguf.GGUFReader(path) is first
        path.write_bytes(b"other")
        assert gguf.GGUFReader(path) is not first
        forget()
        gguf.GGUFReader(path)
    assert len(made) == 3
    assert gguf.GGUFReader is Reader
    forget()


def test_a_name_map_is_made_once_and_is_the_packages_own() -> None:
    architecture = gguf.MODEL_ARCH.LLAMA
    own = gguf.get_tensor_name_map
    with parsed_once():
        again = gguf.get_tensor_name_map(architecture, 3)
        assert gguf.get_tensor_name_map(architecture, 3) is again
        assert gguf.get_tensor_name_map(architecture, 4) is not again
    assert again.mapping == own(architecture, 3).mapping
    assert gguf.get_tensor_name_map is own
