"""One-shot repair: win back in closed form what needs no gradient, before the first step.

How depends on what the student is held to (training/constraints); this file chooses what it is fitted to: the teacher's
answers to training prompts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from remend.console import console
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.files.atomic import JsonObject
from remend.models.activations.walk import check_walk, completions
from remend.models.blocks import by_block
from remend.models.blocks.journal import BlockJournal
from remend.models.blocks.opening import as_float32
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.answers import answered_once
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import ROWS
from remend.recovery.begin import Run
from remend.recovery.by_block import forget_blocks, journal_of
from remend.training.constraints import Calibration, Start, StudentFacts, kind_of
from remend.training.teachers import Teacher

TOKENS = 64
"""Of a calibration sample, the reference's own completion of a training prompt."""

REPAIR_ANSWERS = "repair-answers.jsonl"

CALIBRATION_TEXT = "repair-text.jsonl"
"""What repair is fitted to, where blocks are on the disk: a killed repair goes on with the same."""

MOST_ROWS = 65_536
"""Tokens of calibration text, prompts included: long prompts would else cost hours and tens of gigabytes."""


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


def calibration_prompts(prompts: Sequence[Encoded], samples: int, seed: int) -> list[Encoded]:
    """From the end of training's order, as far as MOST_ROWS reaches; one at least, and some twice where they are few.

    The order is varied (files go by topic), and training begins at its other end: with what repair has not seen.
    """
    chosen: list[Encoded] = []
    rows = 0
    for _, prompt in reversed(Order(prompts, seed).take(0, max(samples, len(prompts)))):
        rows += len(prompt.tokens) + TOKENS
        if chosen and (rows > MOST_ROWS or len(chosen) == samples):
            break
        chosen.append(prompt)
    return chosen


def repair(
    student: CausalLM,
    teacher: CausalLM,
    facts: StudentFacts,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    *,
    seed: int,
    shared: int,
    precision: AbstractContextManager[object] | None = None,
    rows: int = ROWS,
    journal: BlockJournal | None = None,
    written: Callable[[Callable[[], list[Rollout]]], list[Rollout]] | None = None,
) -> Repaired:
    """Repair a compressed student in place. One that is not compressed, or not cut from the teacher, is left as it is.

    Args:
        student, teacher: the models; the teacher's weights are used, so it must be of the student's family.
        facts, tokenizer: of the student.
        prompts: what the teacher answers for calibration text.
        seed: of its answers.
        shared: ids that both models know; a padded teacher writes no others.
        precision: context of the forward passes, and of sampling.
        rows: that are sampled at once.
        journal: where a student whose blocks are on the disk gets its new ones.
        written: given what lets the teacher answer, the answers, which may be kept from an earlier try.
    """
    kind = kind_of(facts)
    if not kind.repairs(student, facts, teacher):
        return Repaired()
    began = time.perf_counter()

    def answered() -> list[Rollout]:
        with precision or nullcontext():
            return completions(teacher, tokenizer, prompts, max_new_tokens=TOKENS, seed=seed, shared=shared, rows=rows)

    text = written(answered) if written else answered()
    if by_block(teacher):
        teacher = as_float32(teacher)
    elif next(teacher.parameters()).dtype != torch.float32:
        # what a layer ought to add is a difference of large states, which bfloat16 (a GPU's teacher) would blur
        teacher = copy.deepcopy(teacher).to(torch.float32)
    if journal:
        journal.begin()
    start = kind.repair(student, facts, Calibration(teacher, text, precision, journal))
    if blocks := start.walked.unexplained:
        how = "fitted to what the teacher's layers give" if start.walked.beside else "not fitted"
        numbers = ", ".join(map(str, blocks))
        console.print(
            f"blocks {numbers} add more to the residual stream than their layers give: their layers are {how}"
        )
    if held_back := ", ".join(map(str, start.walked.held_back)):
        console.print(f"repair leaves blocks {held_back} as they came: on text held apart its change did harm")
    return Repaired(start, time.perf_counter() - began, text)


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
    prompts = calibration_prompts(run.prompts.main.train, plan.repair_answers, config.seed)
    seed, how, journal, written = config.seed, run.precision(), journal_of(run, student), None
    if journal:

        def written(write: Callable[[], list[Rollout]]) -> list[Rollout]:
            return answered_once(run.directory, CALIBRATION_TEXT, prompts, plan.tokenizer, write)

    return repair(
        student,
        teacher,
        plan.facts,
        plan.tokenizer,
        prompts,
        seed=seed,
        shared=plan.shared,
        precision=how,
        journal=journal,
        written=written,
        rows=run.rows_at_once,
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
