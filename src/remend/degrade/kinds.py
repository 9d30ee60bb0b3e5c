"""The registry of kinds of damage, and what each of them is asked for.

@DEGRADATIONS.register("noise", source="where it was described")
class Noise(DegradeSettings):
    "Add Gaussian noise to the weights."

    scale: float = Field(0.1, gt=0, description="standard deviation, relative to that of a matrix")

    def change(self, damage: Damage) -> Changed:
        ...

`remend degrade noise --scale 0.2` and a study's `{kind: noise, scale: 0.2}` are there from then on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from remend.data.given import as_files, rows_from_python
from remend.data.sources import COLUMNS_HELP, ColumnsSetting
from remend.errors import InputError
from remend.files.settings import PLACEMENT, Placement, Settings, build, settings_in
from remend.registry import Registry

if TYPE_CHECKING:
    from remend.degrade.making.by_block import BlockWork
    from remend.degrade.making.job import Changed, Damage
    from remend.files.atomic import JsonObject


class DegradeSettings(Settings):
    """What every kind of damage takes. The docstring of a kind is what the command line says of it."""

    learns: ClassVar[bool] = False
    """Whether it trains on rows of a task. A study gives such a kind its own task's rows where `data` is left out."""

    seed: int = Field(0, description="random seed of the calibration text and the training order")
    probe: bool = Field(
        True, description="measure the damage: on bundled prompts, or on some of --data that calibration did not see"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    placement: Placement = Field("auto", description=PLACEMENT)
    trust_remote_code: bool = Field(False, description="let a model directory run its own Python")

    def check(self) -> None:
        """Raise InputError for what can't be made, before a model is loaded."""

    def title(self) -> str:
        """What is done, for the line that shows progress."""
        word = next(word for word, model in DEGRADATIONS.entries.items() if model is type(self))
        return f"making the damage {word}"

    def change(self, damage: Damage) -> Changed:
        """Change `damage.student` or a model made from it. Raises InputError for a model that can't be changed so."""
        raise NotImplementedError

    def by_block(self) -> BlockWork | None:
        """How the same is done with one block of the model in memory; None where it takes the whole model."""
        return None


class Calibrated(DegradeSettings):
    """What a kind takes that may look at text: the reference's own completions of some prompts."""

    data: str | None = Field(None, description="prompts for calibration; by default bundled ones")
    columns: ColumnsSetting | None = Field(None, description=COLUMNS_HELP)
    samples: int = Field(48, description="calibration prompts; the reference answers them itself")

    @field_validator("samples")
    @classmethod
    def _some(cls, value: int) -> int:
        if value < 1:
            raise ValueError("the calibration set is empty; allowed is 1 or more")
        return value


TAKEN = dict.fromkeys(("model", "out"), "an argument of its command and function") | {
    "help": "an option of every command",
    "kind": "what a study calls the kind itself",
}
"""Names that no field can have, and what they are."""


def _usable(word: str, model: type[DegradeSettings]) -> None:
    """Raises InputError for a field whose name means something else already."""
    options: list[str] = []
    for name, field in model.model_fields.items():
        inner = settings_in(field.annotation)
        options += [f"{name}_{part}" for part in inner.model_fields] if inner else [name]
        options += [f"no_{name}"] if field.annotation is bool else []
    for name in dict.fromkeys([*model.model_fields, *options]):
        taken = TAKEN.get(name)
        if name not in DegradeSettings.model_fields and hasattr(DegradeSettings, name):
            taken = "a part of every DegradeSettings"
        elif options.count(name) > 1:
            taken = f"also the option --{name.replace('_', '-')} of another field"
        if taken:
            raise InputError(
                f'kind of degradation "{word}": {model.__module__}.{model.__qualname__} has a field "{name}", and that '
                f"name is {taken}; call the field something else"
            )


DEGRADATIONS: Registry[type[DegradeSettings]] = Registry("kind of degradation", _usable)


def degrade(kind: str, model: str | Path, out: str | Path, settings: Mapping[str, object]) -> JsonObject:
    """Load a model, damage a copy of it, measure and save that.

    Args:
        kind: a name in DEGRADATIONS.
        model: the healthy reference: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory.
        settings: of that kind; `data` may be rows too.

    Returns:
        The content of degradation.json.

    Raises:
        InputError, FileError: unknown kind or setting, values out of range, an unreadable model, one that can't be
            changed so, an occupied directory.
        TrainingError: loss or gradient is not finite.
    """
    out = Path(out)
    with rows_from_python():
        taken = as_files(settings, lambda name: out / "data" / f"{name}.jsonl")
        chosen = build(DEGRADATIONS.get(kind), taken, kind)
        chosen.check()
        from remend.degrade.making.job import run_job

        return run_job(chosen, os.fspath(model), out)
