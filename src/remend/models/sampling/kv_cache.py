"""A key-value cache for decoding that writes in place.

transformers' DynamicCache copies all keys and values once a token and layer, and under autocast the attention converts
them all once more. Here they stand in buffers with room to spare, in the dtype that the attention multiplies in.

Legend: B rows, H heads, T tokens so far, D width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOM = 64
"""Tokens that there is room for behind the first ones at least. When it is full a buffer grows by half, so that answers
far below the length limit take little memory."""


def decoding_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a transformers model of `config`.

    Layers that are not plain attention (sliding windows, states) keep the kind of cache that transformers gives them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_Room() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Room(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: `keys` and `values` are the used part [B, H, T, D] of larger buffers.

    Only what decoding asks for is here: what transformers' layer does beside it would leave the buffers behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write what is new behind what is there, and return all."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        new = (key_states, value_states)
        if not self.is_initialized or stop > self._buffers[0].shape[-2]:
            self._grow(new, start, stop + max(ROOM, stop // 2))
        for buffer_BHTD, states_BHTD in zip(self._buffers, new, strict=True):
            buffer_BHTD[..., start:stop, :] = states_BHTD
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        if self.is_initialized:
            self._buffers = [buffer_BHTD[indices] for buffer_BHTD in self._buffers]
            self._show(self.get_seq_length())

    def _grow(self, new: tuple[Tensor, Tensor], used: int, room: int) -> None:
        old, self._buffers = self._buffers, []
        for at, states_BHTD in enumerate(new):
            batch, heads, _, width = states_BHTD.shape
            buffer_BHTD = states_BHTD.new_empty(batch, heads, room, width, dtype=_dtype(states_BHTD))
            if used:
                buffer_BHTD[..., :used, :] = old[at][..., :used, :]
            self._buffers.append(buffer_BHTD)
        self.dtype, self.device, self.is_initialized = self._buffers[0].dtype, new[0].device, True

    def _show(self, stop: int) -> None:
        self.keys, self.values = (buffer_BHTD[..., :stop, :] for buffer_BHTD in self._buffers)


def _dtype(states: Tensor) -> torch.dtype:
    """What attention multiplies in: autocast's dtype where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
