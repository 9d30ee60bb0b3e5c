"""The lines of time_to_recover.py: each a recipe, and the tables that it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from remend.studies.demo import TRAINING

MODEL, TOKENS = "smollm2", 48
DEGRADE = {
    "int3-g64": ("quantize", MODEL, "--format", "int3-g64"),
    "depth-5": ("prune", MODEL, "--method", "depth", "--layers", "23,24,25,26,27"),
}
COOL = {"learning_rate": 1e-4}
TWO: dict[str, Any] = {"updates_per_rollout": 2}
ON, AUTO, REPAIR = {"bootstrap": "on"}, {"bootstrap": "auto"}, {"repair": True}
INT3 = "int3-g64"
SMALL: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 4}
IN_ORDER = "lambda lengths, rows: [range(i, min(i + rows, len(lengths))) for i in range(0, len(lengths), rows)]"
ARRIVAL = {"remend.recovery.distillation.batches_by_length": IN_ORDER}
"""Micro-batches in the order of the prompts."""


def chunks(mebibytes: int) -> dict[str, str]:
    """Logits of one chunk of so many MiB, whatever the device."""
    return {f"remend.models.device.{name}": f"{mebibytes} * 2**20" for name in ("CHUNK_BYTES", "CHUNK_LIMIT")}


@dataclass(frozen=True)
class Line:
    """One run: its recipe beside the common one, the tables that show it, and names in remend set to other values."""

    name: str
    tables: tuple[str, ...] = ("speed",)
    degradation: str = INT3
    steps: int = 60
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(TRAINING))
    side: str = "remend"
    data: str = "train.jsonl"
    patch: Mapping[str, str] = field(default_factory=dict)


def short_lines(degradation: str) -> list[Line]:
    """Of the tables of prompts and bootstrap: 24 steps, each run in every table that it can stand in."""
    tables = ("prompts", "bootstrap", *(["options"] if degradation == INT3 else []))
    return [
        Line(f"on-policy, {degradation}", tables, degradation, 24),
        Line(f"off-policy first, {degradation}", ("bootstrap",), degradation, 24, {**TRAINING, **ON}),
        Line(f"self-written, {degradation}", ("prompts",), degradation, 24, data="self.jsonl"),
        Line(f"auto, {degradation}", ("bootstrap",), degradation, 24, {**TRAINING, **AUTO}),
    ]


def options(name: str, patch: Mapping[str, str] | None = None, **changed: Any) -> Line:
    """Of the table of options: as on-policy, but for one thing."""
    return Line(name, ("options",), INT3, 24, {**TRAINING, **changed}, patch=patch or {})


LINES = (
    Line("on-policy, 1e-4", recipe=COOL),
    Line("on-policy, 4e-4"),
    Line("repair first", steps=24, recipe=REPAIR),
    Line("repair on 48 answers", steps=24, recipe={**REPAIR, "repair_samples": 48}),
    Line("repair, then its answers", steps=36, recipe={**REPAIR, "bootstrap": "repair"}),
    Line("TRL, 1e-4", recipe=COOL, side="trl"),
    Line("TRL, 4e-4", side="trl"),
    *(line for degradation in DEGRADE for line in short_lines(degradation)),
    options("2 updates a rollout", **TWO),
    # the longer length is also that of the held-out answers
    options("short rollouts first", max_new_tokens=[16, TOKENS]),
    options("gradient checkpointing", gradient_checkpointing=True),
    options("micro-batches of 2, sorted", **SMALL),
    options("micro-batches of 2, unsorted", ARRIVAL, **SMALL),
    options("chunks of 3 MiB", chunks(3)),
    options("chunks of 128 MiB", chunks(128)),
)
