"""A study's file read: every part checked, and all problems said at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from remend.data import tasks
from remend.degrade import DEGRADATIONS
from remend.errors import CheckError, FileError, InputError, did_you_mean
from remend.evaluation import harness
from remend.evaluation.plan import make_plan
from remend.evaluation.settings import LM_EVAL, EvaluateSettings
from remend.files import recipes
from remend.files.atomic import JsonObject
from remend.files.settings import Config, build
from remend.files.yaml_files import read_yaml
from remend.studies.grid import Cell, Method, Study, cells_of
from remend.studies.spec import (
    BASES,
    EXTRAS,
    OWNED,
    STREAMS,
    TINY,
    BudgetSpec,
    DataSpec,
    Degradation,
    MethodSpec,
    ModelSpec,
    SpeedSpec,
    StudySpec,
    TaskSpec,
)

Part = TypeVar("Part")

OPTIONS = [name for name in EvaluateSettings.model_fields if name != "data"]
"""Options of remend eval but for the rows, which a study has keys of its own for."""


def read_study(path: str | Path) -> Study:
    """Read a study: a file, or the name of one that ships with remend.

    Raises:
        FileError: the file can't be read.
        InputError: whatever is wrong with it, all at once: unknown keys, degradations, methods and tasks (the known are
            listed), no seeds, names that clash.
    """
    path = _file(path)
    origin = f"study {path}"
    spec = build(StudySpec, read_yaml(path), origin)
    problems: list[str] = []
    reader = _Reader(origin, problems)
    study = Study(
        name=spec.name or path.stem,
        path=path,
        spec=spec,
        models=reader.models(spec),
        degradations=reader.each("degradations", spec.degradations, reader.degradation),
        methods=reader.each("methods", spec.methods, reader.method),
        tasks=reader.each("tasks", spec.tasks, reader.task),
        benchmarks=reader.each("benchmarks", spec.benchmarks, reader.benchmark),
        budget=reader.part("budget", BudgetSpec, spec.budget) or BudgetSpec(tokens=1, seconds=None),
        data=reader.part("data", DataSpec, spec.data) or DataSpec.model_validate({}),
        speed=reader.part("speed", SpeedSpec, spec.speed) if spec.speed is not None else None,
    )
    problems += [f"{origin}: {text}" for text in _whole(study)]
    if not problems:  # what stands on another needs it to be there
        study = Study(**{**vars(study), "cells": tuple(cells_of(study))})
        problems += [f"{origin}: {text}" for text in _clashes(study.cells)]
        problems += _recipes(study)
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return study


def require_benchmarks(study: Study) -> None:
    """Raises FileError or CheckError unless lm-evaluation-harness is there and knows the study's tasks.

    It is asked before anything is trained, and not when a study is read: a dry run needs no such package.
    """
    problems: list[str] = []
    for name, spec in study.benchmarks.items():
        if name.startswith(LM_EVAL):
            include = spec.options.get("include")
            known = harness.Tasks(Path(include) if include else None)
            try:
                known.check([name], allow_code=spec.options.get("allow_code", False))
            except CheckError as error:
                problems.append(f"study {study.path}: benchmarks.{name}: {error}")
    if problems:
        raise CheckError(problems)


def shipped_studies() -> list[str]:
    """Names of the studies that ship with remend."""
    return sorted(path.stem for path in (recipes.folder() / "studies").glob("*.yaml"))


def _file(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    if str(path) in shipped_studies():
        return recipes.folder() / "studies" / f"{path}.yaml"
    known = shipped_studies()
    raise FileError(
        f"study {path}: no such file; give a YAML file, or the name of a study that ships with remend: "
        f"{', '.join(known)}.{did_you_mean(str(path), known)}"
    )


class _Reader:
    """Reads the parts of a study, keeping problems instead of raising them."""

    def __init__(self, origin: str, problems: list[str]) -> None:
        self.origin, self.problems = origin, problems

    def part(self, place: str, kind: type[Config], values: object) -> Config | None:
        """`values` as a `kind`, or None."""
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            self.problems.append(f"{self.origin}: {place} is {values!r}; it must be a mapping of keys to values")
            return None
        try:
            return build(kind, values, f"{self.origin}: {place}")
        except InputError as error:
            self.problems.append(str(error))
            return None

    def each(
        self, place: str, values: Mapping[str, object], read: Callable[[str, str, object], Part | None]
    ) -> dict[str, Part]:
        """All entries of a mapping that can be read."""
        parts = {name: read(f"{place}.{name}", name, value) for name, value in values.items()}
        return {name: part for name, part in parts.items() if part is not None}

    def models(self, spec: StudySpec) -> dict[str, ModelSpec]:
        """The one model under its own name, or several."""
        if (spec.model is None) == (spec.models is None):
            said = "both model and models are" if spec.model else "neither model nor models is"
            self.problems.append(f"{self.origin}: {said} given; name one healthy model, or several as models")
            return {}
        if spec.model is not None:
            return {"model": ModelSpec(path=spec.model, parameters=None)}
        return self.each("models", spec.models or {}, lambda place, name, value: self.part(place, ModelSpec, value))

    def degradation(self, place: str, name: str, value: object) -> Degradation | None:
        """By its kind, as the registry of degradations has it."""
        values = dict(value) if isinstance(value, Mapping) else {}
        kind, on = values.pop("kind", None), values.pop("on", None)
        try:
            if kind is None:
                raise InputError(f"kind is missing; known: {', '.join(DEGRADATIONS.names())}.")
            model = DEGRADATIONS.get(str(kind))
            of_task = model.learns and values.get("data") is None
            settings = self.part(place, model, values | ({"data": "the task's rows"} if of_task else {}))
            if settings is None:
                return None
            if not model.learns:  # rows to learn are looked at when they are learned
                settings.check()
        except InputError as error:
            self.problems.append(f"{self.origin}: {place}: {error}")
            return None
        return Degradation(str(kind), settings, of_task, None if on is None else str(on))

    def method(self, place: str, name: str, value: object) -> Method | None:
        """From `how`, or {how, recipe}."""
        spec = self.part(place, MethodSpec, {"how": value} if isinstance(value, str) else value)
        if spec is None:
            return None
        base, *extras = spec.how.split("+")
        before = len(self.problems)
        for what, got, known in (("method", [base], BASES), ("addition to a method", extras, EXTRAS)):
            self.problems += [
                f'{self.origin}: {place}: unknown {what} "{one}"; known: {", ".join(known)}.{did_you_mean(one, known)}'
                for one in got
                if one not in known
            ]
        if len(self.problems) > before:
            return None
        on = None if spec.degradations is None else tuple(spec.degradations)
        method = Method(name, spec.how, base, frozenset(extras), spec.recipe, spec.teacher, on)
        if not method.trained and on is not None:
            self.problems.append(
                f"{self.origin}: {place}: none is what the others are held against, on every degradation"
            )
        if not method.trained and (extras or spec.recipe):
            self.problems.append(f"{self.origin}: {place}: none does nothing, so it takes no additions and no recipe")
        if method.teacher != "reference" and base not in ("off-policy", "on-policy"):
            self.problems.append(f"{self.origin}: {place}: {base} learns from no distribution, so it takes no teacher")
        if method.base == "repair" and extras:
            self.problems.append(f"{self.origin}: {place}: repair takes no step, so it takes no additions")
        if method.base != "on-policy" and "bootstrap" in extras:
            self.problems.append(f"{self.origin}: {place}: bootstrap goes before on-policy steps, and {base} has none")
        if method.labelled and "streams" in spec.recipe:
            self.problems.append(f"{self.origin}: {place}.recipe.streams: {base} trains on labels, and has no streams")
        if method.labelled and "cka" in extras:
            self.problems.append(f"{self.origin}: {place}: cka needs the reference as the teacher, and {base} has none")
        self._recipe(place, spec.recipe)
        return method

    def _recipe(self, place: str, recipe: JsonObject) -> None:
        for key in recipe:
            if key in OWNED:
                self.problems.append(f"{self.origin}: {place}.recipe.{key} is set by the study itself; leave it out")
        streams = recipe.get("streams") or {}
        self.problems += [
            f"{self.origin}: {place}.recipe.streams.{name}: a cell's streams are {' and '.join(STREAMS)}"
            for name in streams
            if name not in STREAMS
        ]

    def task(self, place: str, name: str, value: object) -> TaskSpec | None:
        """A task of remend.tasks with its rows."""
        if name not in tasks.names():
            known = tasks.names()
            self.problems.append(
                f'{self.origin}: {place}: unknown task "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}'
            )
            return None
        spec = self._spec(place, name, value)
        if spec and tasks.get(name).make is None:
            self.problems += [
                f"{self.origin}: {place}: {name} makes no rows of its own; give {key}: a file of JSON lines"
                for key in ("train", "held_out")
                if getattr(spec, key) is None
            ]
        return spec

    def _spec(self, place: str, name: str, value: object) -> TaskSpec | None:
        """Rows, and options that remend eval takes."""
        spec = self.part(place, TaskSpec, value or {})
        if spec is None:
            return None
        known = OPTIONS
        unknown = [option for option in spec.options if option not in known]
        self.problems += [
            f'{self.origin}: {place}.options: unknown option "{option}".{did_you_mean(option, known)} Known: '
            f"{', '.join(known)}"
            for option in unknown
        ]
        if not unknown:
            data = None if name.startswith(LM_EVAL) else "rows.jsonl"
            try:
                make_plan("model", [name], {"data": data, **spec.options})
            except InputError as error:
                self.problems += [f"{self.origin}: {place}.options: {line}" for line in str(error).split("\n")]
        return spec

    def benchmark(self, place: str, name: str, value: object) -> TaskSpec | None:
        """A task that is graded only, or one of lm-evaluation-harness."""
        if name.startswith(LM_EVAL) or name not in tasks.names():
            if not name.startswith(LM_EVAL):
                self.problems.append(
                    f'{self.origin}: {place}: unknown benchmark "{name}"; known: {", ".join(tasks.names())}, and '
                    f"{LM_EVAL}NAME.{did_you_mean(name, tasks.names())}"
                )
                return None
            return self._spec(place, name, value)
        spec = self._spec(place, name, value)
        if spec and spec.held_out is None and tasks.get(name).make is None:
            self.problems.append(f"{self.origin}: {place}: {name} makes no rows of its own; give held_out: a file")
        return spec


def _whole(study: Study) -> Iterator[str]:
    """What is wrong with the parts taken together."""
    spec = study.spec
    if not spec.seeds:
        yield "seeds is empty; give at least one, e.g. [0, 1, 2]"
    if len(set(spec.seeds)) < len(spec.seeds) or any(seed < 0 for seed in spec.seeds):
        yield f"seeds is {spec.seeds}; give each once, from 0"
    for place in ("degradations", "methods", "tasks"):
        if not getattr(spec, place):
            yield f"{place} is empty; give at least one"
    idle = [m.name for m in study.methods.values() if not m.trained]
    if study.methods and len(idle) != 1:
        yield (
            f"methods has {len(idle)} with how: none; it needs one: the degraded student, which the others are held "
            "against"
        )
    for name, damage in study.degradations.items():
        if damage.on is not None and damage.on not in study.degradations:
            known = [other for other in study.degradations if other != name]
            yield (
                f'degradations.{name}: on "{damage.on}" is no degradation.{did_you_mean(damage.on, known)} Known: '
                + (", ".join(known) or "none")
            )
        elif name in study.below(name):
            yield f"degradations.{name} stands on itself: {' on '.join([name, *study.below(name)])}"
    for method in study.methods.values():
        for name in method.degradations or ():
            if name not in study.degradations:
                known = list(study.degradations)
                yield (
                    f'methods.{method.name}: "{name}" is no degradation.{did_you_mean(name, known)} Known: '
                    + ", ".join(known)
                )
    both = sorted(set(study.tasks) & set(study.benchmarks))
    if both:
        yield f"{', '.join(both)} is a task and a benchmark; name it once"
    for place in ("models", "degradations", "methods"):
        for name in getattr(study, place):
            if not re.fullmatch(r"\w[\w.+@-]*", name):
                yield f'{place}: "{name}" is part of a path; allowed are letters, digits and _ . + @ -'
    for key in spec.recipe:
        if key in OWNED or key == "streams":
            yield f"recipe.{key} is set by the study itself; leave it out"
    known = [m for m in BASES if m not in ("none", "repair")]
    for key in study.speed.tokens_per_second if study.speed else ():
        if key not in known:
            yield f'speed.tokens_per_second: unknown method "{key}"; known: {", ".join(known)}'
    if TINY not in {m.path for m in study.models.values()}:
        named = [
            study.data.train,
            study.data.held_out,
            *(x for t in study.tasks.values() for x in (t.train, t.held_out)),
        ]
        if TINY in named:
            yield f"{TINY} names what is made for the model {TINY}, which this study does not have; name a file"


def _clashes(cells: Sequence[Cell]) -> Iterator[str]:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name.casefold(), cell)
        if other is not cell:
            yield f"two cells would have one directory, cells/{other.name} and cells/{cell.name}; rename one of them"


def _recipes(study: Study) -> list[str]:
    """Problems of the cells' recipes, each once and not once a seed."""
    problems: dict[str, None] = {}
    for cell in study.cells:
        try:
            study.draft(cell)
        except InputError as error:
            for line in str(error).split("\n"):
                said = line.partition(f"cell {cell.name}: ")[2]
                problems.setdefault(f"study {study.path}: method {cell.method.name}: {said}")
    return list(problems)
