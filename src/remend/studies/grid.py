"""A study as it was read, and its grid of cells.

A cell is one recovery: (model, degradation, task) × method × seed. Its name is its directory below cells/; the names of
model and task are part of it only where there are several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow
from remend.files.settings import build, merged
from remend.models.find import EMBEDDED
from remend.recovery.settings import RecoverConfig
from remend.studies.spec import (
    STREAMS,
    TINY,
    BudgetSpec,
    DataSpec,
    Degradation,
    ModelSpec,
    SpeedSpec,
    StudySpec,
    TaskSpec,
)

PARAMETERS = {EMBEDDED: 134.5e6, TINY: 0.28e6}
"""Of models that need not say it."""


@dataclass(frozen=True)
class Method:
    """A way to recover, its `how` taken apart."""

    name: str
    how: str
    base: str
    extras: frozenset[str]
    recipe: JsonRow = field(default_factory=dict, compare=False)
    teacher: str = "reference"
    degradations: tuple[str, ...] | None = None
    """Those that it is run on; None is all."""

    def meets(self, degradation: str) -> bool:
        """Whether it is run on a degradation."""
        return self.degradations is None or degradation in self.degradations

    @property
    def trained(self) -> bool:
        """Whether it is one at all, and not the degraded student as it is."""
        return self.base != "none"

    @property
    def steps(self) -> bool:
        """Whether training steps are taken."""
        return self.base not in ("none", "repair")

    @property
    def labelled(self) -> bool:
        """Whether it learns given answers, and no distributions."""
        return self.base in ("sft", "sft-teacher")


@dataclass(frozen=True)
class Group:
    """What methods are compared on: a healthy model, a degradation of it, and a task."""

    name: str
    model: str
    degradation: str
    task: str
    student: str


@dataclass(frozen=True)
class Cell:
    """One directory: a method on a group with a seed."""

    group: Group
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Where it is, below cells/."""
        return f"{self.group.name}/{self.method.name}/{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study read and checked; see spec.py for the parts."""

    name: str
    path: Path
    spec: StudySpec
    models: Mapping[str, ModelSpec]
    degradations: Mapping[str, Degradation]
    methods: Mapping[str, Method]
    tasks: Mapping[str, TaskSpec]
    benchmarks: Mapping[str, TaskSpec]
    budget: BudgetSpec
    data: DataSpec
    speed: SpeedSpec | None
    cells: Sequence[Cell] = ()

    @property
    def none(self) -> Method:
        """The method that does nothing."""
        return next(m for m in self.methods.values() if not m.trained)

    def below(self, degradation: str) -> list[str]:
        """What a degradation stands on, from the nearest to the first; one that stands on itself ends the list."""
        names: list[str] = []
        while (on := self.degradations[names[-1] if names else degradation].on) in self.degradations:
            names.append(str(on))
            if names.count(str(on)) > 1 or on == degradation:
                break
        return names

    def parent(self, group: Group) -> Group | None:
        """The group of the student that a group's student was made from; None where that is the healthy model."""
        on = self.degradations[group.degradation].on
        return None if on is None else _group(self, group.model, on, group.task)

    def config(self, cell: Cell, **given: Any) -> RecoverConfig:
        """The cell's recipe: study, model and method over each other, and `given` on top.

        Raises InputError for keys or values that the recipe can't have.
        """
        values = merged(merged(self.spec.recipe, self.models[cell.group.model].recipe), cell.method.recipe)
        names = ("recover",) if cell.method.labelled or not self.tasked(cell) else STREAMS
        wanted = values.pop("streams", {})
        streams = {name: merged(given.get("streams", {}).get(name, {}), wanted.get(name, {})) for name in names}
        own: JsonObject = {"seed": cell.seed, "repair": "repair" in (*cell.method.extras, cell.method.base)}
        if "cka" in cell.method.extras:
            own["alignment"] = merged({"measure": "cka"}, values.pop("alignment", None) or {})
        if "bootstrap" in cell.method.extras:
            own["bootstrap"] = "on"
        rest = {key: value for key, value in given.items() if key != "streams"}
        return build(RecoverConfig, {**values, **own, **rest, "streams": streams}, f"cell {cell.name}")

    def parameters_of(self, model: str) -> float | None:
        """How many parameters a model has, where that is known without opening it."""
        spec = self.models[model]
        return spec.parameters or PARAMETERS.get(spec.path)

    def tasked(self, cell: Cell) -> bool:
        """Whether a part of the cell's steps is the task's."""
        return cell.method.steps and self.spec.task_share > 0

    def draft(self, cell: Cell) -> RecoverConfig:
        """The cell's recipe with words in place of what is made later, for checks and estimates."""
        given = {"student": "student", "teacher": "reference", "out": cell.name, "steps": 1}
        streams = {name: {"data": name} for name in STREAMS}
        return self.config(cell, **given, streams=streams)


def cells_of(study: Study) -> Iterator[Cell]:
    for model in study.models:
        for degradation in study.degradations:
            for task in study.tasks:
                group = _group(study, model, degradation, task)
                for method in (m for m in study.methods.values() if m.meets(degradation)):
                    # the degraded student is the same whatever the seed
                    seeds = study.spec.seeds if method.trained else study.spec.seeds[:1]
                    yield from (Cell(group, method, seed) for seed in seeds)


def _group(study: Study, model: str, degradation: str, task: str) -> Group:
    before = [model] if len(study.models) > 1 else []
    after = [task] if len(study.tasks) > 1 else []
    chain = [degradation, *study.below(degradation)]
    learned = after if any(study.degradations[name].of_task for name in chain) else []
    names = ["-".join([*before, degradation, *rest]) for rest in (after, learned)]
    return Group(names[0], model, degradation, task, names[1])


def chosen(study: Study, only: str | Sequence[str] | None) -> list[Cell]:
    """The cells that patterns name ('int3-g64', 'int3-g64/sdft', '*/*/0'), with the degraded students they are held to.

    Raises InputError for a pattern that names none.
    """
    if only is None or only == []:
        return list(study.cells)
    patterns = [only] if isinstance(only, str) else list(only)
    names = [cell.name for cell in study.cells]
    for pattern in patterns:
        if not any(_names(pattern, name) for name in names):
            some = ", ".join(names[:4])
            raise InputError(f'only "{pattern}" names no cell; cells are {some}{", …" if len(names) > 4 else ""}')
    wanted = {name for name in names if any(_names(pattern, name) for pattern in patterns)}
    groups = {cell.group for cell in study.cells if cell.name in wanted}
    return [c for c in study.cells if c.name in wanted or (not c.method.trained and c.group in groups)]


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern.rstrip('/')}/*")
