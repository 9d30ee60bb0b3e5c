"""Set weights to zero, unstructured or n of every m, and save a plain transformers directory.

remend degrade prune smollm2 --method wanda --sparsity 2:4 --out student
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from remend.degrade.kinds import DEGRADATIONS, Calibrated, degrade
from remend.files.settings import takes

if TYPE_CHECKING:
    from remend.degrade.making.by_block import BlockWork
    from remend.degrade.making.job import Changed, Damage
    from remend.degrade.making.zeros import Sparsity
    from remend.files.atomic import JsonObject


@DEGRADATIONS.register("prune", source="ways to choose zeros: making/zeros.py")
class Prune(Calibrated):
    """Set weights of every linear layer to zero; `degrade depth` and `degrade width` make a smaller model.

    The zeros themselves are the mask: nothing else is stored. In degradation.json `sparsity` is their measured share in
    the matrices of the whole decoder, and `bits_per_weight` what these take as packed: 16 bits a value that stays, and
    one bit a weight for the mask.
    """

    method: str = Field("magnitude", description="which weights become zero: magnitude, wanda, sparsegpt")
    sparsity: str | float = Field(
        "0.5", description="share of zeros, such as 0.5, or N:M: of M neighbours N stay, such as 2:4"
    )
    scope: str = Field(
        "layer", description="where the share holds: in every layer (layer), or over all of them (global)"
    )
    skip: list[str] = Field(default_factory=list, description="layers to leave as they are, e.g. '*.down_proj'")

    def amount(self) -> Sparsity:
        """`sparsity`, read. Raises InputError for one out of range."""
        from remend.degrade.making.zeros import Sparsity

        return Sparsity.parse(str(self.sparsity))

    def check(self) -> None:
        """Raise InputError for an unknown method or scope, and for those that don't go together."""
        from remend.degrade.making.zeros import check

        check(self.amount(), self.method, self.scope)

    def title(self) -> str:
        return f"pruning to {self.amount().name} ({self.method})"

    def change(self, damage: Damage) -> Changed:
        """Raises InputError that names the layers whose width m does not divide."""
        from remend.degrade.making import zeros

        layers = zeros.prune_in_place(damage, self.amount(), self.method, self.scope, self.skip)
        return zeros.described(damage.student, layers, self._entry())

    def _entry(self) -> JsonObject:
        return {"method": self.method, "format": self.amount().name, "scope": self.scope, "skip": self.skip}

    def by_block(self) -> BlockWork | None:
        """See DegradeSettings: where no text is looked at, and no other layer."""
        from remend.degrade.making.zeros import METHODS, SetToZero

        if METHODS.get(self.method).calibrated or self.scope != "layer":
            return None
        return SetToZero(self.amount(), self.method, self._entry())


@takes(Prune)
def prune(model: str | Path, out: str | Path, **overrides: object) -> JsonObject:
    """Set weights of a model to zero and save it. See kinds.degrade; `overrides` are fields of Prune."""
    return degrade("prune", model, out, overrides)
