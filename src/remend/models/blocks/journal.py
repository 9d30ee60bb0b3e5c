"""Keeps what a walk makes of the blocks of a model on the disk, one file a block, so that a killed one goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from remend.files.atomic import JsonObject
from remend.models.blocks.disk import OnDisk


class BlockJournal:
    """The journal of one walk (see walk.Journal) over blocks on the disk.

    Args:
        blocks: of the model that is walked; from now on those that lie in `directory` are its own.
        directory: where changed blocks go.
    """

    def __init__(self, blocks: OnDisk, directory: Path) -> None:
        self._blocks, self._directory = blocks, directory
        self._beside: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Take up what an earlier process left. Raises FileError for a block that changed since."""
        self._blocks.keep_changes(self._directory)

    def done(self, index: int) -> JsonObject | None:
        """See walk.Journal."""
        written = self._blocks.written(index)
        return written[1] if written else None

    def note(self, name: str, tensor: Tensor) -> None:
        """What is to be kept beside the weights of the block at work, should it be kept."""
        self._beside[name] = tensor

    def settle(self, index: int, block: nn.Module, about: JsonObject) -> None:
        """See walk.Journal."""
        kept = bool(about["kept"])
        weights = {name: p.detach() for name, p in block.named_parameters()} if kept else {}
        self._blocks.write_about(index, weights, self._beside if kept else {}, about)
        self._beside = {}

    def as_it_came(self) -> AbstractContextManager[None]:
        """See walk.Journal."""
        return self._blocks.as_it_came()
