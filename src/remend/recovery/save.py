"""How a run ends: the model is saved and loaded again; the summary says what was won back, once it is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from remend.compression.containers import formats_of
from remend.compression.recognise import record_to_keep
from remend.console import console, stage, warn
from remend.files.atomic import JsonObject, new_directory, write_json
from remend.files.environment import peak_rss_mib
from remend.files.run_directory import METRICS, SUMMARY
from remend.files.signed import signed
from remend.maths.losses import of_beta
from remend.models.adapters import is_adapted, merge
from remend.models.blocks import named_weights
from remend.models.find import find_model
from remend.models.load import inexact_in, save_model, stored_dtype
from remend.models.protocols import CausalLM
from remend.models.written import FILES, RECORD, hashes_of
from remend.recovery.begin import Run
from remend.recovery.card import write_model_card
from remend.recovery.judge import HeldOut, summarize
from remend.recovery.plan import Plan
from remend.recovery.segments import take_place
from remend.report import write_report
from remend.training.constraints import Constraint
from remend.training.teachers import Teacher


def save(run: Run, student: CausalLM, constraint: Constraint) -> JsonObject:
    """Write the model as it was measured, with its constraint's file and its record of damage.

    Returns:
        `dtype` of its weights, `why`, and SHA-256 of its `files`. In another dtype than float32 weights are rounded in
        place.
    """
    plan = run.plan
    with stage("saving the model"), new_directory(run.results / "model") as target:
        if plan.config.merge:
            merge(student)
        dtype, why = saved_in(plan, student)
        for weight in student.parameters() if dtype != torch.float32 else ():
            weight.data = weight.data.to(dtype)  # buffers stay: some models want theirs in float32
        save_model(student, plan.tokenizer, target, max_shard_size=plan.config.max_shard_size)
        constraint.save(target)
        record = record_to_keep(plan.student, plan.facts.recognised)
        if record and not is_adapted(student):
            write_json(target / RECORD, signed(record))
        files = hashes_of(target)
    name = str(dtype).removeprefix("torch.")
    console.print(f"the model is saved in {name}: {why}", soft_wrap=True)
    return {"dtype": name, "why": why, FILES: files}


def saved_in(plan: Plan, student: CausalLM) -> tuple[torch.dtype, str]:
    """The dtype of the saved weights, and why it is that."""
    given = plan.config.save_dtype or "auto"
    if is_adapted(student):
        return torch.float32, "adapters always are"
    if given == "float32":
        return torch.float32, "as given"
    theirs = stored_dtype(plan.student) if given == "auto" else getattr(torch, given)
    if theirs == torch.float32:
        return theirs, "the student's files hold float32 or packed weights"
    name, rounded = str(theirs).removeprefix("torch."), inexact_in(student, theirs)
    if given == "auto":
        if rounded:
            return torch.float32, f"the student's own {name} would round trained weights; save_dtype: {name} does so"
        return theirs, "the student's files are, and it rounds nothing"
    over = [n for n, weight in named_weights(student) if not weight.to(theirs).isfinite().all()]
    if over:
        warn(f"save_dtype {name} can't hold the numbers of {over[0]}, so the model is saved in float32")
        return torch.float32, f"{name} can't hold the numbers of {over[0]}"
    return theirs, f"as given; it rounds {len(rounded)} of its tensors, and the final figures are of the rounded model"


def saved_model(run: Run) -> CausalLM:
    """The model that `save` wrote."""
    return run.read_student(find_model(str(run.results / "model"), trust_remote_code=run.plan.config.trust_remote_code))


def reopened(run: Run, reference: Teacher) -> CausalLM:
    """The saved model. A reference that is its base moves over to it, so that the trained student can go."""
    reference.move_to(None)
    saved = saved_model(run)
    if reference.model is None and reference.held_out is None:
        # what was merged has no base any more
        based = saved if is_adapted(saved) else run.read(run.plan.student, torch.float32)
        reference.move_to(run.parts(based))
    return saved


def _grid_of(plan: Plan) -> str:
    """The name of the grid that the saved model lies on, or 'none'."""
    stored = plan.facts.recognised.stored
    return stored.format.name if stored and not plan.config.merge else "none"


def finish(run: Run, degraded: HeldOut, recovered: HeldOut, outcome: Mapping[str, Any], began: float) -> None:
    """Write the report and the summary, with what training says of itself (`outcome`); see `run_recovery` for `began`.

    degraded, recovered: the student as it came in, and as saved and loaded again.
    """
    directory, plan = run.directory, run.plan
    if run.longer:
        take_place(directory)
    summary = {
        **summarize(degraded, recovered, plan.config.seed),
        "kl_direction": of_beta(0.0).words,
        "training_loss": plan.directions,
        "constraint": plan.constraint,
        "exports": [] if plan.facts.adapted and not plan.config.merge else formats_of(_grid_of(plan)),
        **outcome,
        **({"segments": [segment.record() for segment in plan.segments]} if plan.segments else {}),
        **({"epochs": plan.epochs.record()} if plan.epochs else {}),
        "tokens_trained": sum(row["tokens"] for row in directory.rows(METRICS) if "loss" in row),
        "seconds": round(time.monotonic() - began, 1),
        "training_seconds": round(sum(directory.step_seconds().values()), 1),
        "peak_rss_mib": round(peak_rss_mib()),
        "held_out_prompts": len(run.prompts.main.held_out),
        "warnings": [*plan.warnings, *run.prompts.warnings],
        "notes": list(plan.notes),
    }
    write_model_card(directory.path, plan, summary)
    write_report(directory.path, summary)
    directory.flush()
    write_json(directory.path / SUMMARY, signed(summary))  # last: its presence says that the run is complete
