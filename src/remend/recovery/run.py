"""A recovery from beginning to end, stage by stage; each is done by the file that its function comes from."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from remend.console import phase, phases
from remend.files.atomic import JsonObject
from remend.files.run_directory import RunDirectory
from remend.models.device import free_bytes
from remend.recovery.begin import Run, begin, create, load
from remend.recovery.bootstrap import ask_gate
from remend.recovery.by_block import remove_blocks, save_by_block, without_steps
from remend.recovery.clock import Clock
from remend.recovery.forecast import facts_of, record_speed
from remend.recovery.helpful_repair import repair_if_it_helps
from remend.recovery.hold import hold
from remend.recovery.judge import gate_verdict, prepare_side_judge
from remend.recovery.past import rewind_and_read
from remend.recovery.plan import Plan
from remend.recovery.plateau import Plateau, begin_plateau, with_prompts_apart
from remend.recovery.pools import build_sources, sample_pools
from remend.recovery.repair import check_repair, initial_weights
from remend.recovery.rows_at_once import rows_at_once
from remend.recovery.save import finish, reopened, save, saved_in
from remend.recovery.selection import Selection
from remend.recovery.tracking import Observer, measure_baseline
from remend.recovery.training import hooks_of, step_function, train_student, trained_parts
from remend.recovery.written_prompts import write_missing_prompts
from remend.training.agreement import require_alike
from remend.training.constraints import kind_of


def carry_out(plan: Plan, directory: RunDirectory | None, began: float) -> RunDirectory:
    """Carry out a plan.

    One process measures, writes and saves; it alone has an observer. The others share the steps.

    Args:
        plan: the run's.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
    """
    clock = Clock(began)
    with ExitStack() as held, phases(plan.phases):
        run = begin(plan, directory, held)
        # what the function holds, the trained student above all, is let go when it returns
        observer, outcome = train_and_save(run, clock, new=directory is None)
        if observer:
            clock.enter("measuring")
            judge, degraded = observer.judge, observer.degraded
            run = judge.run  # with the prompts that were written since
            saved = reopened(run, judge.reference)
            recovered = judge.measure_recovered(saved, degraded)
            observer.note(saved, outcome["selected"]["step"], "recovered", recovered.on_reference)
            finish(run, degraded, recovered, outcome, began)
            remove_blocks(run)
            if directory is None:
                record_speed(run, clock.stop(), outcome["steps"])
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
        create(run, rows_at_once(facts_of(plan), free_bytes(run.device)))
    clock.enter("prompts", shown=False)
    run = replace(run, prompts=with_prompts_apart(write_missing_prompts(run, reference), plan))
    past = rewind_and_read(run)

    clock.enter("baseline")
    observer = measure_baseline(run, reference, student, past.degraded)
    run.wait()

    clock.enter("repair")
    initial = initial_weights(run, student)
    # a checkpoint holds what came of repair, so a resumed run need not do it again
    repaired = past.repaired if run.resumed else repair_if_it_helps(run, student, reference, observer)
    if plan.placed.student.by_block:
        saved = save_by_block(run, student, *saved_in(plan, student)) if observer else {}
        return observer, without_steps(run, saved, repaired.record)
    if not repaired.start:
        initial = None  # nothing has changed since: the trainable parameters are the initial ones
    constraint = hold(run, student, reference, repaired)
    served = {f"the model's {name}": parameter for name, parameter in student.named_parameters()}
    require_alike(run.accelerator, {**constraint.masters(), **served}, "before the first step")
    del served
    repair, answers = repaired.record, repaired.answers
    del repaired  # its masters are as large as the model, and the constraint has its own

    clock.enter("training")
    parts = trained_parts(run, student)
    sources = build_sources(run, parts, teachers, initial)
    side = prepare_side_judge(run, sources, parts) if observer else None
    before = (past.streams or side.baseline()) if side else {}
    readiness = partial(gate_verdict, student, observer.judge, side) if observer and side else None
    gate = ask_gate(run, readiness, past.gate, len(answers))
    sources = sample_pools(run, sources, bootstrapping=gate.bootstrapping, answers=answers)
    selection = Selection(
        run.directory, constraint, config.selects == "best", config.patience, [*past.scores], past.best
    )
    hooks = hooks_of(run, parts, observer, side, before, selection) if observer and side else []
    plateau = None
    if observer and repair and repair["kept"]:
        plateau = begin_plateau(run, observer.judge, parts, constraint, past.apart)
    hooks += [plateau.hook] if plateau else []
    objective = step_function(run, parts, sources, gate)
    steps = train_student(run, objective, constraint, hooks, partial(_stops, selection, plateau), repair)
    selected = (selection.restore() or (plateau and plateau.selection.restore())) if observer else None
    after = side.measure() if side else {}

    clock.enter("saving", shown=False)
    saved = save(run, student, constraint) if observer else {}
    return observer, {
        "saved": saved,
        "repair": repair,
        "steps": steps,
        "learning_rate": plan.learning_rate,
        "gradient_checkpointing": parts.checkpointing,
        "selected": selected or {"step": steps},
        **({"ended": plateau.record()} if plateau and plateau.why else {}),
        "streams": {
            name: {"teacher": side.sources[name].stream.teacher.name, "before": before[name], "after": after[name]}
            for name in before
            if side
        },
    }


def _stops(selection: Selection, plateau: Plateau | None) -> bool:
    return selection.stop() or (plateau is not None and plateau.stop())
