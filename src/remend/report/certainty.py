"""Sections of a study's page: what was won back of the task and of prior abilities, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remend.files.atomic import JsonRow
from remend.report.page import Block, Section, Table
from remend.report.words import number

Rows = Sequence[JsonRow]

FIGURES = ("value", "over items", "over seeds", "over both", "least", "p", "p, Holm", "")
"""Columns of a value and how sure it is; the last is the verdict."""

CRITERIA = {("general", "paper"): "general, strict", ("general", "robust"): "general, loose"}
"""IFEval's words for the two ways to grade `general`."""


def abilities(rows: Rows) -> list[Section]:
    """The task's points and prior abilities' gap closed, in columns of their own; `rows` without the idle ones.

    Learning the task anew moves the first and not the others; a recovery moves both.
    """
    if not rows or "agreement_gap_closed" not in rows[0]:  # as studies were written before they had it
        return []
    prior = list(dict.fromkeys(_name(g) for row in rows for g in row["grades"] if g["ability"] == "prior"))
    columns = ["degradation", "method", "task points lost", "task points won back", "share of the task's loss"]
    columns += ["KL gap closed", "agreement gap closed"]
    columns += [f"{name}: {what}" for name in prior for what in ("points won back", "gap closed")]
    shown = [_abilities(row, prior) for row in rows]
    table = Table(
        columns,
        shown,
        caption="The task is what was trained on; the other columns are prior abilities. A method that learns the task "
        "anew wins points and closes none of the gaps. Intervals are 95%, paired over rows or prompts, seeds averaged. "
        "Lost is the reference's score less the degraded student's, below zero where the damage taught the task. A "
        "share is given where the loss is beyond chance. Agreement's gap is closed where every top-1 token is the "
        "reference's.",
    )
    return [Section("The task, and what it could before", "abilities", [table])]


def _abilities(row: JsonRow, prior: Sequence[str]) -> list[str]:
    task = next((g for g in row["grades"] if g["ability"] == "task"), None)
    others = {_name(g): g for g in row["grades"] if g["ability"] == "prior"}
    cells = [row["group"], row["method"], *_of_task(task)]
    cells += [_share(row["gap_closed"], row["gap_closed_95"])]
    cells += [_share(row["agreement_gap_closed"], row["agreement_gap_closed_95"])]
    for name in prior:
        cells += _of_task(others.get(name))[1:]
    return cells


def _of_task(grade: JsonRow | None) -> list[str]:
    """Points lost, points won back, share of the loss."""
    if grade is None or grade["change"] is None:
        return ["–"] * 3
    change, gap = grade["change"], grade["gap"]
    lost = grade["scores"]["reference"]["score"] - grade["scores"]["degraded"]["score"]
    return [_points(lost), _points(change["difference"], change["interval"]), _share(gap["value"], gap["interval"])]


def _name(grade: JsonRow) -> str:
    return CRITERIA.get((grade["task"], grade["grader"]), str(grade["name"]))


def certainty(results: JsonRow) -> list[Section]:
    """Intervals over items and over seeds apart, and the least difference that could be seen."""
    found = results.get("certainty")
    if not found or not found["rows"]:  # nothing was trained, or a study was written before it had it
        return []
    table = Table(
        ["degradation", "method", "measure", *FIGURES],
        [_row(row) for row in found["rows"]],
        caption=f"{found['level']:.0%} intervals: over items, for other rows or prompts and these seeds; over seeds, "
        "for other seeds and these items; over both (a mixed model by its mean squares, Student's t). With one seed "
        "there is none but the first. Least: the difference that this error finds with "
        f"{found['power']:.0%} power. p: of the error over both, or with one seed over "
        f"items, and McNemar's of one seed's grades. Holm: over all {len(found['rows'])} rows of this table.",
    )
    blocks: list[Block] = [table, *_rivals(found["pairs"]), _planned(results["power"])]
    return [Section("Seeds and power", "seeds", blocks)]


def _row(row: JsonRow) -> list[str]:
    return [row["group"], row["method"], row["measure"], *_figures(row)]


def _figures(row: JsonRow) -> list[str]:
    unit = row["unit"]
    ends = [_between(row[key], unit) for key in ("over_items", "over_seeds", "over_both")]
    least = "–" if row["least"] is None else _value(row["least"], unit)
    return [_value(row["value"], unit, "+"), *ends, least, _p(row["p"]), _p(row["p_holm"]), row["verdict"]]


def _rivals(pairs: Rows) -> list[Block]:
    """Methods beside each other, those that can be told apart."""
    apart = [pair for pair in pairs if pair["verdict"] != "not distinguishable"]
    if not apart:
        return []
    rows = [[p["group"], f"{p['first']} − {p['second']}", p["measure"], *_figures(p)] for p in apart]
    table = Table(
        ["degradation", "methods", "measure", *FIGURES],
        rows,
        caption=f"Pairs of methods that can be told apart after Holm over all {len(pairs)}: better says that the "
        "first is. Paired by seed and item.",
        folded=f"{len(apart)} of {len(pairs)} comparisons of two methods tell them apart",
    )
    return [table]


def _planned(power: JsonRow) -> Table:
    rows = []
    for measure in power["measures"]:
        points = measure["unit"] == "points"
        for one in measure["least"]:
            assumed = f"{one['spread']:.0%} " + ("of rows flip" if points else "standard deviation over prompts")
            least = [_least(one[key], measure["unit"]) for key in ("alone", "in_table")]
            seeds = _value(measure["assumed_seeds"], measure["unit"])
            rows.append([measure["measure"], str(measure["items"]), str(power["seeds"]), assumed, seeds, *least])
    return Table(
        ["measure", "items", "seeds", "assumed of items", "assumed of seeds", "one test", "in the table"],
        rows,
        caption="Said beforehand, from the study's file alone: the least difference found with "
        f"{power['power']:.0%} power at {power['level']:.0%}. In the table: by the first of Holm's {power['tests']} "
        "tests. Rows are taken to flip alike at every seed, so that more seeds do not stand for more rows.",
    )


def _least(value: float | None, unit: str) -> str:
    return "none" if value is None else _value(value, unit)


def _value(value: float, unit: str, sign: str = "") -> str:
    shown = f"{100 * value:{sign}.1f} points" if unit == "points" else f"{value:{sign}.1%}"
    return shown.replace("-", "−")


def _between(ends: Sequence[float] | None, unit: str) -> str:
    if ends is None:
        return "–"
    low, high = (f"{100 * end:.1f}" + ("" if unit == "points" else "%") for end in ends)
    return f"{low} to {high}".replace("-", "−")


def _points(value: float, ends: Sequence[float] | None = None) -> str:
    shown = f"{100 * value:+.1f}" if ends is not None else f"{100 * value:.1f}"
    shown += "" if ends is None else f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
    return shown.replace("-", "−")


def _share(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    shown = f"{value:.0%}" + ("" if ends is None else f" ({ends[0]:.0%} to {ends[1]:.0%})")
    return shown.replace("-", "−")


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else number(value, ".3f")


def lost_to(pairs: Rows, methods: Mapping[str, str]) -> list[str]:
    """Where on-policy distillation is worse than a rival that is none, in sentences."""
    said = []
    for pair in pairs:
        sides = [(pair["first"], pair["second"], 1), (pair["second"], pair["first"], -1)]
        for ours, theirs, sign in sides:
            on_policy = methods[ours].startswith("on-policy") and not methods[theirs].startswith("on-policy")
            worse = pair["verdict"] == ("worse" if sign > 0 else "better")
            if on_policy and worse:
                value = _value(sign * pair["value"], pair["unit"], "+")
                said.append(f"{pair['group']}: {ours} is worse than {theirs} by {pair['measure']}, {value}")
    return said
