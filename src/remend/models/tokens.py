"""Special token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remend.models.protocols import CausalLM, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def eos_ids(model_or_config: CausalLM | PreTrainedConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    generation = getattr(model_or_config, "generation_config", None)
    ids: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(v) for v in value)
    return tuple(sorted(ids))
