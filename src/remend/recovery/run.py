"""A recovery from beginning to end, stage by stage; each is done by the file that its function comes from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from accelerate.utils import broadcast_object_list

from remend.console import console, phase, phases
from remend.files.atomic import JsonObject
from remend.files.run_directory import RunDirectory
from remend.models.protocols import CausalLM
from remend.models.sampling.answers import write_answers
from remend.recovery.begin import Run, begin, create, load
from remend.recovery.bootstrap import gate_of
from remend.recovery.clock import Clock
from remend.recovery.forecast import note_phases
from remend.recovery.hold import hold
from remend.recovery.judge import gate_verdict, side_judge_of
from remend.recovery.past import past_of
from remend.recovery.plan import Plan
from remend.recovery.pools import build_sources, with_pools
from remend.recovery.repair import (
    REPAIR_ANSWERS,
    Repaired,
    check_repair,
    initial_weights,
    repaired_student,
    take_back,
    trained_on,
)
from remend.recovery.save import finish, reopened, save
from remend.recovery.selection import Selection
from remend.recovery.tracking import Observer, observer_of
from remend.recovery.training import hooks_of, step_function, train_student, trained_parts
from remend.recovery.written_prompts import all_prompts
from remend.training.constraints import kind_of
from remend.training.teachers import Teacher


def carry_out(plan: Plan, directory: RunDirectory | None, began: float) -> RunDirectory:
    """Carry out a plan.

    One process measures, writes and saves; it alone has an observer. The others share the steps.

    Args:
        plan: the run's.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
    """
    run, clock = begin(plan, directory), Clock(began)
    with phases(plan.phases):
        # the trained student goes with its frame
        observer, outcome = train_and_save(run, clock, new=directory is None)
        if observer:
            phase("measuring")
            clock.enter("measuring")
            run, judge, degraded = observer.judge.run, observer.judge, observer.degraded
            saved = reopened(run, judge.reference)
            recovered = judge.recovered(saved, degraded)
            observer.note(saved, outcome["selected"]["step"], "recovered", recovered.on_reference)
            finish(run, degraded, recovered, outcome, began)
            if directory is None:
                note_phases(run, clock.stop())
    run.wait()
    return run.directory


def train_and_save(run: Run, clock: Clock, *, new: bool) -> tuple[Observer | None, JsonObject]:
    """Measure the student, repair it, train it under its constraint and save it; and what the summary says of that."""
    plan, config = run.plan, run.plan.config
    phase("loading")
    student, teachers = load(run)
    reference = teachers[plan.reference]
    kind_of(plan.facts).check(student, plan.facts)  # before repair, which would write the grid's points anyhow
    if not run.resumed:
        check_repair(run, student, reference)
    if new:
        create(run)
    clock.enter("prompts")
    run = replace(run, prompts=all_prompts(run, reference))
    past = past_of(run)

    phase("baseline")
    clock.enter("baseline")
    observer = observer_of(run, reference, student, past.degraded)
    run.wait()

    phase("repair")
    clock.enter("repair")
    initial = initial_weights(run, student)
    # a checkpoint holds what came of repair, so a resumed run need not do it again
    repaired = past.repaired if run.resumed else repair_if_it_helps(run, student, reference, observer)
    if not repaired.start:
        initial = None  # nothing has changed since: the trainable parameters are the initial ones
    constraint = hold(run, student, reference, repaired)
    repair, answers = repaired.record, repaired.answers
    del repaired  # its masters are as large as the model, and the constraint has its own

    phase("training")
    clock.enter("training")
    parts = trained_parts(run, student)
    sources = build_sources(run, parts, teachers, initial)
    side = side_judge_of(run, sources, parts) if observer else None
    before = (past.streams or side.baseline()) if side else {}
    readiness = partial(gate_verdict, student, observer.judge, side) if observer and side else None
    gate = gate_of(run, readiness, past.gate, len(answers))
    sources = with_pools(run, sources, bootstrapping=gate.bootstrapping, answers=answers)

    selection = Selection(run.directory, constraint, config.selects == "best", config.patience, [*past.scores])
    hooks = hooks_of(run, parts, observer, side, before, selection) if observer and side else []
    steps = train_student(run, step_function(run, parts, sources, gate), constraint, hooks, selection)
    selected = selection.restore() if observer else None
    after = side.measure() if side else {}

    clock.enter("saving")
    saved = save(run, student, constraint) if observer else {}
    return observer, {
        "saved": saved,
        "repair": repair,
        "steps": steps,
        "learning_rate": plan.learning_rate,
        "gradient_checkpointing": parts.checkpointing,
        "selected": selected or {"step": steps},
        "streams": {
            name: {"teacher": side.sources[name].stream.teacher.name, "before": before[name], "after": after[name]}
            for name in before
            if side
        },
    }


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
        sums, verdict[0] = observer.judge.repaired(student, observer.degraded, repaired.seconds, repaired.answers)
    if run.accelerator.num_processes > 1:
        broadcast_object_list(verdict)
    (record,) = verdict
    if not record["kept"]:
        if observer:
            kl = record["kl"]
            console.print(f"repair is undone: with it the held-out KL is {kl:.3f}, above the student's own")
        take_back(run, student)
        return Repaired(record=record)
    answers = trained_on(repaired.answers) if run.plan.config.bootstrap == "repair" else []
    if observer:
        if answers:
            write_answers(run.directory, REPAIR_ANSWERS, run.plan.tokenizer, repaired.answers)
        observer.note(student, 0, "repaired", sums)
    return replace(repaired, answers=answers, record=record)
