"""transformers parses a GGUF file's header anew for configuration, tokenizer and weights; here it is parsed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from remend.files.reading import FETCH, understood

if TYPE_CHECKING:
    import gguf


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, transformers gets a file's last reader again as long as the file is the same, and a name map likewise.

    `forget` lets go of the reader, which is large. A header takes seconds to parse, since it holds the vocabulary,
    and a command that trains would parse it five times; so does the name map, which transformers makes once a tensor.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = header
    gguf.get_tensor_name_map = _name_map
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def forget() -> None:
    """Free the last header; its vocabulary is some small arrays a token."""
    _read.cache_clear()


def header(path: str | Path) -> gguf.GGUFReader:
    """A GGUF file, its header parsed. Raises FileError for a damaged one."""
    status = Path(path).stat()
    return _read(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _read(path: str, _changed: int, _size: int) -> gguf.GGUFReader:
    with understood(path, FETCH, kinds=(Exception,)):  # it raises whatever its arrays do
        return _plain_reader()(path)


def _plain_reader() -> type[gguf.GGUFReader]:
    """The reader, with plain arrays over the file's pages: slices of numpy's memmap take three times as long."""
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class PlainReader(GGUFReader):  # type: ignore[misc]  # its package has no types
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return PlainReader


@lru_cache(maxsize=4)
def _name_map(architecture: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(architecture, layers)


def general(path: Path) -> dict[str, object]:
    """The fields of a header that say what the file is, without their prefix 'general.': name, license and so on."""
    fields = header(path).fields
    return {
        name.removeprefix("general."): field.contents() for name, field in fields.items() if name.startswith("general.")
    }
