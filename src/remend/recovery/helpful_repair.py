"""Repair that is kept only where it helps."""

from __future__ import annotations

from dataclasses import replace

from remend.console import console
from remend.files.atomic import JsonObject
from remend.models.protocols import CausalLM
from remend.models.sampling.answers import write_answers
from remend.recovery.begin import Run
from remend.recovery.repair import REPAIR_ANSWERS, Repaired, repaired_student, take_back, trained_on
from remend.recovery.tracking import Observer
from remend.training.teachers import Teacher


def repair_if_it_helps(run: Run, student: CausalLM, reference: Teacher, observer: Observer | None) -> Repaired:
    """Repair the student in place where that lowers its held-out KL; every process repairs, and the observer decides.

    Its `answers` are those that training begins with, if the recipe wants that.
    """
    repaired = repaired_student(run, student, reference)
    if not repaired.start:
        return repaired
    verdict: list[JsonObject] = [{}]
    if observer:
        run.directory.note_seconds("repair", repaired.seconds)
        walked = repaired.start.walked
        sums, verdict[0] = observer.judge.measure_repaired(
            student, observer.degraded, repaired.seconds, repaired.answers, walked
        )
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(verdict)
    (record,) = verdict
    if not record["kept"]:
        if observer:
            kl, apart = record["kl"], record["apart"]
            why = f"with it the held-out KL is {kl:.3f}, above the student's own"
            if repaired.start.walked.worse:
                why = f"on text held apart its error went from {apart['before']:.3g} to {apart['after']:.3g}"
            console.print(f"repair is undone: {why}")
        take_back(run, student)
        return Repaired(record=record)
    answers = trained_on(repaired.answers) if run.plan.config.bootstrap == "repair" else []
    if observer:
        if answers:
            write_answers(run.directory, REPAIR_ANSWERS, run.plan.tokenizer, repaired.answers)
        observer.note(student, 0, "repaired", sums)
    return replace(repaired, answers=answers, record=record)
