"""Quantize a model's linear layers onto a grid and save it as a plain transformers directory.

remend degrade quantize smollm2 --format int3-g64 --out student
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from remend.degrade.kinds import DEGRADATIONS, Calibrated, degrade
from remend.files.settings import takes

if TYPE_CHECKING:
    from remend.compression.grids import GridFormat
    from remend.degrade.making.by_block import BlockWork
    from remend.degrade.making.job import Changed, Damage
    from remend.files.atomic import JsonObject


@DEGRADATIONS.register("quantize", source="ways onto a grid: making/onto_grid.py")
class Quantize(Calibrated):
    """Quantize every linear layer of the decoder onto a grid."""

    format: str = Field("int3-g64", description="int3-g64, int4-g32-sym, gguf:q4_0, nf4, nvfp4, …")
    method: str = Field("rtn", description="how weights are put on the grid: rtn or gptq")
    skip: list[str] = Field(default_factory=list, description="layers to leave as they are, e.g. '*.down_proj'")

    def grid_format(self) -> GridFormat:
        """`format`, read. Raises InputError for an unknown one."""
        from remend.compression.grids import GridFormat

        return GridFormat.parse(self.format)

    def check(self) -> None:
        """Raise InputError for an unknown format or method."""
        from remend.degrade.making.onto_grid import METHODS

        self.grid_format()
        METHODS.get(self.method)

    def title(self) -> str:
        return f"quantizing to {self.grid_format().name} ({self.method})"

    def change(self, damage: Damage) -> Changed:
        """Raises InputError that names the layers whose rows the group size does not divide."""
        from remend.degrade.making import onto_grid

        fmt = self.grid_format()
        stored = onto_grid.quantize_in_place(damage.student, fmt, self.method, skip=self.skip, damage=damage)
        entry = {"format": fmt.name, "method": self.method, "skip": self.skip}
        return onto_grid.described(damage.student, stored, entry)

    def by_block(self) -> BlockWork | None:
        """See DegradeSettings: where no text is looked at."""
        from remend.degrade.making.onto_grid import METHODS, OntoGrid

        if METHODS.get(self.method).calibrated:
            return None
        return OntoGrid(self.grid_format(), self.method, self.skip)


@takes(Quantize)
def quantize(model: str | Path, out: str | Path, **overrides: object) -> JsonObject:
    """Quantize a model and save it with its grid. See kinds.degrade; `overrides` are fields of Quantize."""
    return degrade("quantize", model, out, overrides)
