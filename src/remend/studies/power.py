"""What a study's rows and seeds can show, said before anything is run."""

from __future__ import annotations

import math

from remend.data import tasks
from remend.files.atomic import JsonObject
from remend.maths.paired import minimum_detectable_effect
from remend.maths.seeds import least_difference, planned_error
from remend.studies.certainties import GAPS, LEVEL, POWER
from remend.studies.grid import Study
from remend.studies.made import ROWS

FLIPS = (0.1, 0.2, 0.3)
"""Shares of graded rows that two models answer otherwise (discordant pairs): few, some, many."""

SPREADS = (0.1, 0.2, 0.4)
"""Standard deviation of held-out prompts' shares of a gap closed: two methods that are alike, a repair, a poor one."""

SEED_POINTS, SEED_SHARE = 0.02, 0.01
"""Standard deviations of seeds that are taken for granted: 2 points of a score, and 1% of a gap. Two seeds of a
repaired int3 student closed 86% and 85% (docs/measurements/results.md)."""


def planned(study: Study) -> JsonObject:
    """The least difference that the study can find, by measure, with what is assumed for it.

    Returns:
        level, power, tests (how many the table of rows will have), seeds, and measures: each has measure, items, unit,
        assumed_seeds (their standard deviation) and least, a list of {spread, alone, in_table}. `spread` is the share
        of rows that flip, or the standard deviation over prompts; `alone` is a single test's least difference, and
        `in_table` that of the first of Holm's, at a level that allows for all tests. None where even every row
        flipping would not be found. Tasks whose number of rows is not said by the study are left out.
    """
    seeds, tests = len(study.spec.seeds), _tests(study)
    measures: list[JsonObject] = []
    strict = 1 - (1 - LEVEL) / max(tests, 1)
    for name, spec in {**study.tasks, **study.benchmarks}.items():
        rows = spec.rows or (ROWS if name in tasks.names() and spec.held_out is None else None)
        if rows is not None and rows > 1:
            least: list[JsonObject] = [
                {"spread": share, "alone": _points(rows, seeds, share, LEVEL)}
                | {"in_table": _points(rows, seeds, share, strict)}
                for share in FLIPS
            ]
            measures.append(
                {"measure": f"{name} points", "items": rows, "unit": "points", "assumed_seeds": SEED_POINTS}
                | {"least": least}
            )
    least = [
        {"spread": spread, "alone": _share(study.data.rows, seeds, spread, LEVEL)}
        | {"in_table": _share(study.data.rows, seeds, spread, strict)}
        for spread in SPREADS
    ]
    measures.append(
        {"measure": "KL gap closed", "items": study.data.rows, "unit": "share", "assumed_seeds": SEED_SHARE}
        | {"least": least}
    )
    return {"level": LEVEL, "power": POWER, "tests": tests, "seeds": seeds, "measures": measures}


def _tests(study: Study) -> int:
    """Of the table of rows: each trained method on each group, by gaps and graded tasks."""
    rows = {(cell.group, cell.method.name) for cell in study.cells if cell.method.trained}
    graders = 1 + sum(2 if spec.options.get("grader") == "both" else 1 for spec in study.benchmarks.values())
    return len(rows) * (len(GAPS) + graders)


def _points(rows: int, seeds: int, flips: float, level: float) -> float | None:
    """Of paired grades: exact for one seed, else by the variance of discordant pairs."""
    if seeds == 1:
        return minimum_detectable_effect(rows, flips, POWER, level)
    error, degrees = planned_error(rows, seeds, of_items=math.sqrt(flips), of_seeds=SEED_POINTS)
    return least_difference(error, degrees, level=level, power=POWER)


def _share(prompts: int, seeds: int, spread: float, level: float) -> float:
    error, degrees = planned_error(prompts, seeds, of_items=spread, of_seeds=SEED_SHARE)
    return least_difference(error, degrees, level=level, power=POWER)
