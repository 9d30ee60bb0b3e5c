"""Where a model's weights are kept while it is worked on: settled by the user, or by what memory is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from remend.errors import InputError
from remend.files.settings import Placement
from remend.models.blocks.files import TensorFiles
from remend.models.blocks.opening import from_disk, not_on_disk
from remend.models.device import free_bytes
from remend.models.find import ModelSource, complete, require_readable, weight_files
from remend.models.load import load_model
from remend.models.protocols import CausalLM

SHARE = 0.8
"""Of the free memory that may be planned for: other programs take some, and an estimate is none."""


@dataclass(frozen=True)
class Placed:
    """Where a model is kept: device, host or disk; and why, in a sentence, where nobody asked for it."""

    where: Literal["device", "host", "disk"] = "device"
    why: str = ""

    @property
    def by_block(self) -> bool:
        """Whether blocks come one by one."""
        return self.where != "device"

    def load(
        self, source: ModelSource, *, dtype: torch.dtype, device: torch.device, attention: str | None = None
    ) -> CausalLM:
        """The model; see `load_model` and `from_disk`."""
        if not self.by_block:
            return load_model(source, dtype=dtype, device=device, attention=attention)
        host = self.where == "host"
        return from_disk(source, dtype=dtype, device=device, attention=attention, in_memory=host)


def numbers_in(source: ModelSource) -> int | None:
    """How many numbers a local directory of plain safetensors holds; None where they are not read one by one.

    Raises FileError for a file that can't be read.
    """
    if not_on_disk(source) or source.path is None or (source.repo and not complete(source.path)):
        return None
    require_readable(source.path, source.spec)
    files = TensorFiles.of(weight_files(source.path))
    return sum(math.prod(files.shape(name)) for name in files.places)


def place(asked: Placement, source: ModelSource, needed: int | None, device: torch.device, work: str) -> Placed:
    """Where a model is to be kept.

    Args:
        asked: the setting.
        source: the model, fetched if it is of the hub.
        needed: bytes that the work takes with all weights in memory; None where that is not known.
        device: where the arithmetic runs.
        work: what is to be done, for messages: 'degrade quantize'.

    Raises InputError for a model that can't be kept where the user wants it.
    """
    if asked == "device" or (asked == "host" and device.type == "cpu"):
        return Placed()
    why_not = not_on_disk(source)
    if asked != "auto":
        if why_not:
            raise InputError(
                f"placement {asked} can't be had for {source.spec}: {why_not}. Write it as plain safetensors first "
                "(remend export --format dense), or leave placement to auto"
            )
        return Placed(asked)
    free = free_bytes(device)
    if needed is None or needed <= SHARE * free or why_not:
        return Placed()
    return Placed(
        "disk",
        f"placement: disk for {source.spec} ({work} would take {needed / 1e9:.1f} GB with all weights in memory, and "
        f"{free / 1e9:.1f} GB are free)",
    )
