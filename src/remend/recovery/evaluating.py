"""What is measured between steps: hooks of the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping

from remend.models.scorer import Scorer
from remend.recovery.begin import Run
from remend.recovery.judge import Judge, SideJudge
from remend.recovery.selection import SCORE, Selection, score
from remend.recovery.tracking import Tracker
from remend.training.loop import Hook


def evaluation_hook(
    run: Run, student: Scorer, judge: Judge, side: SideJudge, selection: Selection, kl_before: float
) -> Hook:
    """Held-out measures of all streams every `eval_every` steps, and the score that selection goes by.

    Args:
        run: of the training.
        student: as it is trained.
        judge, side: measure the main stream and the others.
        selection: is told the score.
        kl_before: of the main stream, before training and repair.
    """
    config, main = run.plan.config, run.plan.main.stream.name
    weights = {name: source.stream.weight for name, source in side.sources.items()}

    def evaluate(step: int) -> Mapping[str, float] | None:
        last = config.selects == "best" and step == config.steps
        if step % config.eval_every and not last:
            return None
        row = {f"eval/{key}": value for key, value in judge.quick(student).items()}
        before, now = {main: kl_before}, {main: row["eval/kl"]}
        for name, figures in side.measure().items():
            row |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            before[name], now[name] = side.goal(name, side.baseline()[name]), side.goal(name, figures)
        if config.selects == "best" or config.patience or config.streams:
            row[SCORE] = score(before, now, {name: weights[name] for name in now})
            selection.seen(step, row[SCORE])
        return row

    return evaluate


def tracking_hook(run: Run, student: Scorer, judge: Judge, tracker: Tracker) -> Hook:
    """Alignment of the layers every `diagnose_every` steps; the last step is measured as saved."""
    config = run.plan.config

    def diagnose(step: int) -> Mapping[str, float] | None:
        if step % config.diagnose_every or step == config.steps:
            return None
        values = tracker.note(student, step, "training", judge.quick(student))
        known = [value for value in values if not math.isnan(value)]
        return {"eval/cka": sum(known) / len(known)} if known else None

    return diagnose
