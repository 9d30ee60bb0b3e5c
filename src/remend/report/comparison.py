"""One page for several runs and diagnoses: gap closed, CKA by layer, recovery against alignment, what differs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from remend.files.atomic import JsonObject, JsonRow
from remend.report.charts import BARS, Forest, Lines, Series, Share
from remend.report.diagnosis import gaps_closed, students_of
from remend.report.layers import anchors, cka_series, null_level
from remend.report.page import Block, Code, Facts, Figure, Page, Section, Table, Text
from remend.report.recovery import gap_share
from remend.report.scores import Score, scores_of
from remend.report.tracks import against, student_groups, track_group
from remend.report.words import number


@dataclass(frozen=True)
class Run:
    """A finished recovery: its name on the page, directory, summary, manifest, and track (empty without one)."""

    name: str
    path: Path
    summary: JsonRow
    manifest: JsonRow
    track: Sequence[JsonRow]


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis: its name on the page, directory, and the content of diagnosis.json."""

    name: str
    path: Path
    content: JsonRow


Compared = Run | Diagnosis


def comparison_page(compared: Sequence[Compared]) -> Page:
    """The page as data; its order is that of the arguments."""
    runs = [c for c in compared if isinstance(c, Run)]
    diagnoses = [c for c in compared if isinstance(c, Diagnosis)]
    sections = [
        *_gaps(runs, diagnoses),
        *([Section("Runs", "runs", [_runs(runs)])] if runs else []),
        *_diagnosed(diagnoses),
        *_alignment(runs, diagnoses),
        *_recipes(runs),
        Section("What is compared", "compared", _compared(compared)),
    ]
    words = (len(runs), "recovery", "recoveries"), (len(diagnoses), "diagnosis", "diagnoses")
    counts = [f"{count} {one if count == 1 else more}" for count, one, more in words if count]
    return Page(
        title=f"Comparison of {' and '.join(counts)}",
        verdict=_verdict(runs, diagnoses),
        about="Made from the files of each; every one has a page of its own.",
        sections=sections,
        warnings=[*_unlike_runs(runs), *_unlike_diagnoses(diagnoses)],
    )


def _shares(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> list[Share]:
    rows = []
    for run in runs:
        rows.append(gap_share(run.summary, run.name))
    for diagnosis in diagnoses:
        rows += gaps_closed(students_of(diagnosis.content), f"{diagnosis.name}: ")
    return rows


def _verdict(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> str:
    known = [row for row in _shares(runs, diagnoses) if row.value is not None]
    if not known:
        return "No gap closed is known of any."
    best = max(known, key=lambda row: row.value or 0.0)
    if best.tone != "good":
        return f"None closed the KL gap beyond chance; the most is {best.words()}, of {best.name}."
    return f"Most of the KL gap is closed by {best.name}: {best.words()}."


def _gaps(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> list[Section]:
    rows = _shares(runs, diagnoses)
    if not any(row.value is not None for row in rows):
        return []
    figure = Figure(
        [Forest("Gap closed in KL, with 95% intervals", rows, "share of the KL gap closed")],
        see="How far each came back from its damaged model (0%) to its reference (100%). "
        f"{BARS} Where two bars overlap, this hardly tells the two apart.",
        measured="KL to the reference on its own answers; percentile bootstrap with prompts resampled in pairs, within "
        "each run. The intervals say nothing of other seeds.",
    )
    return [Section("Gap closed", "gap", [figure])]


def _runs(runs: Sequence[Run]) -> Table:
    rows = []
    graded = {run.name: scores_of(run.path, run.manifest) for run in runs}
    tasks = list(dict.fromkeys(task for scores in graded.values() for task in scores))
    for run in runs:
        before, after = run.summary["degraded"], run.summary["recovered"]
        scores = graded[run.name]
        rows.append(
            [
                run.name,
                gap_share(run.summary).words(),
                f"{number(before['kl'])} → {number(after['kl'])}",
                *(_task(scores.get(task, {})) for task in tasks),
                str(run.summary["constraint"]),
                f"{number(before['top1_agreement'], '.1%')} → {number(after['top1_agreement'], '.1%')}",
                str(run.summary["steps"]),
                str(run.summary["tokens_trained"]),
                f"{run.summary['seconds']:.0f}",
            ]
        )
    columns = [
        "run",
        "KL gap closed (95%)",
        "KL, nats per token",
        *tasks,
        "constraint",
        "top-1 agreement",
        "steps",
        "tokens",
        "s",
    ]
    scored = " Tasks: score of the recovered model, with the degraded one's before the arrow." if tasks else ""
    caption = f"KL and agreement: degraded → recovered, on held-out prompts.{scored}"
    return Table(columns, rows, caption=caption, emphasis=1, tones=[gap_share(run.summary).tone for run in runs])


def _task(by_role: Mapping[str, Score]) -> str:
    """'40.0% → 52.0%' of a task; a dash for what was not graded."""
    if not by_role:
        return "–"
    return " → ".join(f"{by_role[r].value:.1%}" if r in by_role else "–" for r in ("degraded", "recovered"))


def _diagnosed(diagnoses: Sequence[Diagnosis]) -> list[Section]:
    if not diagnoses:
        return []
    several = len(diagnoses) > 1
    rows: list[list[str]] = []
    series: list[Series] = []
    for diagnosis in diagnoses:
        prefix = f"{diagnosis.name}: " if several else ""
        students = students_of(diagnosis.content)
        series += cka_series(students, prefix, first=len(series))
        rows += [_student_row(prefix, student) for student in students]
    every = [student for d in diagnoses for student in students_of(d.content)]
    estimator = diagnoses[0].content["estimator"]
    chart = Lines(
        "CKA with the reference, by layer",
        [*series, *anchors(every)],
        x_label="layer of the reference",
        y_label="CKA",
        high=1.0,
        levels=null_level(every),
    )
    figure = Figure(
        [chart],
        see="1 is the reference's own geometry; at the dotted line a model is no more like it than chance.",
        measured=f"Measure: {estimator['name']}, {estimator['site']}. Bands: {estimator['interval']}. Dotted: "
        f"{estimator['null']}, the highest of all.",
    )
    columns = ["model", "severity", "KL, nats per token", "top-1 agreement", "median CKA", "least aligned layer"]
    table = Table(columns, rows, caption="On the reference's own answers.")
    return [Section("Diagnosed models", "layers", [table, figure])]


def _student_row(prefix: str, student: JsonRow) -> list[str]:
    layers, behaviour = student["layers"], student["behaviour"]
    known = [layer["cka"] for layer in layers if layer["cka"] is not None]
    worst = layers[student["ranking"][0]]
    return [
        prefix + student["name"],
        student["severity"],
        number(behaviour["kl"]),
        number(behaviour["top1_agreement"], ".1%"),
        number(median(known) if known else None),
        f"{worst['layer']} ({number(worst['cka'])})",
    ]


def _alignment(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> list[Section]:
    groups = [track_group(run.name, run.track) for run in runs if run.track]
    for diagnosis in diagnoses:
        groups += student_groups(diagnosis.content, f"{diagnosis.name}: " if len(diagnoses) > 1 else "")
    if not groups:
        return []
    figure = against(groups, "a checkpoint of a run or a diagnosed model; a line joins those of one run")
    return [Section("Recovery against alignment", "alignment", [figure])]


def flat(recipe: JsonRow, prefix: str = "") -> JsonObject:
    """Settings by dotted name: {'lora': {'rank': 8}} is {'lora.rank': 8}."""
    settings: JsonObject = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def _recipes(runs: Sequence[Run]) -> list[Section]:
    if len(runs) < 2:
        return []
    each = [flat(run.manifest["recipe"]) for run in runs]
    keys = dict.fromkeys(key for recipe in each for key in recipe)
    missing = object()
    differ = [
        key for key in keys if key != "out" and any(r.get(key, missing) != each[0].get(key, missing) for r in each)
    ]
    block: Block = Text("The recipes are the same but for where they write.")
    if differ:
        rows = [[key, *(_setting(recipe, key) for recipe in each)] for key in differ]
        block = Table(["setting", *(run.name for run in runs)], rows, caption="Only the settings that differ.")
    return [Section("How the recipes differ", "recipes", [block])]


def _setting(recipe: JsonRow, key: str) -> str:
    if key not in recipe:
        return "–"
    return "none" if recipe[key] is None else str(recipe[key])


def _unlike_runs(runs: Sequence[Run]) -> list[str]:
    """What makes figures of runs hard to compare."""
    checks: dict[str, Callable[[JsonRow], object]] = {
        "held-out prompts": lambda m: m.get("data", {}).get("held_out", m.get("data")),
        "references": lambda m: m.get("models", {}).get("teacher", m["reference"]),
    }
    return [
        f"the runs have different {what}: their gaps closed are not shares of the same thing"
        for what, of in checks.items()
        if any(of(run.manifest) != of(runs[0].manifest) for run in runs)
    ]


def _unlike_diagnoses(diagnoses: Sequence[Diagnosis]) -> list[str]:
    checks = {"data_hash": "prompts", "reference_files": "references", "estimator": "estimators"}
    return [
        f"the diagnoses have different {what}: their lines are not measured on the same rows"
        for key, what in checks.items()
        if any(d.content[key] != diagnoses[0].content[key] for d in diagnoses)
    ]


def _compared(compared: Sequence[Compared]) -> list[Block]:
    facts = [(c.name, f"{'recovery' if isinstance(c, Run) else 'diagnosis'} in {c.path}") for c in compared]
    command = shlex.join(["remend", "report", *(str(c.path) for c in compared), "--out", "NEW_DIRECTORY"])
    return [Code(command), Facts(facts)]
