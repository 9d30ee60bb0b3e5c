"""A study's YAML, typed: models, degradations, methods, tasks, seeds, budget, data. docs/study.md explains every key.

model: smollm2
degradations: {int3-g64: {kind: quantize, format: int3-g64}}
methods: {none: none, sft: sft, sdft: {how: on-policy+repair, recipe: {learning_rate: 1.0e-4}}}
tasks: {tooluse-short: {rows: 64}}
seeds: [0, 1, 2]
budget: {tokens: 9000}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from remend.files.settings import Settings, as_number

TINY = "tiny"
"""As a model, a task's rows or the data: what the study makes for itself, see remend.studies.tiny_model."""

BUNDLED = "bundled"


Number = Annotated[float, BeforeValidator(as_number)]


class ModelSpec(Settings):
    """A healthy model."""

    path: str = Field(min_length=1, description="directory, GGUF file, hub id[@revision], smollm2, or tiny")
    parameters: Number | None = Field(None, gt=0, description="how many, for the estimate of cost")
    recipe: dict[str, Any] = Field(
        default_factory=dict, description="recipe keys for this model, over the study's and under a method's"
    )


class Quantize(Settings):
    """Arguments of remend.quantize."""

    kind: Literal["quantize"]
    format: str = Field(description="int3-g64, int4-g32-sym, gguf:q4_0, nvfp4 …")
    method: str = "rtn"
    skip: list[str] = Field(default_factory=list)
    data: str | None = None
    samples: int = Field(48, ge=1)
    seed: int = Field(0, ge=0)


class Prune(Settings):
    """Arguments of remend.prune."""

    kind: Literal["prune"]
    sparsity: str | float = Field(description="a share of zeros, 0.5, or n:m as a text, '2:4'")
    method: str = "magnitude"
    scope: str = "layer"
    skip: list[str] = Field(default_factory=list)
    data: str | None = None
    samples: int = Field(48, ge=1)
    seed: int = Field(0, ge=0)


class Depth(Settings):
    """Arguments of remend.prune_depth."""

    kind: Literal["depth"]
    layers: int | list[int] = Field(description="how many blocks to remove, or with method list their numbers")
    method: str = "block-influence"
    data: str | None = None
    samples: int = Field(48, ge=1)
    seed: int = Field(0, ge=0)


class Finetune(Settings):
    """Arguments of remend.finetune: how forgetting is produced. Without data the task's training rows are learned."""

    kind: Literal["finetune"]
    data: str | None = None
    steps: int | None = Field(None, ge=1)
    epochs: Number | None = Field(None, gt=0)
    learning_rate: Number | None = Field(None, gt=0, le=1)
    batch_size: int = Field(4, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    max_tokens: int = Field(1024, ge=1)
    lora: dict[str, Any] | None = None
    seed: int = Field(0, ge=0)


Degradation = Quantize | Prune | Depth | Finetune

KINDS: dict[str, type[Quantize] | type[Prune] | type[Depth] | type[Finetune]] = {
    "quantize": Quantize,
    "prune": Prune,
    "depth": Depth,
    "finetune": Finetune,
}

BASES = {
    "none": "the degraded student as it is",
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
    recipe: dict[str, Any] = Field(default_factory=dict, description="recipe keys for this method alone")


class TaskSpec(Settings):
    """What is known of a task: its rows, and how answers are graded."""

    train: str | None = Field(None, min_length=1, description="rows to train on: a file; by default the task's own")
    held_out: str | None = Field(None, min_length=1, description="rows to grade: a file; by default the task's own")
    train_rows: int | None = Field(None, ge=2, description="how many of them; by default 320 made or all of a file")
    rows: int | None = Field(None, ge=2, description="how many are graded; by default 64 made or all of a file")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of remend eval")


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
        description="trained tokens a second of a step, sampling included, for each of sft, sft-teacher, …"
    )
    overhead_minutes: Number = Field(
        0.0, ge=0, description="beside the steps of a cell: loading, repair, measuring, grading"
    )


class StudySpec(Settings):
    """The keys of a study; the parts are read one by one, so that messages name them."""

    name: str | None = Field(None, min_length=1, description="of the study; by default the file's")
    model: str | None = Field(None, min_length=1, description="the healthy model; or give models")
    models: dict[str, Any] | None = Field(None, description="several: {name: {path, parameters, recipe}}")
    degradations: dict[str, Any] = Field(description="{name: {kind, …}}")
    methods: dict[str, Any] = Field(description="{name: how, or {how, recipe}}")
    tasks: dict[str, Any] = Field(description="{task: {train, held_out, rows, …}}: trained on and graded")
    benchmarks: dict[str, Any] = Field(default_factory=dict, description="tasks that are graded only; likewise")
    seeds: list[int] = Field(description="of the recoveries")
    budget: dict[str, Any] = Field(description="{tokens, seconds}")
    data: dict[str, Any] = Field(default_factory=dict, description="general prompts: {train, held_out, rows}")
    recipe: dict[str, Any] = Field(default_factory=dict, description="recipe keys for all cells")
    task_share: Number = Field(0.25, ge=0, lt=1, description="of a step's prompts, from the task")
    measurements: int = Field(6, ge=1, description="of KL and CKA along a cell's training")
    speed: dict[str, Any] | None = Field(None, description="what the estimate of cost goes by")
    one_process: bool = Field(False, description="run all cells in this process; quick for tiny models")
    keep_models: bool = Field(True, description="keep the recovered models after they were graded")


OWNED = {
    "student", "teacher", "data", "out", "steps", "seed", "eval_data", "held_out", "eval_every", "diagnose_every",
    "select", "patience", "save_every", "keep_checkpoints", "repair", "bootstrap", "self_prompts", "report_to",
}  # fmt: skip
"""Recipe keys that the study sets itself."""

STREAMS = ("recover", "task")
"""Of a cell: general prompts, and the task's. A method's recipe may change their settings."""
