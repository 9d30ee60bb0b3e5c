"""Special token ids."""

from __future__ import annotations

from typing import Any


def eos_ids(model_or_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    generation = getattr(model_or_config, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(v) for v in value)
    return tuple(sorted(found))
