"""What a study makes once and all its cells share: prompts, task rows, the tiny model, the degraded students."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from remend.console import warn
from remend.data import tasks
from remend.data.examples import DEMONSTRATION_KEYS, Example, bundled, choose, load_examples, split_held_out, without
from remend.degrade.kinds import degrade
from remend.errors import InputError
from remend.files.atomic import JsonObject, json_line, put_aside, remove_directory, write_json, write_text
from remend.files.reading import read_object
from remend.models.find import find_model, hash_files
from remend.studies import tiny_model
from remend.studies.grid import Cell, Group, Study
from remend.studies.spec import BUNDLED, TINY, TaskSpec

TRAIN_ROWS, ROWS, FEW = 320, 64, 8
"""Of a task that makes its own rows; and those of the held-out rows that a cell watches while it trains."""

WORKED = tuple(key for key in DEMONSTRATION_KEYS if key != "answer")
"""Columns that hold an answer as it shall be written."""


@dataclass(frozen=True)
class TaskFiles:
    """Rows of a task: to train on, to grade, and few of the latter. Benchmarks of other makers have none."""

    train: Path | None = None
    held_out: Path | None = None
    few: Path | None = None


@dataclass
class Made:
    """Where the shared inputs are, with their hashes.

    models: the healthy models by name; train, held_out: general prompts; hashes: of files and models, by path.
    """

    out: Path
    models: dict[str, str]
    train: Path
    held_out: Path
    tasks: dict[str, TaskFiles]
    hashes: dict[str, str] = field(default_factory=dict)

    def student(self, group: Group) -> Path:
        """The directory of a group's degraded student."""
        return self.out / "students" / group.student

    def healthy(self, study: Study, group: Group) -> str:
        """The model that a group's student was made from: what recovery is measured against."""
        parent = study.parent(group)
        return self.models[group.model] if parent is None else str(self.student(parent))

    def hash_of(self, place: str | Path | None) -> str | None:
        """SHA-256 of a file, or over those of a model, computed once."""
        if place is None:
            return None
        key = str(place)
        if key not in self.hashes:
            if Path(key).suffix == ".jsonl" and Path(key).is_file():
                self.hashes[key] = hashlib.sha256(Path(key).read_bytes()).hexdigest()
            else:
                files = json.dumps(hash_files(find_model(key)), sort_keys=True, ensure_ascii=False)
                self.hashes[key] = hashlib.sha256(files.encode()).hexdigest()
        return self.hashes[key]


def make(study: Study, out: Path, data: Path | None = None) -> Made:
    """Write prompts and task rows into OUT/data (or `data`), and train the tiny model where the study has it.

    Raises InputError and FileError for data that can't be used.
    """
    folder, tiny = data or out / "data", {}
    if any(spec.path == TINY for spec in study.models.values()):
        tiny = tiny_model.make(out / "tiny")
    train, held_out = _general(study, tiny)
    made = Made(
        out=out,
        models={name: tiny["model"] if spec.path == TINY else spec.path for name, spec in study.models.items()},
        train=_written(folder / "train.jsonl", [e.row for e in train]),
        held_out=_written(folder / "held_out.jsonl", [e.row for e in held_out]),
        tasks={},
    )
    for name, spec in {**study.tasks, **study.benchmarks}.items():
        made.tasks[name] = _task(name, spec, tiny, folder, trained=name in study.tasks)
    return made


def _written(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    write_text(path, "".join(map(json_line, rows)))
    return path


def _general(study: Study, tiny: Mapping[str, str]) -> tuple[list[Example], list[Example]]:
    """Training and held-out prompts."""
    data = study.data
    if data.train == BUNDLED:
        train, apart = bundled("train", mixed=False), bundled("held_out")
    else:
        train = load_examples(tiny["train"] if data.train == TINY else data.train)
        apart = load_examples(tiny["held_out"]) if data.train == TINY else []
    if data.held_out == BUNDLED:
        apart = bundled("held_out")
    elif data.held_out is not None:
        apart = load_examples(tiny["held_out"] if data.held_out == TINY else data.held_out)
    if not apart:
        train, apart = split_held_out(train, data.rows, 0)
    # bundled prompts go round their topics, so the first ones are varied; others are chosen by their text
    held_out = apart[: data.rows] if data.train == BUNDLED and data.held_out is None else choose(apart, data.rows, 0)
    train = without(train, held_out)
    if not train:
        raise InputError(f"data.train {data.train}: no prompt is left to train on beside the held-out ones")
    return train, held_out


def _task(name: str, spec: TaskSpec, tiny: Mapping[str, str], folder: Path, *, trained: bool) -> TaskFiles:
    if name not in tasks.names():  # a benchmark that brings its own rows
        return TaskFiles()
    held_out = _rows(name, "held_out", spec.held_out, spec.rows, tiny)
    files = {"held_out": held_out, "few": held_out[:FEW]}
    if trained:
        rows = _rows(name, "train", spec.train, spec.train_rows, tiny)
        files["train"] = [_tagged(name, example) for example in without(rows, held_out)]
    paths = {split: _written(folder / f"{name}-{split}.jsonl", [e.row for e in rows]) for split, rows in files.items()}
    return TaskFiles(paths.get("train"), paths["held_out"], paths["few"])


def _tagged(name: str, example: Example) -> Example:
    """A row to train on. Where all that it has for an answer is a bare letter, that is put into the tags it asks for.

    The SDFT authors' science rows are so; trained on as they are they would teach a form that their prompts forbid.
    """
    row = example.row
    if not tasks.get(name).letters or any(row.get(key) is not None for key in (*WORKED, "messages")):
        return example
    return replace(example, row={**row, "demonstration": f"<answer>\n{row['answer']}\n</answer>"})


def _rows(name: str, split: str, source: str | None, count: int | None, tiny: Mapping[str, str]) -> list[Example]:
    if source is None:
        made = tasks.get(name).rows(split, count or (TRAIN_ROWS if split == "train" else ROWS), seed=0)
        return [Example(row["id"], row["prompt"], row) for row in made]
    rows = tasks.get(name).load(tiny[f"task_{split}"] if source == TINY else source)
    for number, example in enumerate(rows, start=1):
        tasks.get(name).check(example.row, f"{source}, row {number}")
    return choose(rows, count, 0) if count else rows


def degradation_inputs(study: Study, made: Made, group: Group) -> JsonObject:
    """The arguments of a group's degradation, with the hash of the data."""
    spec = study.degradations[group.degradation]
    values = spec.settles()
    data = str(made.tasks[group.task].train) if spec.of_task else values.get("data")
    known = isinstance(data, str) and Path(data).is_file()
    values["data"] = hashlib.sha256(Path(str(data)).read_bytes()).hexdigest() if known else data
    return values


def student_inputs(study: Study, made: Made, group: Group) -> JsonObject:
    """What settles a degraded student: the hash of the model that it is made from, and `degradation_inputs`."""
    healthy = made.hash_of(made.healthy(study, group))
    return {"model": healthy, "degradation": degradation_inputs(study, made, group)}


def student_arguments(study: Study, made: Made, group: Group) -> JsonObject:
    """Of `make_student`, plain values."""
    spec = study.degradations[group.degradation]
    values = {"device": str(study.spec.recipe.get("device", "auto")), "probe": False}
    values |= spec.settings.model_dump(exclude_unset=True)
    if spec.of_task:
        values["data"] = str(made.tasks[group.task].train)
    return {
        "model": made.healthy(study, group),
        "out": str(made.student(group)),
        "kind": spec.kind,
        "arguments": values,
        "inputs": student_inputs(study, made, group),
    }


def reference_grades(study: Study, out: Path, group: Group) -> Path:
    """Where the grades of a group's healthy model are."""
    parent = study.parent(group)
    return out / "reference" / group.model if parent is None else out / "reference-students" / parent.student


BEGUN = "begun"
"""In a student's record, before it says what the student was made of: that this is being made."""


def record_of(student: Path) -> Path:
    """Where it is kept what a student was made of: beside its directory, whose files are hashed."""
    return student.with_name(f"{student.name}.json")


def is_made(student: Path, inputs: Mapping[str, object]) -> bool:
    """Whether a student is there and was made of these inputs."""
    record = record_of(student)
    return record.is_file() and student.is_dir() and read_object(record) == json.loads(json.dumps(inputs))


def make_student(
    model: str, out: str, kind: str, arguments: Mapping[str, object], inputs: Mapping[str, object]
) -> None:
    """Make a degraded student; one that was made of other inputs is moved aside.

    What a process left that was ended while it made one, which its record says, is made anew in its place.

    Raises InputError and FileError as the degradation does.
    """
    target, record = Path(out), record_of(Path(out))
    begun = record.is_file() and bool(read_object(record).get(BEGUN))
    if target.is_dir() and begun:
        remove_directory(target)
    elif target.exists():
        record.unlink(missing_ok=True)
        aside = put_aside(target)
        warn(f"{target} was made of other inputs and is moved to {aside}; remove that when you need it no more")
    write_json(record, {BEGUN: True})
    degrade(kind, model, target, arguments)
    write_json(record, inputs)


def training_inputs(study: Study, made: Made, cell: Cell) -> JsonObject:
    """What settles a cell's training, but for the models.

    Of the recipe what the study says: a key that a later version of remend adds makes no finished cell another one.
    """
    files = made.tasks[cell.group.task]
    tasked = study.tasked(cell)
    return {
        "recipe": study.draft(cell).model_dump(exclude={"out"}, exclude_defaults=True),
        "how": cell.method.how,
        **({"teacher": cell.method.teacher} if cell.method.teacher != "reference" else {}),
        "budget": study.budget.tokens if cell.method.steps else None,
        "measurements": study.spec.measurements,
        "task_share": study.spec.task_share if tasked else 0,
        "data": {
            "train": made.hash_of(made.train),
            "held_out": made.hash_of(made.held_out),
            "task": made.hash_of(files.train) if tasked else None,
        },
    }


def cell_inputs(study: Study, made: Made, cell: Cell) -> JsonObject:
    """What settles a cell: for its training and for its grading apart, so that a new benchmark trains nothing anew."""
    models = {
        "reference": made.hash_of(made.healthy(study, cell.group)),
        "student": made.hash_of(made.student(cell.group)),
    }
    training = {**training_inputs(study, made, cell), "models": models}
    return {"training": training, "grading": grading_inputs(study, made, cell.group)}


def grading_inputs(study: Study, made: Made, group: Group) -> JsonObject:
    """What settles the grades of a model: rows and options of every task."""
    return {
        name: {"options": spec.options, "rows": made.hash_of(made.tasks[name].held_out)}
        for name, spec in graded(study, group).items()
    }


def graded(study: Study, group: Group) -> dict[str, TaskSpec]:
    """The group's own task and all benchmarks."""
    return {group.task: study.tasks[group.task], **study.benchmarks}
