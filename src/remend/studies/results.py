"""What a study's finished cells say together: rows by group and method, methods at equal spending, CKA and recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from remend.errors import RemendError
from remend.evaluation.compare import compare
from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object
from remend.files.run_directory import TRACK
from remend.maths.gap import bootstrap_gap_closed, gap_closed_divergence
from remend.studies.cell import GRADES, OUTCOME
from remend.studies.certainties import GAPS, certainties
from remend.studies.correlate import correlate
from remend.studies.grid import Cell, Group, Method, Study
from remend.studies.made import reference_grades
from remend.studies.parts import Done, mean, parts_of, prompts_of
from remend.studies.power import planned

REFERENCE, DEGRADED, RECOVERED = "reference", "degraded", "recovered"


def gather(study: Study, out: Path, states: Mapping[str, str], ungraded: Mapping[str, Sequence[str]]) -> JsonObject:
    """All results of a study as plain values.

    Args:
        study: as read.
        out: its directory.
        states: of each cell: done, not run, or the message of its failure.
        ungraded: by finished cell, the tasks that it was not graded on; see cell.ungraded.
    """
    finished = [cell for cell in study.cells if states[cell.name] == "done"]
    places = [out / "cells" / cell.name for cell in finished]
    done = [
        Done(cell, place, read_object(place / OUTCOME), ungraded[cell.name])
        for cell, place in zip(finished, places, strict=True)
    ]
    groups = list(dict.fromkeys(cell.group for cell in study.cells))
    rows, at_tokens, at_seconds = [], [], []
    for group in groups:
        mine = [d for d in done if d.cell.group == group]
        idle = [d for d in mine if not d.cell.method.trained]
        if not idle:
            continue
        by_method = {m: [d for d in mine if d.cell.method == m] for m in study.methods.values()}
        rows += [_row(study, out, group, method, cells, idle[0]) for method, cells in by_method.items() if cells]
        trained = {m: cells for m, cells in by_method.items() if m.steps and cells}
        if trained:
            at_tokens.append(_equal(group, trained, "tokens", None))
            alike, elsewhere = _on_one_machine(trained)
            timed = _equal(group, alike, "seconds", study.budget.seconds)
            at_seconds.append({**timed, "left_out": [d.cell.name for d in elsewhere]})
    failures = {name: state for name, state in states.items() if state not in ("done", "not run")}
    outcomes = {d.cell.name: d.outcome for d in done}
    return {
        "study": study.name,
        "models": {name: spec.path for name, spec in study.models.items()},
        "methods": {m.name: m.how for m in study.methods.values()},
        "seeds": list(study.spec.seeds),
        "budget": study.budget.model_dump(),
        "rows": rows,
        "at_equal_tokens": at_tokens,
        "at_equal_seconds": at_seconds,
        "power": planned(study),
        "certainty": certainties(study, done),
        "correlation": _correlation(done, out),
        "cells": [_cell(cell, states[cell.name], outcomes.get(cell.name)) for cell in study.cells],
        "failures": failures,
        "hardware": _hardware(done),
        "notes": list(dict.fromkeys(note for d in done for note in d.outcome["notes"])),
        "recipe": study.path.read_text(encoding="utf-8"),
    }


def _row(study: Study, out: Path, group: Group, method: Method, cells: Sequence[Done], idle: Done) -> JsonObject:
    outcomes = [d.outcome for d in cells]
    gap, interval, prompts = _gap(cells, *GAPS["KL"])
    agreed, agreed_95, _ = _gap(cells, *GAPS["agreement"])
    # what one of the cells, or the degraded student, was not graded on can't be paired
    not_graded = list(dict.fromkeys(name for d in (*cells, idle) for name in d.ungraded))
    places = {REFERENCE: [reference_grades(study, out, group)], DEGRADED: [idle.place / GRADES]}
    places[RECOVERED] = [d.place / GRADES for d in cells]
    cost = {key: [o["training_seconds_of"][key] for o in outcomes] for key in ("repair", "answers", "steps")}
    return {
        "group": group.name,
        "model": group.model,
        "degradation": group.degradation,
        "task": group.task,
        "method": method.name,
        "how": method.how,
        "seeds": [d.cell.seed for d in cells],
        "kl": {when: mean([o["kl"][when] for o in outcomes]) for when in (DEGRADED, RECOVERED)},
        "agreement": {when: mean([o["agreement"][when] for o in outcomes]) for when in (DEGRADED, RECOVERED)},
        "gap_closed": gap,
        "gap_closed_95": interval,
        "agreement_gap_closed": agreed,
        "agreement_gap_closed_95": agreed_95,
        "held_out_prompts": prompts,
        "gap_closed_by_seed": [o["gap_closed"] for o in outcomes],
        "grades": _grades(study, group, places, not_graded),
        "not_graded": not_graded,
        "steps": [o["steps"] for o in outcomes],
        "tokens_trained": [o["tokens_trained"] for o in outcomes],
        "training_seconds": [o["training_seconds"] for o in outcomes],
        "training_seconds_of": cost,
        "constraint": outcomes[0]["constraint"],
    }


def _gap(cells: Sequence[Done], start: str, end: str) -> tuple[float | None, tuple[float, float] | None, int]:
    """Gap closed of the mean over seeds, its interval over held-out prompts, and how many prompts these are.

    `start` and `end` name a prompt's sums before and after. Files that don't have them give no gap.
    """
    by_seed = [prompts_of(d.place) for d in cells]
    ids = [name for name in by_seed[0] if all(name in rows and start in rows[name] for rows in by_seed)]
    before = [mean([rows[name][start] for rows in by_seed]) for name in ids]
    after = [mean([rows[name][end] for rows in by_seed]) for name in ids]
    tokens = sum(by_seed[0][name]["tokens"] for name in ids)
    value = gap_closed_divergence(sum(before) / tokens, sum(after) / tokens) if tokens else None
    return value, bootstrap_gap_closed(before, after) if value is not None else None, len(ids)


def _grades(study: Study, group: Group, places: Mapping[str, Sequence[Path]], left: Sequence[str]) -> list[JsonObject]:
    """Scores and paired comparisons by task; the recovered models' are averaged over seeds, item by item."""
    parts = {who: parts_of(study, group, folders, left) for who, folders in places.items()}
    keys = [key for key in parts[RECOVERED] if all(key in parts[who] for who in places)]
    paired = [key for key in keys if all(parts[who][key]["items"] for who in places)]
    grades: list[JsonObject] = []
    if paired:
        files = [{"results": [parts[who][key] for key in paired]} for who in places]
        tasks = compare(files, names=list(places))["tasks"]
        grades = [_compared(task) for task in tasks]
    for key in keys:
        if key not in paired:
            scores = {who: {"score": parts[who][key]["score"], "interval": None, "method": None} for who in places}
            grades.append({"task": key[0], "grader": key[1], "n": None, "scores": scores, "change": None, "gap": None})
    several = [grade["task"] for grade in grades]
    for grade in grades:  # a task with several graders or metrics has a name for each
        once = several.count(grade["task"]) == 1
        grade["name"] = grade["task"] if once else f"{grade['task']} ({grade['grader']})"
        grade["ability"] = "task" if grade["task"] == group.task else "prior"
    return grades


def _compared(task: JsonRow) -> JsonObject:
    pairs = {(c["from"], c["to"]): c for c in task["comparisons"]}
    return {
        "task": task["task"],
        "grader": task["grader"],
        "n": task["n"],
        "scores": {s["name"]: {key: s[key] for key in ("score", "interval", "method")} for s in task["scores"]},
        "change": pairs[DEGRADED, RECOVERED],
        "damage": pairs[REFERENCE, DEGRADED],
        "gap": task["gap_closed"][0],
    }


def _equal(group: Group, trained: Mapping[Method, Sequence[Done]], what: str, wanted: float | None) -> JsonObject:
    """Methods where each has spent the same: so much, or as much as the cell that spent least."""
    ends = [d.outcome["curve"][-1][what] for cells in trained.values() for d in cells]
    at = wanted if wanted is not None else min(ends)
    rows = []
    for method, cells in trained.items():
        curves = [d.outcome["curve"] for d in cells]
        values = [read_at(curve, what, at) for curve in curves]
        gaps = [gap_closed_divergence(curve[0]["kl"], kl) for curve, kl in zip(curves, values, strict=True)]
        known = [gap for gap in gaps if gap is not None]
        rows.append(
            {
                "method": method.name,
                "kl": mean(values),
                "gap_closed": mean(known) if known else None,
                "gap_closed_by_seed": gaps,
                "spent": [curve[-1][what] for curve in curves],
                "ended_before": any(curve[-1][what] < at for curve in curves),
            }
        )
    return {"group": group.name, "at": at, "chosen": wanted is not None, "methods": rows}


def _on_one_machine(trained: Mapping[Method, Sequence[Done]]) -> tuple[dict[Method, list[Done]], list[Done]]:
    """The cells of the machine that most of them ran on, and the others: seconds of two machines compare nothing."""
    cells = [d for some in trained.values() for d in some]
    machines = [_machine(d) for d in cells]
    most = max(dict.fromkeys(machines), key=machines.count)
    kept = {method: [d for d in some if _machine(d) == most] for method, some in trained.items()}
    return {method: some for method, some in kept.items() if some}, [d for d in cells if _machine(d) != most]


def _machine(done: Done) -> str:
    """Processor, threads and GPUs."""
    hardware = done.outcome["hardware"]
    return repr([hardware.get(key) for key in ("processor", "threads", "gpus")])


def read_at(curve: Sequence[JsonRow], what: str, at: float) -> float:
    """KL when `at` tokens or seconds were spent: on a line between the measurements around it.

    Before the first step there is no line: a repair works when it is done. Beyond its end a curve is flat.
    """
    before = [point for point in curve if point[what] <= at][-1]
    after = next((point for point in curve if point[what] > at), None)
    if after is None or not after["step"]:
        return float(before["kl"])
    share = (at - before[what]) / (after[what] - before[what])
    return float(before["kl"] + share * (after["kl"] - before["kl"]))


def _correlation(done: Sequence[Done], out: Path) -> JsonObject:
    """What remend correlate finds over the trained cells; `reason` where it can't."""
    trained = [d for d in done if d.cell.method.trained and (d.place / TRACK).is_file()]
    tracked = [d for d in trained if d.outcome["gap_closed"] is not None]  # the others had nothing to recover
    if not tracked:
        return {"reason": "no trained cell has been tracked", "cells": []}
    try:
        correlation = correlate([d.place for d in tracked], out)
    except RemendError as error:
        return {"reason": str(error), "cells": []}
    names = {about["name"]: d.cell.name for about, d in zip(correlation["runs"], tracked, strict=True)}
    groups = {d.cell.name: d.cell.group.name for d in tracked}
    points = [{**p, "run": names[p["run"]], "group": groups[names[p["run"]]]} for p in correlation["points"]]
    shown = ("recovery", "alignment", "checkpoints", "overall", "near_the_end", "kl_only", "teachers")
    kept = {key: correlation[key] for key in (*shown, "quotable", "sentences", "notes")}
    return {**kept, "points": points, "cells": list(groups)}


def _cell(cell: Cell, state: str, outcome: JsonRow | None) -> JsonObject:
    kept = ("steps", "tokens_trained", "training_seconds", "seconds", "peak_rss_mib", "curve", "warnings")
    entry = {"name": cell.name, "group": cell.group.name, "method": cell.method.name, "seed": cell.seed, "state": state}
    return entry | ({key: outcome[key] for key in kept} if outcome else {})


def _hardware(done: Sequence[Done]) -> list[JsonObject]:
    """Each machine that cells ran on, once."""
    entries = [{key: d.outcome[key] for key in ("hardware", "dtype", "versions", "git_commit")} for d in done]
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
