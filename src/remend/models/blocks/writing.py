"""Write a model's files part by part: what is in each is settled beforehand, and the numbers follow block by block.

The files are those that `models.load.save_model` and `safetensors.torch.save_file` would write of the whole model, byte
for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from remend.console import stage
from remend.errors import FileError
from remend.files.atomic import TEMPORARY, JsonObject, write_json
from remend.files.own import open_own
from remend.files.reading import read_object
from remend.models.blocks import part_of, parts_of
from remend.models.blocks.files import TensorFiles, bytes_of, digest_of
from remend.models.protocols import CausalLM

_KINDS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""safetensors' names, in the order in which it sorts them: the last of these lies first in a file."""


class PlannedFile:
    """A safetensors file of known tensors, whose numbers are written in any order.

    Args:
        path: where it is; one that is there already is gone on with.
        tensors: by name, of the dtypes and shapes to come (on the meta device).
        metadata: of its header.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path, self._tensors = path, dict(tensors)
        self.names = list(tensors)
        order, kinds = sorted(tensors), list(_KINDS)
        order.sort(key=lambda name: -kinds.index(tensors[name].dtype))
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for name in order:
            tensor = tensors[name]
            size = tensor.numel() * tensor.element_size()
            self._starts[name] = at
            header[name] = {
                "dtype": _KINDS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._begins, self.size = 8 + len(text), 8 + len(text) + at
        self._head = struct.pack("<Q", len(text)) + text

    def there(self) -> bool:
        """Whether the file was made as planned, whatever its numbers are."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with self.path.open("rb") as stream:
            return stream.read(len(self._head)) == self._head

    def create(self) -> None:
        """Make the file with its header and its full length, whose numbers are zeros."""
        descriptor = open_own(self.path)
        try:
            _reserve(descriptor, self.size)
            _write_all(descriptor, self._head, 0)
        finally:
            os.close(descriptor)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put numbers in their place, durably. They must be of the dtypes and shapes that were planned."""
        descriptor = open_own(self.path)
        try:
            for name, tensor in tensors.items():
                planned = self._tensors[name]
                assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), name
                _write_all(descriptor, bytes_of(tensor.cpu()), self._begins + self._starts[name])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its length, on the disk too where the system can: a disk that is too small is known at once."""
    os.ftruncate(descriptor, 0)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, content: bytes | memoryview, at: int) -> None:
    while len(content):
        done = os.pwrite(descriptor, content[: 2**30], at)
        content, at = content[done:], at + done


@contextmanager
def planned() -> Iterator[list[PlannedFile]]:
    """Inside, transformers' `save_pretrained` writes no weights; the list says which files it would have written."""
    from transformers import modeling_utils

    files: list[PlannedFile] = []
    whole = modeling_utils.safe_save_file

    def note(tensors: Mapping[str, Tensor], filename: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        files.append(PlannedFile(Path(filename), empty, metadata or {}))

    modeling_utils.safe_save_file = note
    try:
        yield files
    finally:
        modeling_utils.safe_save_file = whole


class PlannedFiles:
    """Several files, of which each tensor lies in one."""

    def __init__(self, files: Sequence[PlannedFile]) -> None:
        self.files = list(files)
        self._of = {name: file for file in files for name in file.names}

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def create(self) -> None:
        """See PlannedFile. Raises FileError, before any is there, where the disk has no room for all of them."""
        place = self.files[0].path.parent
        needed = sum(file.size for file in self.files)
        there = sum(file.path.stat().st_size for file in self.files if file.path.is_file())
        free = shutil.disk_usage(place).free
        if needed > free + there:
            raise FileError(
                f"the disk is too small: files of weights take {needed / 2**20:.1f} MiB, and "
                f"{(free + there) / 2**20:.1f} MiB are free in {place.parent}; free some space, or name another disk"
            )
        for file in self.files:
            file.create()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """See PlannedFile."""
        for file in self.files:
            own = {name: tensor for name, tensor in tensors.items() if self._of[name] is file}
            if own:
                file.write(own)


def tensors_of(modules: Mapping[str, nn.Module], files: PlannedFiles) -> dict[str, Tensor]:
    """Parameters and buffers of modules, by their full names, as far as the files are to hold them."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        named = {f"{name}.{local}" if name else local: tensor.detach() for local, tensor in own.items()}
        tensors |= {full: tensor for full, tensor in named.items() if full in files}
    return tensors


def write_parts(
    model: CausalLM, files: PlannedFiles, beside: Callable[[Mapping[str, nn.Module]], Mapping[str, Tensor]]
) -> None:
    """Make the files, and write a model into them part by part.

    Args:
        model: its blocks may be anywhere.
        files: planned.
        beside: what the files hold of some modules, which have their weights, beside their tensors or in place of them.
    """
    files.create()
    with stage("writing", len(parts_of(model))) as advance:
        for number in parts_of(model):
            with part_of(model, number) as modules:
                files.write({**tensors_of(modules, files), **beside(modules)})
            advance()


JOURNAL = f"{TEMPORARY}journal.json"


class PartByPart:
    """Files that are written in parts, each durable before the next begins; a killed writer is gone on with.

    Args:
        directory: of `files.atomic.resumable_directory`.
        files: planned, below it.
    """

    def __init__(self, directory: Path, files: PlannedFiles) -> None:
        self._path, self._files = directory / JOURNAL, files
        self._done: list[JsonObject] = []
        if self._path.is_file() and all(file.there() for file in files.files):
            self._done = _whole(read_object(self._path).get("parts", []), files)
        if not self._done:
            self._path.unlink(missing_ok=True)
            files.create()

    def done(self, number: int) -> JsonObject | None:
        """What was told of a part that is written already, counted from 0; None of one that is not."""
        return self._done[number]["about"] if number < len(self._done) else None

    def write(self, tensors: Mapping[str, Tensor], about: JsonObject) -> None:
        """The next part, and what is to be known of it."""
        self._files.write(tensors)
        digest = digest_of({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._done.append({"tensors": sorted(tensors), "sha256": digest, "about": about})
        write_json(self._path, {"parts": self._done})

    def end(self) -> None:
        """All parts are there."""
        self._path.unlink()


def _whole(parts: list[JsonObject], files: PlannedFiles) -> list[JsonObject]:
    """The parts from the first on whose numbers are still what was written."""
    there = TensorFiles.of([file.path for file in files.files])
    for number, part in enumerate(parts):
        names = part["tensors"]
        if any(n not in files for n in names) or digest_of({n: there.read(n) for n in names}) != part["sha256"]:
            return parts[:number]
    return parts
