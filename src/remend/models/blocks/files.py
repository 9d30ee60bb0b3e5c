"""Tensors of safetensors files by name, read one at a time from files that must not change meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remend.errors import FileError

AGAIN = "put back the file that was there, and give the command again"


@dataclass
class TensorFiles:
    """Reads tensors from the files that `of` found them in.

    places: the file of each tensor.
    facts: of each file its size, the time of its last change, and its inode, when it was first looked at.
    """

    places: Mapping[str, Path]
    facts: Mapping[Path, tuple[int, int, int]]
    _open: dict[Path, Any] = field(default_factory=dict)
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(paths: Iterable[Path]) -> TensorFiles:
        """Every tensor of these files. Raises FileError for a file that can't be read."""
        places, facts = dict[str, Path](), dict[Path, tuple[int, int, int]]()
        for path in paths:
            facts[path] = _facts(path)
            with _readable(path), safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        return TensorFiles(places, facts)

    def read(self, name: str) -> Tensor:
        """A tensor in the file's dtype. It may be a view into the file, and must not be written to.

        Raises FileError where the file changed since it was first looked at.
        """
        kept = self._kept.get(name)
        tensor: Tensor = self._file(self.places[name]).get_tensor(name) if kept is None else kept
        return tensor

    def keep(self, *, pinned: bool) -> None:
        """Read every tensor now, into the CPU's memory; `pinned`: from where a GPU can fetch it."""
        for name in self.places:
            tensor = self.read(name)
            self._kept[name] = tensor.pin_memory() if pinned else tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._file(self.places[name]).get_slice(name).get_shape())

    def metadata(self, path: Path) -> Mapping[str, str]:
        """What a file's header says beside its tensors."""
        return self._file(path).metadata() or {}

    def _file(self, path: Path) -> Any:
        if _facts(path) != self.facts[path]:
            raise FileError(f"{path} changed while it was being read block by block: {AGAIN}")
        if path not in self._open:
            with _readable(path):
                self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path]


class _readable:
    """Turns what can't be opened into one message."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SafetensorError | OSError) and not isinstance(error, FileError):
            raise FileError(f"{self.path} can't be read: {' '.join(str(error).split())[:200]}") from None


def _facts(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise FileError(f"{path} is gone ({error.strerror}) while it is read block by block: {AGAIN}") from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors on the CPU, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(bytes_of(tensors[name]))
    return total.hexdigest()
