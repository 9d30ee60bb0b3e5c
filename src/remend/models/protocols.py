"""What remend asks of a language model and of a tokenizer: those of transformers have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from remend.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

__all__ = ["CausalLM", "Scored", "Tokenizer"]


class Scored(Protocol):
    """What a forward pass gives."""

    logits: Tensor  # [B, T, V]


class CausalLM(Protocol):
    """A causal language model of transformers (PreTrainedModel with a head over the vocabulary).

    What has no words here is torch.nn.Module's.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig
    name_or_path: str

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def __call__(self, *, input_ids: Tensor, **inputs: object) -> Scored:
        """A forward pass over token ids [B, T]."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, with `weight` [V, D]."""

    def get_output_embeddings(self) -> nn.Linear:
        """The head, with `weight` [V, D]. `scorer` refuses a model for which transformers gives None."""

    def forward(self, *, input_ids: Tensor, **inputs: object) -> Scored: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def set_submodule(self, target: str, module: nn.Module) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def to(self, device: torch.device | torch.dtype, /) -> Self: ...

    def tie_weights(self) -> None:
        """Let the head be the embedding again, where the configuration ties them."""

    def gradient_checkpointing_enable(self, settings: Mapping[str, object], /) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: str = ...) -> None:
        """Write safetensors and configuration into a directory."""
