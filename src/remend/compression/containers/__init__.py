"""Containers of weights: each file here reads one, writes it, or both, and registers what it can do.

To add one, write its functions and register a `Container` of them; see `dense` for the least. The folder is scanned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from remend.compression.stored_grid import GRID_FILE, StoredGrid
from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.files.reading import read_object
from remend.files.signed import unsigned
from remend.models.find import ModelSource, own_file
from remend.models.packed_weights import packing
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.written import FILES, RECORD
from remend.registry import Registry, register_all


@dataclass(frozen=True)
class Recognised:
    """What a model's files say of its constraint.

    Attributes:
        kind: 'remend', 'gguf', 'compressed-tensors', 'plain', 'adapter' (the rest is its base's), or the packing's own
            name.
        stored: the grid that the linear weights lie on, or None.
        mask: whether exact zeros are to be kept.
        why: one sentence for the reader: what was found, or why it is held as dense.
        sparsity: share of exact zeros in the linear weights, where it was counted.
        pattern: '2:4' or '4:8' where every group of a row keeps that few, else None.
    """

    kind: str
    stored: StoredGrid | None
    mask: bool
    why: str
    sparsity: float | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class Measured:
    """A model that is written: loaded as it was measured, and what is known of it.

    `mask` says in one sentence which zeros it keeps, `degradation` is its degradation.json. `run` is the run's
    directory, or None for a model alone. `max_shard_size` is of one file that is written, None for transformers' own.
    """

    source: ModelSource
    model: CausalLM
    tokenizer: Tokenizer
    stored: StoredGrid | None
    mask: str | None
    degradation: JsonObject | None
    run: Path | None
    max_shard_size: str | None = None

    @property
    def grid(self) -> str:
        """The grid's name, or 'none'."""
        return self.stored.format.name if self.stored else "none"


class Write(Protocol):
    """Writes a model into an empty directory."""

    def __call__(self, measured: Measured, target: Path, kind: str) -> dict[str, str]:
        """Facts for export.json: 'container', 'file' where the model is one file, 'note' on what it can't hold.

        The kind is one that fits.

        Raises InputError for a model that can't be written exactly.
        """


@dataclass(frozen=True)
class Container:
    """One way to keep a model in files that transformers opens.

    Attributes:
        reads: whether these files are such a container, by names and configuration; `source` is local.
        recognise: the constraint that the files carry. Raises InputError for what can't be held, unless `as_dense`.
        fits: (the grid's name or 'none', what follows the colon in --format) → None, or why it can't be written.
        write: None for a container that is only read; then `fits` is never asked.
        differing: names of parameters that the container's own reader does not read back from the files bit for bit;
            None where transformers is the only reader.
        reader: that reader's name.
        sharded: whether `write` can cut the weights into several files.
        write_by_block: the same as `write`, of a model whose blocks are not in memory; None where there is no such way.
        opened_by_block: opens what that wrote, likewise.
    """

    reads: Callable[[ModelSource], bool]
    recognise: Callable[[ModelSource, bool], Recognised]
    fits: Callable[[str, str], str | None] = lambda grid, kind: None
    write: Write | None = None
    differing: Callable[[Path, CausalLM], list[str]] | None = None
    reader: str = ""
    sharded: bool = False
    write_by_block: Write | None = None
    opened_by_block: Callable[[ModelSource, torch.device], CausalLM] | None = None


CONTAINERS: Registry[Container] = Registry("container")


def container_of(source: ModelSource) -> Container | None:
    """The container of a local model's files; None for weights that another tool packed in a way unknown here.

    What was registered last is asked first.
    """
    return next((container for container in reversed(CONTAINERS.entries.values()) if container.reads(source)), None)


def formats_of(grid: str) -> list[str]:
    """As what `remend export --format` can write a model on this grid ('none': free weights), engines' formats first.

    A container that only takes such a model as float32 is named with that, as in 'gguf:f32'.
    """
    formats = [
        f"{name}:{kind}" if kind else name
        for name, container in CONTAINERS.entries.items()
        if container.write and (kind := next((k for k in ("", "f32") if not container.fits(grid, k)), None)) is not None
    ]
    return sorted(formats, key=lambda name: name == "dense")


def packed_by(source: ModelSource) -> str | None:
    """The tool that packed a directory's weights, as its config.json names it.

    None for weights that are not packed, and for a directory with remend's own description of its grid.
    """
    if source.kind != "directory" or source.path is None or own_file(source.path, GRID_FILE):
        return None
    config = packing(source.path)
    return str(config.get("quant_method", "unknown")) if config else None


def held_as_dense(kind: str, source: ModelSource, reason: object, as_dense: bool) -> Recognised:
    """A model whose grid can't be held: taken as plain weights where that was asked for, else an InputError."""
    if as_dense:
        return Recognised(kind, None, False, f"held as dense: {reason}")
    raise InputError(
        f"{source.spec}: {reason}; say --as dense (as_dense: true in a recipe) to train its weights freely"
    ) from None


def read_record(directory: Path) -> JsonObject:
    """How the model in a directory was damaged; empty where that is not told. Raises FileError for an unreadable one.

    The hashes of its files, and its own, are left out: they belong to that directory alone.
    """
    path = directory / RECORD
    content = read_object(path) if path.is_file() else {}
    return {key: value for key, value in unsigned(content).items() if key != FILES}


def set_to_zero(record: JsonObject) -> bool:
    """Whether a record tells of weights that were set to zero, in share or pattern."""
    # removed layers and channels are pruning too, and a zero in what they leave is one of the reference's own
    smaller = str(record.get("method")).startswith(("depth", "width"))
    return record.get("kind") == "pruning" and not smaller and bool(record.get("sparsity"))


def was_pruned(directory: Path) -> bool:
    """Whether the record beside the weights says that some were set to zero: the zeros are then no grid's accident."""
    return set_to_zero(read_record(directory))


register_all(__name__)
