"""How much a model can read: token ids that it has rows for, and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from remend.errors import InputError
from remend.models.protocols import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Room:
    """What a model can read.

    rows: token ids, from 0, that it embeds.
    positions: that it has a table for (GPT-2, OPT, GPT-J): nothing longer can be read. None sets no limit.
    trained: positions that its configuration promises, or None.
    factors: length beyond which its rope takes other factors for all rows of a batch (longrope, dynamic), or None.
    """

    rows: int
    positions: int | None = None
    trained: int | None = None
    factors: int | None = None

    def less(self, other: Room) -> Room:
        """What both can read."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        rows, *rest = (min((n for n in pair if n is not None), default=None) for pair in pairs)
        assert rows is not None
        return Room(rows, *rest)

    def prompt_limit(self, limit: int, answer: int) -> tuple[int, str]:
        """The most tokens of a prompt that leaves room for an answer, where `limit` are allowed, and why in words.

        Raises InputError where no prompt would leave room.
        """
        if self.positions is not None and self.positions <= answer:
            raise InputError(
                f"an answer may have {answer} tokens, and the model has {self.positions} positions for prompt and "
                "answer together; lower max_new_tokens where it sets the length"
            )
        if self.positions is None or self.positions - answer >= limit:
            return limit, ""
        return self.positions - answer, (
            f"{self.positions - answer} (the model has {self.positions} positions"
            + (f", {answer} of them for the answer)" if answer else ")")
        )


def room_of(model: CausalLM, config: PreTrainedConfig) -> Room:
    """A model's room, from its skeleton (or itself) and configuration."""
    text = config.get_text_config()
    trained = promised_positions(text)
    return Room(text.vocab_size, _table(model, trained) if trained else None, trained, _original_length(text))


def promised_positions(text: PreTrainedConfig) -> int | None:
    """Positions that the configuration of a text model names, under whatever name."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    named = (getattr(text, name, None) for name in names)
    return next((int(value) for value in named if isinstance(value, int)), None)


def _table(model: CausalLM, length: int) -> int | None:
    """The positions that can be read, where the model looks them up in a table of `length`."""
    if model.config.get_text_config().model_type == "mpt":
        return length  # its bias is built for so many positions
    for name, module in model.named_modules():
        # some have two rows more, and leave the first two unused
        if isinstance(module, nn.Embedding) and module.num_embeddings - length in (0, 2) and _of_positions(name):
            # RoBERTa counts from the row after the one for padding, and has none more for that
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(length, module.num_embeddings - unused)
        # XGLM's table is longer by two, and is computed anew when it is too short
        named = module.named_buffers(recurse=False)
        tables = {key: table for key, table in named if table.ndim == 2 and table.is_floating_point()}
        if any(_of_positions(key) and length in table.shape for key, table in tables.items()):
            return length
    return None


def _of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "pos" in last or last == "wpe"


def _original_length(text: PreTrainedConfig) -> int | None:
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(kind for kind in rope.values() if isinstance(kind, Mapping)),
    ]  # some have one for each kind of layer
    lengths = [
        kind.get("original_max_position_embeddings")
        if kind["rope_type"] == "longrope"
        else text.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("longrope", "dynamic")
    ]
    return min((int(length) for length in lengths if length), default=None)
