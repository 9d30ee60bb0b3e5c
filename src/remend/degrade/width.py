"""Make every block narrower: fewer channels in its MLP, fewer attention heads; a standard, smaller model.

remend degrade width smollm2 --ffn 0.25 --out student
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from remend.degrade.kinds import DEGRADATIONS, Calibrated, degrade
from remend.errors import InputError
from remend.files.settings import Number, takes

if TYPE_CHECKING:
    from remend.degrade.making.job import Changed, Damage
    from remend.files.atomic import JsonObject


@DEGRADATIONS.register("width", source="Minitron, arXiv 2407.14679, section 2.2")
class Width(Calibrated):
    """Remove feed-forward channels and attention heads from every layer, the least active ones.

    The student's remend/width.safetensors says which ones stayed, int32, rising: '<block>.mlp.channels' and, where
    heads were dropped, '<block>.self_attn.groups'; a group is the query heads that share one key-value head. The new
    width is a multiple of 32 where possible. In degradation.json `kept_channels` is the SHA-256 of that file.
    """

    ffn: Number = Field(0.25, description="share of feed-forward channels to remove")
    heads: int = Field(0, description="key-value head groups to remove from each layer")

    def check(self) -> None:
        """Raise InputError for a share out of range, and where nothing would be dropped."""
        if not 0 <= self.ffn < 1:
            raise InputError(f"ffn is {self.ffn}; allowed is a share of channels from 0 to below 1, e.g. 0.25")
        if not self.ffn and not self.heads:
            raise InputError("ffn 0 and heads 0 drop nothing; give one of them")

    def title(self) -> str:
        return "cutting the width"

    def change(self, damage: Damage) -> Changed:
        """Raises InputError for an architecture without these parts, and where none would stay."""
        from remend.degrade.making import channels

        return channels.narrower(damage, self.ffn, self.heads)


@takes(Width)
def prune_width(model: str | Path, out: str | Path, **overrides: object) -> JsonObject:
    """Remove channels and heads of a model and save the rest. See kinds.degrade; `overrides` are fields of Width."""
    return degrade("width", model, out, overrides)
