"""What remend asks of a language model and of a tokenizer: those of transformers have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class CausalLM(Protocol):
    """A causal language model of transformers (PreTrainedModel with a head over the vocabulary)."""

    config: Any
    generation_config: Any
    name_or_path: str

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """A forward pass; the output has `logits` [B, T, V]."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens, with `weight` [V, D]."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, with `weight` [V, D]; None for a model that has none."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """See torch.nn.Module."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See torch.nn.Module."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """See torch.nn.Module."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """See torch.nn.Module."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """See torch.nn.Module."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """See torch.nn.Module."""
        ...

    def eval(self) -> Self:
        """See torch.nn.Module."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See torch.nn.Module."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write safetensors and configuration into a directory."""
        ...


class Tokenizer(Protocol):
    """A tokenizer of transformers (PreTrainedTokenizerBase)."""

    eos_token_id: int | None
    chat_template: Any

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **how: Any) -> Any:
        """Chat messages as text or token ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write the tokenizer's files into a directory."""
        ...
