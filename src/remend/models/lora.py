"""Settings of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from remend.files.settings import Number, Settings


def _names(value: object) -> object:
    """A text names matrices with commas between, as a command line gives them; all-linear is no such name."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


class LoraConfig(Settings):
    """A LoRA adapter (arXiv 2106.09685) that is trained in place of the weights; they stay as they are."""

    aliases: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "target_modules": "targets",
        "lora_dropout": "dropout",
    }

    rank: int = Field(16, ge=1, description="rank of the update of every target matrix")
    alpha: int | None = Field(None, ge=1, description="the update is scaled by alpha / rank; by default 2 · rank")
    targets: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_names)] = Field(
        "all-linear",
        description="which matrices: all-linear (the decoder's, not the head), or ends of names such as q_proj",
    )
    dropout: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the adapter's inputs that a training pass leaves out (peft's lora_dropout)",
    )
