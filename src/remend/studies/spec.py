"""A study's YAML, typed: models, degradations, methods, tasks, seeds, budget, data.

docs/how-to/study.md explains every key.

model: smollm2
degradations: {int3-g64: {kind: quantize, format: int3-g64}}
methods: {none: none, sft: sft, sdft: {how: on-policy+repair, recipe: {learning_rate: 1.0e-4}}}
tasks: {tooluse-short: {rows: 64}}
seeds: [0, 1, 2]
budget: {tokens: 9000}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from remend.degrade.kinds import DegradeSettings
from remend.files.atomic import JsonObject
from remend.files.settings import Number, Settings

TINY = "tiny"
"""As a model, a task's rows or the data: what the study makes for itself, see remend.studies.tiny_model."""

BUNDLED = "bundled"


class ModelSpec(Settings):
    """A healthy model."""

    path: str = Field(min_length=1, description="directory, GGUF file, hub id[@revision], smollm2, or tiny")
    parameters: Number | None = Field(None, gt=0, description="how many, for the estimate of cost")
    recipe: JsonObject = Field(
        default_factory=dict, description="recipe keys for this model, over the study's and under a method's"
    )


@dataclass(frozen=True)
class Degradation:
    """An entry of `degradations`: `kind` is a name in the registry of degradations, and has these settings."""

    kind: str
    settings: DegradeSettings
    of_task: bool
    """Whether it learns the rows of the study's task, since it names none of its own; `data` says nothing then."""
    on: str | None = None
    """The degradation whose student this one is done to, in place of the healthy model."""

    def settles(self) -> dict[str, object]:
        """What a student depends on, as plain values."""
        return {"kind": self.kind} | {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Settings) else value
            for name, value in self.settings
            if name not in NEWER or name in self.settings.model_fields_set
        }


NEWER = ("probe", "device", "trust_remote_code", "dtype", "columns", "placement")
"""Settings of degradations that studies did not have at first. Only where they are given are students made anew."""

BASES = {
    "none": "the degraded student as it is",
    "repair": "a closed-form repair, and no step",
    "sft": "cross-entropy of given answers: the task's demonstrations, and general rows that have a completion",
    "sft-teacher": "cross-entropy of the reference's own answers to general prompts (self-data distillation, arXiv "
    "2410.09982), and of the task's demonstrations",
    "off-policy": "forward KL on the reference's own answers",
    "on-policy": "forward KL on the student's own answers (SDFT, arXiv 2604.15794)",
}
EXTRAS = {
    "repair": "after a closed-form repair",
    "bootstrap": "after off-policy steps",
    "cka": "with CKA to the reference as a second signal (after arXiv 2606.05682)",
}


class MethodSpec(Settings):
    """A way to recover."""

    how: str = Field(min_length=1, description=f"one of {', '.join(BASES)}, and after it +{', +'.join(EXTRAS)}")
    teacher: Literal["reference", "base", "initial"] = Field(
        "reference",
        description="who scores: the model before this damage, the healthy model before all damage, or the student as "
        "it came in; what is measured is measured against the reference all the same",
    )
    degradations: list[str] | None = Field(
        None, min_length=1, description="names of the degradations that it is a rival on; by default all"
    )
    recipe: JsonObject = Field(default_factory=dict, description="recipe keys for this method alone")


class TaskSpec(Settings):
    """What is known of a task: its rows, and how answers are graded."""

    train: str | None = Field(None, min_length=1, description="rows to train on: a file; by default the task's own")
    held_out: str | None = Field(None, min_length=1, description="rows to grade: a file; by default the task's own")
    train_rows: int | None = Field(None, ge=2, description="how many of them; by default 320 made or all of a file")
    rows: int | None = Field(None, ge=2, description="how many are graded; by default 64 made or all of a file")
    options: JsonObject = Field(default_factory=dict, description="further arguments of remend eval")


class BudgetSpec(Settings):
    """What every trained cell may spend, and where methods are compared."""

    tokens: int = Field(ge=1, description="completion tokens that every trained cell is planned to train on")
    seconds: Number | None = Field(
        None, gt=0, description="where methods are compared by time; by default what the quickest cell took"
    )


class DataSpec(Settings):
    """General prompts."""

    train: str = Field(BUNDLED, min_length=1, description="bundled, tiny, a JSON lines file or a datasets id")
    held_out: str | None = Field(
        None, min_length=1, description="likewise; by default bundled beside bundled, else set apart from train"
    )
    rows: int = Field(32, ge=2, description="held-out prompts that every model is measured on")


class SpeedSpec(Settings):
    """What the estimate of cost goes by until cells have been measured."""

    device: str = Field(min_length=1, description="what the figures are of, in words")
    parameters: Number = Field(gt=0, description="size of the model that they are of; others scale with theirs")
    tokens_per_second: dict[str, Number] = Field(
        description="trained tokens per second of a step, sampling included, for each of sft, sft-teacher, …"
    )
    overhead_minutes: Number = Field(
        0.0, ge=0, description="beside the steps of a cell: loading, repair, measuring, grading"
    )


class StudySpec(Settings):
    """The keys of a study; the parts are read one by one, so that messages name them."""

    name: str | None = Field(None, min_length=1, description="of the study; by default the file's")
    model: str | None = Field(None, min_length=1, description="the healthy model; or give models")
    models: JsonObject | None = Field(None, description="several: {name: {path, parameters, recipe}}")
    degradations: JsonObject = Field(description="{name: {kind, …}}")
    methods: JsonObject = Field(description="{name: how, or {how, recipe}}")
    tasks: JsonObject = Field(description="{task: {train, held_out, rows, …}}: trained on and graded")
    benchmarks: JsonObject = Field(default_factory=dict, description="tasks that are graded only; likewise")
    seeds: list[int] = Field(description="of the recoveries")
    budget: JsonObject = Field(description="{tokens, seconds}")
    data: JsonObject = Field(default_factory=dict, description="general prompts: {train, held_out, rows}")
    recipe: JsonObject = Field(default_factory=dict, description="recipe keys for all cells")
    task_share: Number = Field(0.25, ge=0, lt=1, description="of a step's prompts, from the task")
    measurements: int = Field(6, ge=1, description="of KL and CKA along a cell's training")
    speed: JsonObject | None = Field(None, description="what the estimate of cost goes by")
    one_process: bool = Field(False, description="run all cells in this process; quick for tiny models")
    keep_models: bool = Field(True, description="keep the recovered models after they were graded")


OWNED = {
    "student", "teacher", "data", "out", "steps", "epochs", "seed", "eval_data", "held_out", "eval_every",
    "diagnose_every", "select", "patience", "save_every", "keep_checkpoints", "repair", "bootstrap", "self_prompts",
    "report_to",
}  # fmt: skip
"""Recipe keys that the study sets itself."""

STREAMS = ("recover", "task")
"""Of a cell: general prompts, and the task's. A method's recipe may change their settings."""
