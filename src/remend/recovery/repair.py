"""One-shot repair: win back in closed form what needs no gradient, before the first step.

How depends on what the student is held to (training/constraints); this file chooses what it is fitted to: the teacher's
answers to training prompts, or text that the user gives (calibration_text.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from remend.console import console
from remend.data.templates import Encoded
from remend.files.atomic import JsonObject
from remend.models.activations.walk import check_walk, completions
from remend.models.blocks import by_block
from remend.models.blocks.journal import BlockJournal
from remend.models.blocks.opening import as_float32
from remend.models.protocols import CausalLM
from remend.models.sampling.answers import answered_once
from remend.models.sampling.rollout import Rollout
from remend.recovery.begin import Run
from remend.recovery.by_block import forget_blocks, journal_of
from remend.recovery.calibration_text import TOKENS, calibration_prompts
from remend.training.constraints import Calibration, Start, StudentFacts, kind_of
from remend.training.teachers import Teacher

REPAIR_ANSWERS = "repair-answers.jsonl"

CALIBRATION_TEXT = "repair-text.jsonl"
"""What repair is fitted to, where blocks are on the disk: a killed repair goes on with the same."""


@dataclass(frozen=True)
class Repaired:
    """What a repair gave.

    Attributes:
        start: what training starts from; None where nothing was done.
        seconds: that it took, 0 where nothing was done.
        answers: of the teacher, that it was fitted to; once repair is kept, those that can be trained on.
        record: what repair.json says of it; None where nothing was measured.
    """

    start: Start | None = None
    seconds: float = 0.0
    answers: Sequence[Rollout] = ()
    record: JsonObject | None = None


def repair(
    student: CausalLM,
    teacher: CausalLM,
    facts: StudentFacts,
    text: Callable[[], Sequence[Rollout]],
    *,
    precision: AbstractContextManager[object] | None = None,
    journal: BlockJournal | None = None,
) -> Repaired:
    """Repair a compressed student in place. One that is not compressed, or not cut from the teacher, is left as it is.

    Args:
        student, teacher: the models; the teacher's weights are used, so it must be of the student's family.
        facts: of the student.
        text: gives what the student is fitted to; it is asked only where there is something to repair.
        precision: context of the forward passes.
        journal: where a student whose blocks are on the disk gets its new ones.
    """
    kind = kind_of(facts)
    if not kind.repairs(student, facts, teacher):
        return Repaired()
    began = time.perf_counter()
    rows = text()
    if by_block(teacher):
        teacher = as_float32(teacher)
    elif next(teacher.parameters()).dtype != torch.float32:
        # what a layer ought to add is a difference of large states, which bfloat16 (a GPU's teacher) would blur
        teacher = copy.deepcopy(teacher).to(torch.float32)
    if journal:
        journal.begin()
    start = kind.repair(student, facts, Calibration(teacher, rows, precision, journal))
    if blocks := start.walked.unexplained:
        how = "fitted to what the teacher's layers give" if start.walked.beside else "not fitted"
        numbers = ", ".join(map(str, blocks))
        console.print(
            f"blocks {numbers} add more to the residual stream than their layers give: their layers are {how}"
        )
    if held_back := ", ".join(map(str, start.walked.held_back)):
        console.print(f"repair leaves blocks {held_back} as they came: on text held apart its change did harm")
    return Repaired(start, time.perf_counter() - began, rows)


def check_repair(run: Run, student: CausalLM, reference: Teacher) -> None:
    """Raise InputError where a repair lies ahead and one of the models can't be walked.

    It is tried before anything is sampled or written: of prompts that the reference has not written yet, any tokens
    stand in for them.
    """
    if not _repairs(run, student, reference):
        return
    prompts = run.prompts.main.train or [Encoded("any", tuple(range(1, 9)), "")]
    for model in (student, reference.model):
        assert model is not None
        check_walk(model, prompts)


def _repairs(run: Run, student: CausalLM, reference: Teacher) -> bool:
    plan, teacher = run.plan, reference.model
    if not plan.config.repair or plan.facts.adapted or teacher is None:
        return False
    return kind_of(plan.facts).repairs(student, plan.facts, teacher)


def repaired_student(run: Run, student: CausalLM, reference: Teacher) -> Repaired:
    """Repair the student in place where the plan asks for it; `seconds` is 0 where nothing was done."""
    plan, config, teacher = run.plan, run.plan.config, reference.model
    if teacher is None or not _repairs(run, student, reference):
        return Repaired()
    journal = journal_of(run, student)

    def text() -> Sequence[Rollout]:
        if plan.repair_text:
            return plan.repair_text.rows
        prompts = calibration_prompts(run.prompts.main.train, plan.repair_answers, config.seed)
        write = partial(_answers, run, teacher, prompts)
        return answered_once(run.directory, CALIBRATION_TEXT, prompts, plan.tokenizer, write) if journal else write()

    return repair(student, teacher, plan.facts, text, precision=run.precision(), journal=journal)


def _answers(run: Run, teacher: CausalLM, prompts: Sequence[Encoded]) -> list[Rollout]:
    """The teacher's, of ids that both models know."""
    plan, seed, rows = run.plan, run.plan.config.seed, run.rows_at_once
    with run.precision():
        return completions(
            teacher, plan.tokenizer, prompts, max_new_tokens=TOKENS, seed=seed, shared=plan.shared, rows=rows
        )


@torch.no_grad()
def take_back(run: Run, student: CausalLM) -> None:
    """The weights that the student came in with, in place: teachers may be views of it."""
    if by_block(student):
        forget_blocks(run, student)
        return
    before = dict(run.read(run.plan.student).named_parameters())
    for name, parameter in student.named_parameters():
        parameter.copy_(before[name])


def initial_weights(run: Run, student: CausalLM) -> dict[str, Tensor] | None:
    """The weights as the student came in, where repair may change what a stream's teacher needs."""
    wanted = any(s.stream.teacher.needs_initial for s in run.prompts.streams)
    if run.plan.config.lora is not None or not wanted:
        return None
    return {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}


def trained_on(answers: Sequence[Rollout]) -> list[Rollout]:
    """Of the answers that repair was fitted to, those that training can begin with (bootstrap: repair)."""
    return [replace(r, off_policy=True) for r in answers if r.completion]
