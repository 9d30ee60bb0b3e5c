"""The order of what is trained on, and seeds: both follow from the user's seed and a position alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words: independent streams from one user's seed, with no state to save."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
