"""Remove whole blocks: a standard, shallower model and the map of the blocks that stayed.

remend degrade depth smollm2 --layers 5 --out student
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from remend.degrade.kinds import DEGRADATIONS, Calibrated, degrade
from remend.errors import InputError
from remend.files.settings import takes

if TYPE_CHECKING:
    from remend.degrade.making.job import Changed, Damage
    from remend.files.atomic import JsonObject

GIVEN = "list"


@DEGRADATIONS.register("depth", source="ways to choose blocks: making/blocks.py")
class Depth(Calibrated):
    """Remove whole layers.

    In degradation.json `layer_map` holds, for every layer that stays, its number in the reference, from 0.
    """

    layers: int | list[int] = Field(
        5, description="how many layers to remove, such as 5, or which: 23,24 (a single one with a comma too: 23,)"
    )
    method: str = Field(
        "block-influence",
        description="how they are chosen: block-influence or angular; list stands for layers that were named",
    )

    @model_validator(mode="before")
    @classmethod
    def _given_blocks_need_no_method(cls, values: object) -> object:
        if isinstance(values, Mapping) and isinstance(values.get("layers"), list) and "method" not in values:
            return {**values, "method": GIVEN}
        return values

    def check(self) -> None:
        """Raise InputError for an unknown method, or one that the blocks don't go with."""
        from remend.degrade.making.blocks import METHODS

        if isinstance(self.layers, list):
            if self.method != GIVEN:
                raise InputError(
                    f'a list of blocks goes with method "{GIVEN}"; method "{self.method}" chooses, so give a number'
                )
        elif self.method == GIVEN:
            raise InputError(f'method "{GIVEN}" needs the blocks themselves, e.g. 23,24,25,26,27, not a number')
        else:
            METHODS.get(self.method)

    def title(self) -> str:
        return "removing blocks"

    def change(self, damage: Damage) -> Changed:
        """Raises InputError for blocks that are not there, and where none would stay."""
        from remend.degrade.making import blocks
        from remend.degrade.making.job import Changed

        removed = blocks.removed_blocks(damage, self.layers, self.method)
        student, stayed = blocks.without_blocks(damage.reference, removed)
        entry = {"kind": "pruning", "method": f"depth:{self.method}", "removed_layers": removed, "layer_map": stayed}
        return Changed(student, entry)


@takes(Depth)
def prune_depth(model: str | Path, out: str | Path, *, layers: int | Sequence[int], **overrides: object) -> JsonObject:
    """Remove blocks of a model and save the shallower one. See kinds.degrade; `overrides` are fields of Depth.

    Args:
        model, out: as of kinds.degrade.
        layers: how many blocks to remove, or the numbers of those, from 0.
    """
    return degrade("depth", model, out, {"layers": layers, **overrides})
