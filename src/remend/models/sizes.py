"""Sizes that a configuration names, whatever shape it gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def largest(config: PreTrainedConfig, name: str) -> int:
    """A number of the configuration, the largest where there is one per layer; 0 where it has none of that name."""
    value = getattr(config, name, None) or 0
    return int(max(value) if isinstance(value, list | tuple) else value)


_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attention")


def window(config: PreTrainedConfig) -> int:
    """Tokens that the nearest-sighted layers see, as far as the configuration names such a window; else 0."""
    named = [largest(config, name) for name in _WINDOWS]
    return min((size for size in named if size > 0), default=0)
