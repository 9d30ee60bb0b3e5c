"""The order of what is trained on, seeds, and batches of like lengths: each follows from its arguments alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words: independent streams from one user's seed, with no state to save."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches_by_length(
    lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None, longest_first: bool = False
) -> list[list[int]]:
    """Indices in batches of like lengths, since these pad least; equal lengths keep their order.

    Args:
        lengths: tokens of each sequence.
        rows: at most so many sequences a batch; None sets no limit.
        tokens: at most so many tokens a batch, each sequence counted as long as the batch's longest; a single one is
            always allowed. None sets no limit.
        longest_first: begin with the longest, so that a batch that does not fit the memory is met at once.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=longest_first):
        count = len(batches[-1]) + 1 if batches else 0
        longest = max(lengths[i], lengths[batches[-1][0]]) if batches else 0
        full = (rows is not None and count > rows) or (tokens is not None and count * longest > tokens)
        if not batches or full:
            batches.append([])
        batches[-1].append(i)
    return batches


Item = TypeVar("Item")


class Order(Generic[Item]):
    """An endless order of what is trained on: one seeded permutation after another, a function of position alone."""

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def take(self, start: int, count: int) -> list[tuple[int, Item]]:
        """Positions start … start + count − 1, each with its item."""
        return [(at, self._at(at)) for at in range(start, start + count)]

    def _at(self, position: int) -> Item:
        epoch, within = divmod(position, len(self._items))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", epoch))
            self._permutation = torch.randperm(len(self._items), generator=generator).tolist()
            self._epoch = epoch
        return self._items[self._permutation[within]]
