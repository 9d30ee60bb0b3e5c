"""A recovery from beginning to end, stage by stage; each is done by the file that its function comes from."""

from __future__ import annotations

from accelerate.utils import broadcast_object_list

from remend.console import console
from remend.files.run_directory import RunDirectory
from remend.models.protocols import CausalLM
from remend.recovery.begin import Run, begin, load
from remend.recovery.hold import hold
from remend.recovery.judge import HeldOut, Judge, figures_of, judge_of
from remend.recovery.plan import Plan
from remend.recovery.pools import repair_answers
from remend.recovery.repair import Repaired, initial_weights, repaired_student, take_back
from remend.recovery.save import finish, reopened, save
from remend.recovery.tracking import Tracker, tracker_of
from remend.recovery.training import train_student
from remend.recovery.written_prompts import with_written_prompts
from remend.training.constraints import kind_of
from remend.training.teachers import Teacher


def carry_out(plan: Plan, directory: RunDirectory | None, began: float) -> RunDirectory:
    """Carry out a plan.

    One process measures, writes and saves; it alone has a judge. The others share the steps.

    Args:
        plan: the run's.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
    """
    run = begin(plan, directory)
    student, teachers = load(run)
    reference = teachers[plan.reference]
    run = with_written_prompts(run, reference)
    kind_of(plan.facts).check(student, plan.facts)  # before repair, which would write the grid's points anyhow

    judge = judge_of(run, reference)
    tracker = tracker_of(run, reference, judge) if plan.config.diagnose_every else None
    degraded = judge.degraded(student) if judge else None
    if tracker and degraded:
        tracker.note_once(student, 0, "degraded", figures_of(degraded.on_reference))
    run.wait()

    initial = initial_weights(run, student)
    repaired = repair_if_it_helps(run, student, reference, judge, tracker, degraded)
    if not repaired.seconds:
        initial = None  # nothing has changed since: the trainable parameters are the initial ones
    constraint = hold(run, student, reference, repaired)
    del repaired  # its masters are as large as the model, and the constraint has its own

    before = degraded.figures()["kl"] if degraded else None
    outcome = train_student(run, student, constraint, teachers, initial, judge, tracker, before)

    if judge and degraded:
        save(run, student, constraint)
        del student, constraint
        saved = reopened(run, reference)
        recovered = judge.recovered(saved, degraded)
        if tracker:
            tracker.note_once(saved, outcome["selected"]["step"], "recovered", figures_of(recovered.on_reference))
        finish(run, degraded, recovered, outcome, began)
    run.wait()
    return run.directory


def repair_if_it_helps(
    run: Run,
    student: CausalLM,
    reference: Teacher,
    judge: Judge | None,
    tracker: Tracker | None,
    degraded: HeldOut | None,
) -> Repaired:
    """Repair the student in place where that lowers its held-out KL; every process repairs, and follows the judge."""
    repaired = repaired_student(run, student, reference)
    if not repaired.seconds:
        return repaired
    verdict = [True]
    if judge and degraded:
        run.directory.note_seconds("repair", repaired.seconds)
        sums, verdict[0] = judge.repaired(student, degraded, repaired.seconds, repaired.answers)
        if not verdict[0]:
            kl = figures_of(sums)["kl"]
            console.print(f"repair is undone: with it the held-out KL is {kl:.3f}, above the student's own")
    if run.accelerator.num_processes > 1:
        broadcast_object_list(verdict)
    if not verdict[0]:
        take_back(run, student)
        return Repaired()
    if judge:
        if run.plan.config.bootstrap == "repair":
            repair_answers(run, repaired.answers)
        if tracker:
            tracker.note_once(student, 0, "repaired", figures_of(sums))
    return repaired
