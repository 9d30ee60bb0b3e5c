"""What `save_model` would write of a model, planned without its numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from remend.models.blocks.writing import PlannedFile, planned
from remend.models.load import empty_of, save_model
from remend.models.protocols import CausalLM, Tokenizer


def planned_model(
    model: CausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    max_shard_size: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[PlannedFile]:
    """Write everything into an empty directory that `save_model` writes, but the weights: their files are planned.

    Args:
        model: its blocks may be anywhere; it stays as it is.
        tokenizer, max_shard_size: as of `save_model`.
        dtype: of the weights.
    """
    shell = empty_of(model)
    for parameter in shell.parameters():
        parameter.data = parameter.data.to(dtype)
    return planned_shell(shell, model, tokenizer, directory, max_shard_size)


def planned_shell(
    shell: CausalLM, model: CausalLM, tokenizer: Tokenizer, directory: Path, max_shard_size: str | None
) -> list[PlannedFile]:
    """The same of a shell of a model, which may have other parameters by now; they are without numbers."""
    shell.generation_config = model.generation_config
    # as of a model whose tensors transformers loaded by their own names: it then cuts shards in the order of the names
    shell._weight_conversions = []  # type: ignore[attr-defined]
    with planned() as files:
        save_model(shell, tokenizer, directory, max_shard_size=max_shard_size)
    return files
