"""Where a run's models are kept: what the recipe asks for, or what the free memory leaves."""

from __future__ import annotations

from collections.abc import Iterator

from remend.files.launch import processes
from remend.models.blocks.placement import Placed, numbers_in, place
from remend.models.find import ModelSource, fetch_model
from remend.recovery.findings import Findings
from remend.recovery.plan import Places, Plan

FLOAT = 4
"""Bytes of a weight while it is worked with."""
REPAIRED = 5
"""Bytes that a repair keeps of a number on a grid: the weight that was rounded, and its code."""


def place_models(plan: Plan, say: Findings) -> Places:
    """Where student and healthy model are kept; what can't be had is a problem."""
    asked, reference = plan.config.placement, plan.teachers[plan.reference].source
    wanted = [who for who, where in (("student", asked.student), ("teacher", asked.teacher)) if _apart(where, plan)]
    reasons = list(_needs_memory(plan, reference))
    if wanted and reasons:
        say.problems.append(
            f"placement of the {' and '.join(wanted)} can't be host or disk: {reasons[0]}. Leave placement to auto"
        )
    if reasons:
        return Places()
    needed = _in_memory(plan, reference)
    student, teacher = Placed(), Placed()
    with say.collecting():
        source = fetch_model(plan.student, weights=True)
        student = place(asked.student, source, needed, plan.device, "the run")
    with say.collecting():
        assert reference is not None
        teacher = place(asked.teacher, fetch_model(reference, weights=True), needed, plan.device, "the run")
    return Places(student, teacher)


def _apart(where: str, plan: Plan) -> bool:
    return where == "disk" or (where == "host" and plan.device.type != "cpu")


def _needs_memory(plan: Plan, reference: ModelSource | None) -> Iterator[str]:
    """Why a run works on whole models."""
    config = plan.config
    if config.steps > 0 or plan.segments:
        yield f"steps is {config.steps}, and training holds all weights in memory; set steps to 0, which only repairs"
    if plan.facts.adapted:
        yield "an adapter is trained beside weights in memory"
    if len(plan.prompts.streams) > 1:
        yield f"{len(plan.prompts.streams)} streams are for training; give one"
    if reference is None or plan.prompts.main.stream.teacher.name != plan.reference:
        yield "the reference is no model of its own files"
    if processes() > 1:
        yield f"{processes()} processes were launched; launch one"


def _in_memory(plan: Plan, reference: ModelSource | None) -> int | None:
    """Bytes of the run with all weights in memory; None where that is not known."""
    ours = numbers_in(plan.student)
    theirs = numbers_in(reference) if reference else None
    if ours is None or theirs is None:
        return None
    return FLOAT * (ours + theirs) + (REPAIRED * plan.size.matrices if plan.repairs else 0)
