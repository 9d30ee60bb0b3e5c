"""Alignment over a recovery: CKA of every layer with the reference, beside KL, at its start, every n steps, at its end.

One row a held-out prompt, so a recovery with 64 of them gives noisier figures than a diagnosis; compare within the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from remend.console import stage, warn
from remend.data.order import derive_seed
from remend.errors import InputError
from remend.files.atomic import json_line, write_text
from remend.files.reading import read_object
from remend.files.run_directory import SUMMARY, TRACK, RunDirectory
from remend.files.signed import signed
from remend.maths.cka import debiased_cka
from remend.models.activations.capture import as_layers, capture, pick_positions, usable
from remend.models.layers import infer_layer_map
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.recovery.begin import Run, begin, load
from remend.recovery.hold import hold
from remend.recovery.judge import HeldOut, Judge, figures_of, prepare_judge
from remend.recovery.plan import Plan
from remend.recovery.repair import Repaired
from remend.recovery.save import saved_model
from remend.recovery.written_prompts import write_missing_prompts
from remend.training.loop import restore_masters
from remend.training.measure import PromptSums
from remend.training.teachers import Teacher


@dataclass
class Tracker:
    """Measures a student's layers, and keeps the figures in track.jsonl; `tracker_of` makes it.

    run: whose directory it writes to.
    reference: the healthy model.
    completions: its answers to the held-out prompts.
    picks: which token of each answer gives the row.
    layer_map: for each of the student's layers the reference's; None finds it.
    """

    run: Run
    reference: Scorer
    completions: Sequence[Rollout]
    picks: Sequence[int]
    layer_map: Sequence[int] | None
    _theirs: Tensor | None = None

    def measured(self, step: int, stage: str) -> bool:
        """Whether the figures are there already, from before an interruption."""
        return any(row["step"] == step and row["stage"] == stage for row in self.run.directory.rows(TRACK))

    def sorted_rows(self) -> list[dict[str, Any]]:
        """All rows by step and stage; the file is put in that order."""
        order = ("degraded", "repaired", "training", "recovered")
        directory = self.run.directory
        rows = sorted(directory.rows(TRACK), key=lambda row: (row["step"], order.index(row["stage"])))
        write_text(directory.path / TRACK, "".join(map(json_line, rows)))
        return rows

    def note_once(self, model: CausalLM, step: int, name: str, figures: Mapping[str, float]) -> None:
        """`note` under a progress line, where the row is not there yet."""
        if not self.measured(step, name):
            with stage(f"comparing the layers of the {name} model"):
                self.note(self.run.parts(model), step, name, figures)

    def note(self, student: Scorer, step: int, stage: str, figures: Mapping[str, float]) -> list[float]:
        """Add a row, with the student's kl and top1_agreement on the same answers; CKA by layer.

        `stage` is degraded, repaired, training or recovered.
        """
        if self._theirs is None:
            self._theirs = self._rows(self.reference, "the reference")
        if self.layer_map is None:
            self.layer_map = infer_layer_map(student.model, self.reference.model)
        ours_LSD = self._rows(student, "the student")
        try:
            keep_S = usable(self._theirs, ours_LSD)
            values = [
                debiased_cka(self._theirs[at][keep_S], ours_SD[keep_S])
                for at, ours_SD in zip(self.layer_map, ours_LSD, strict=True)
            ]
        except InputError as error:  # too few rows: no reason to stop a run
            warn(f"the layers of the {stage} model (step {step}) are not compared: {error}")
            keep_S, values = torch.zeros(0, dtype=torch.bool), [math.nan] * len(ours_LSD)
        row = {"step": step, "stage": stage, "kl": figures["kl"], "top1_agreement": figures["top1_agreement"]}
        plain = [value if value == value else None for value in values]
        of = {"cka": plain, "reference_layers": list(self.layer_map), "rows": int(keep_S.sum())}
        self.run.directory.append(TRACK, signed({**row, **of}))
        return values

    def _rows(self, parts: Scorer, name: str) -> Tensor:
        states = capture(parts, name, self.completions, self.picks)
        return as_layers(states["residual"], len(self.completions))


@dataclass(frozen=True)
class Observer:
    """Who measures the main stream, in the main process; `measure_baseline` makes it.

    degraded: the judge's measurement of the student as it came in.
    tracker: of the layers, where the recipe asks for one.
    """

    judge: Judge
    degraded: HeldOut
    tracker: Tracker | None

    def note(self, model: CausalLM, step: int, name: str, sums: Sequence[PromptSums]) -> None:
        """The layers of the model, where they are tracked; `sums` are its own on the judge's prompts."""
        if self.tracker:
            self.tracker.note_once(model, step, name, figures_of(sums))


def measure_baseline(run: Run, reference: Teacher, student: CausalLM, degraded: HeldOut | None) -> Observer | None:
    """The observer, once the student as it came in is measured; None in a process that only shares the steps.

    `degraded` is that measurement, where an earlier process has made it.
    """
    judge = prepare_judge(run, reference)
    if judge is None:
        return None
    tracker = tracker_of(run, reference, judge) if run.plan.config.diagnose_every else None
    observer = Observer(judge, degraded or judge.measure_degraded(student), tracker)
    observer.note(student, 0, "degraded", observer.degraded.on_reference)
    return observer


def tracker_of(run: Run, reference: Teacher, judge: Judge) -> Tracker | None:
    """A tracker of the reference's layers on the judge's prompts; None where the reference has no layers."""
    if reference.model is None:
        return None
    completions = [r for r in judge.completions if r.completion]
    draws = [derive_seed(run.plan.config.seed, "row", r.id) / 2**63 for r in completions]
    picks = pick_positions([len(r.completion) for r in completions], draws)
    return Tracker(run, run.parts(reference.model), completions, picks, run.plan.facts.layer_map)


def track_run(plan: Plan, directory: RunDirectory) -> list[dict[str, Any]]:
    """Measure what track.jsonl lacks: the student as it came in, the checkpoints that are kept, the saved model.

    Raises InputError where the reference's layers can't be looked at.
    """
    with ExitStack() as held:
        return _tracked(begin(plan, directory, held))


def _tracked(run: Run) -> list[dict[str, Any]]:
    plan, directory = run.plan, run.directory
    student, teachers = load(run)
    reference = teachers[plan.reference]
    run = replace(run, prompts=write_missing_prompts(run, reference))
    judge = prepare_judge(run, reference)
    tracker = tracker_of(run, reference, judge) if judge else None
    if judge is None or tracker is None:
        kind = "a cache, which has no layers" if reference.held_out is not None else "no model of its own"
        raise InputError(f"the reference of this run is {kind} to compare with")
    parts = run.parts(student)
    tracker.note_once(student, 0, "degraded", judge.quick(parts))
    saved = [c for c in directory.whole_checkpoints() if not tracker.measured(c.step, "training")]
    if saved:
        constraint = hold(run, student, reference, Repaired())
        for checkpoint in saved:
            restore_masters(checkpoint, constraint)
            tracker.note_once(student, checkpoint.step, "training", judge.quick(parts))
    if (directory.path / SUMMARY).is_file():
        model = saved_model(run)
        steps = read_object(directory.path / SUMMARY)["selected"]["step"]
        tracker.note_once(model, steps, "recovered", judge.quick(run.parts(model)))
    return tracker.sorted_rows()
