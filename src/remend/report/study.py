"""The page of a study: table with intervals, task against general ability, methods at equal spending, CKA, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remend.files.atomic import JsonRow
from remend.report.certainty import abilities, certainty
from remend.report.charts import BARS, Arrows, Forest, Lines, Points, Scatter, Series, Share
from remend.report.page import Block, Code, Facts, Figure, Page, Section, Table, Text
from remend.report.recovery import FEW
from remend.report.svg import style
from remend.report.tracks import CAUTION
from remend.report.words import machine_facts, number, percent

Rows = Sequence[JsonRow]

CLOSED = "KL gap closed (95%)"
MEASURED = ("degradation", "method", CLOSED, "KL, nats per token", "top-1 agreement", "seeds")
SCORED = ("score (95%)", "change (95%)", "detectable", "verdict", "loss won back (95%)")
"""Columns of each task; one that says nothing in any row is left out."""


def study_page(results: JsonRow) -> Page:
    """The page as data, of what remend.studies gathered."""
    rows = [row for row in results["rows"] if row["how"] != "none"]
    sections = [
        *_table(results["rows"], rows),
        *abilities(rows),
        *certainty(results),
        *_ability(results["rows"], rows),
        *_equal(results),
        *_alignment(results["correlation"]),
        Section("Cost", "cost", _cost(results)),
        *_failures(results["failures"]),
        Section("How to rerun this", "rerun", _rerun(results)),
    ]
    models = ", ".join(results["models"].values())
    done = [cell["state"] for cell in results["cells"]].count("done")
    return Page(
        title=f"Study {results['study']}",
        verdict=_verdict(rows),
        about=f"Of {models}. {done} of {len(results['cells'])} cells are done. Every cell has a page of its own in "
        "cells/; all of them were measured on the recovered model as saved and loaded again.",
        sections=sections,
        warnings=[
            *(f"{name} failed: {message}" for name, message in results["failures"].items()),
            *(_not_graded(row) for row in results["rows"] if row["not_graded"]),
        ],
    )


def _not_graded(row: JsonRow) -> str:
    return (
        f"{row['group']}, {row['method']}: not graded on {', '.join(row['not_graded'])}, since its model was not kept "
        "(keep_models: false). To grade it, remove its directory and run the study again."
    )


def _share(row: JsonRow, name: str) -> Share:
    """The gap closed, with its interval where enough prompts carry one."""
    few = row.get("held_out_prompts", FEW) < FEW
    return Share(name, row["gap_closed"], *((None if few else row["gap_closed_95"]) or (None, None)))


def _verdict(rows: Rows) -> str:
    known = [row for row in rows if row["gap_closed"] is not None]
    if not known:
        return "No recovery has been measured."
    best: dict[str, JsonRow] = {}
    for row in known:
        if row["group"] not in best or row["gap_closed"] > best[row["group"]]["gap_closed"]:
            best[row["group"]] = row
    words = "; ".join(
        f"{group}: {_share(r, '').words()} by {r['method']}"
        + ("" if _share(r, "").tone == "good" else ", which is no recovery beyond chance")
        for group, r in best.items()
    )
    return f"Most of the KL gap closed, with 95% intervals: {words}."


def _table(every: Rows, rows: Rows) -> list[Section]:
    if not every:
        return []
    names = list(dict.fromkeys(grade["name"] for row in every for grade in row["grades"]))
    columns = list(MEASURED)
    columns += [f"{name}: {what}" for name in names for what in SCORED]
    cells = [_cells(row, names) for row in every]
    said = [i for i in range(len(columns)) if i < len(MEASURED) or any(row[i] != "–" for row in cells)]
    shown = [[row[i] for i in said] for row in cells]
    tones = ["" if row["how"] == "none" else _share(row, "").tone for row in every]
    table = Table(
        [columns[i] for i in said], shown, emphasis=MEASURED.index(CLOSED), tones=tones, caption=_caption(every)
    )
    blocks: list[Block] = [table]
    if any(row["gap_closed"] is not None for row in rows):
        bars = [_share(row, f"{row['group']}: {row['method']}") for row in rows]
        blocks.append(
            Figure(
                [Forest("KL gap closed, with 95% intervals", bars, "share of the KL gap closed")],
                see=f"0% is the degraded student, 100% the reference. {BARS}",
                measured="Forward KL to the reference on its own answers to the held-out prompts, averaged over seeds "
                "prompt by prompt; percentile bootstrap with prompts resampled in pairs. The bars say nothing of "
                "seeds: what these differ by is in results.json.",
            )
        )
    return [Section("Degraded and recovered", "table", blocks)]


def _cells(row: JsonRow, names: Sequence[str]) -> list[str]:
    graded = {grade["name"]: grade for grade in row["grades"]}
    kl, agreed = row["kl"], row["agreement"]
    idle = row["how"] == "none"
    cells = [
        row["group"],
        row["method"],
        "–" if idle else _share(row, "").words(),
        number(kl["degraded"]) + ("" if idle else f" → {number(kl['recovered'])}"),
        number(agreed["degraded"], ".1%") + ("" if idle else f" → {number(agreed['recovered'], '.1%')}"),
        str(len(row["seeds"])),
    ]
    for name in names:
        cells += _score(graded.get(name), idle)
    return cells


def _score(grade: JsonRow | None, idle: bool) -> list[str]:
    none = ["–"] * (len(SCORED) - 1)
    if grade is None:
        return ["–", *none]
    scores, change = grade["scores"], grade["change"]
    score = _scored(scores["recovered"])
    if idle:
        return [f"{score}, reference {_scored(scores['reference'])}", *none]
    if change is None:
        return [score, *none]
    points = f"{100 * change['difference']:+.1f}{_ends([100 * end for end in change['interval']], '+.1f')}"
    least, gap = change["minimum_detectable_effect"], grade["gap"]
    shown = "–" if least is None else f"{100 * least:.1f}"
    won = "–" if gap["value"] is None else f"{gap['value']:.0%}{_ends(gap['interval'], '.0%')}"
    return [score, points.replace("-", "−"), shown, change["verdict"], won.replace("-", "−")]


def _scored(side: JsonRow) -> str:
    return f"{side['score']:.1%}{_ends(side['interval'], '.1%')}"


def _ends(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _span(values: Sequence[float], form: str) -> str:
    """One number, or the least and the most of several seeds."""
    low, high = min(values), max(values)
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"


def _caption(rows: Rows) -> str:
    counts = {grade["name"]: grade["n"] for row in rows for grade in row["grades"] if grade["n"]}
    items = ", ".join(f"{name} {n}" for name, n in counts.items())
    grades = [grade for row in rows for grade in row["grades"] if grade["change"]]
    by = dict.fromkeys(side["method"] for grade in grades for side in grade["scores"].values() if side["method"])
    changed = dict.fromkeys(grade["change"]["method"] for grade in grades)
    made = f"Intervals of scores: {', '.join(by)}; of changes: {', '.join(changed)}. " if grades else ""
    lost = any(grade["gap"]["value"] is not None for grade in grades)
    won = "Loss won back: of the task's score, where the loss is beyond chance. " if lost else ""
    return (
        "KL, agreement: degraded → recovered, on held-out prompts. Scores are of the recovered model, in the row of "
        "the method none of the degraded one, averaged over seeds item by item; changes are in points from the "
        "degraded to the recovered, paired by item, and better and worse are adjusted by Holm over the tasks of a row. "
        f"Detectable: the least change in points that this number of items finds with 80% power. {won}{made}"
        "All of it is about other items, and not about other seeds: see seeds and power. "
        f"Items: {items or 'none'}.{_few(rows)}"
    )


def _few(rows: Rows) -> str:
    """A sentence where prompts are too few for an interval."""
    counts = [row["held_out_prompts"] for row in rows if row.get("held_out_prompts", FEW) < FEW]
    return f" {min(counts)} held-out prompts are too few for an interval of the KL gap closed." if counts else ""


def _ability(every: Rows, rows: Rows) -> list[Section]:
    charts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group and row["grades"]]
        if not mine:
            continue
        task = mine[0]["grades"][0]["name"]
        arrows, goal = [], None
        for row in mine:
            scores, agreed = row["grades"][0]["scores"], row["agreement"]
            points = [
                (
                    agreed[when],
                    scores[when]["score"],
                    f"{when}: agreement {agreed[when]:.1%}, score {scores[when]['score']:.1%}",
                )
                for when in ("degraded", "recovered")
            ]
            arrows.append(Points(row["method"], points))
            goal = (1.0, scores["reference"]["score"], f"reference: score {scores['reference']['score']:.1%}")
        charts.append(Arrows(group, arrows, "top-1 agreement with the reference", f"score on {task}", goal=goal))
    if not charts:
        return []
    figure = Figure(
        charts,
        see="An arrow goes from the degraded student to the recovered one. Up is the task, right is general ability. "
        "The reference is at the right edge, at its own score: of a task that it never learned, that may be 0. A "
        "method that learns the task alone goes up and not right.",
        measured="Agreement on the reference's answers to held-out general prompts; the score on held-out rows of the "
        "task. Means over seeds; the intervals stand in the table.",
    )
    return [Section("Task against general ability", "ability", [figure])]


def _equal(results: JsonRow) -> list[Section]:
    sections = []
    for key, what, unit in (
        ("at_equal_tokens", "tokens", "trained tokens"),
        ("at_equal_seconds", "seconds", "seconds"),
    ):
        if results[key]:
            blocks: list[Block] = [_equal_table(results[key], what, unit), _courses(results, what, unit)]
            sections.append(Section(f"At the same {unit}", f"equal-{what}", blocks))
    return sections


def _equal_table(groups: Rows, what: str, unit: str) -> Table:
    rows = []
    for group in groups:
        for entry in group["methods"]:
            gaps = [gap for gap in entry["gap_closed_by_seed"] if gap is not None]
            rows.append(
                [
                    group["group"],
                    entry["method"],
                    f"{group['at']:,.0f}",
                    _span(entry["spent"], ",.0f"),
                    number(entry["kl"]),
                    percent(entry["gap_closed"]),
                    f"{percent(min(gaps))} to {percent(max(gaps))}" if len(gaps) > 1 else "–",
                ]
            )
    chosen = any(group["chosen"] for group in groups)
    where = "the study's budget" if chosen else f"the {unit} of the degradation's cell that spent least"
    caption = (
        f"KL at {where}, on a line between the measurements around it, averaged over seeds. A cell that spent more is "
        "read in the middle of its learning-rate schedule, one that spent less at its end. "
    )
    caption += (
        "Trained tokens are completion tokens that a loss was taken at; sampled ones that were not trained on are free."
        if what == "tokens"
        else "Seconds are those of repair, of the reference's answers to train on and of the steps, on the machine "
        "below."
    )
    elsewhere = [name for group in groups for name in group.get("left_out", ())]
    if elsewhere:
        caption += f" Left out, since they ran on another machine than most of their group: {', '.join(elsewhere)}."
    columns = ["degradation", "method", f"{unit} allowed", f"{unit} spent", "KL", "KL gap closed", "over seeds"]
    return Table(columns, rows, caption=caption)


def _courses(results: JsonRow, what: str, unit: str) -> Figure:
    charts = []
    for group in dict.fromkeys(cell["group"] for cell in results["cells"]):
        cells = [c for c in results["cells"] if c["group"] == group and len(c.get("curve", ())) > 1]
        first = {c["method"]: c for c in reversed(cells)}  # the first seed of each method
        order = list(dict.fromkeys(c["method"] for c in cells))
        series = [
            Series(name, style(i), [(p[what], p["kl"]) for p in first[name]["curve"]], dots=True)
            for i, name in enumerate(order)
        ]
        if series:
            charts.append(Lines(group, series, x_label=unit, y_label="KL to the reference"))
    return Figure(
        charts,
        see="The course of held-out KL, of each method's first seed. Lower is closer to the reference; a line that "
        "falls at the left edge is a repair.",
        measured="On the reference's answers to the held-out prompts, along the training.",
    )


def _alignment(correlation: JsonRow) -> list[Section]:
    if not correlation.get("points"):
        return [Section("CKA against recovery", "alignment", [Text(f"Not given: {correlation['reason']}", "soft")])]
    names = dict.fromkeys(point["group"] for point in correlation["points"])
    groups = [
        Points(
            name,
            [
                (p["alignment"], p["recovery"], f"{p['run']}, step {p['step']} ({p['stage']})")
                for p in correlation["points"]
                if p["group"] == name
            ],
            joined=False,
        )
        for name in names
    ]
    figure = Figure(
        [Scatter("Recovery against alignment", groups, "mean CKA over layers", "KL gap closed")],
        see="Each point is a checkpoint of a trained cell. Right is closer to the reference in representation, up in "
        "behaviour.",
        measured=f"{correlation['checkpoints']} checkpoints of {len(correlation['cells'])} cells, by remend correlate. "
        + CAUTION,
    )
    table = Table(
        ["", "n", "Spearman (95%)", "p, permutation", "p, shifts", "Pearson (95%)", "p, permutation"],
        [_correlated(level, correlation["overall"][level]) for level in ("within", "between", "pooled")],
        caption="Within: along each cell's training. Between: means of cells. Shifts keep the checkpoints' order.",
    )
    said: list[Block] = [Text(sentence) for sentence in correlation.get("quotable", [])]
    said += [Text(sentence["text"], "soft") for sentence in correlation["sentences"]]
    notes: list[Block] = [Text(note, "soft") for note in correlation["notes"]]
    return [Section("CKA against recovery", "alignment", [*said, table, figure, *notes])]


def _correlated(level: str, measures: JsonRow) -> list[str]:
    rank, line = measures["spearman"], measures["pearson"]
    cells = [f"{level} cells", str(rank["n"])]
    if rank["coefficient"] is None:
        return [*cells, str(rank["reason"]), "–", "–", "–", "–"]
    cells += [_coefficient(rank), f"{rank['p_value']:.2g}", number(rank["shift_p_value"], ".2g")]
    return [*cells, _coefficient(line), number(line["p_value"], ".2g")]


def _coefficient(value: JsonRow) -> str:
    ends = "" if value["low"] is None else f" ({number(value['low'], '.2f')} to {number(value['high'], '.2f')})"
    return number(value["coefficient"], ".2f") + ends


def _cost(results: JsonRow) -> list[Block]:
    rows = []
    for row in results["rows"]:
        parts = row["training_seconds_of"]
        cells = [c for c in results["cells"] if c["group"] == row["group"] and c["method"] == row["method"]]
        whole = [sum(c["seconds"].values()) for c in cells if "seconds" in c]
        memory = [c["peak_rss_mib"] for c in cells if "peak_rss_mib" in c]
        rows.append(
            [
                row["group"],
                row["method"],
                _span(row["steps"], ",.0f"),
                _span(row["tokens_trained"], ",.0f"),
                *(_span(parts[key], ",.0f") for key in ("repair", "answers", "steps")),
                _span(whole, ",.0f"),
                _span(memory, ",.0f"),
            ]
        )
    columns = ["degradation", "method", "steps", "trained tokens", "s of repair", "s of the reference's answers"]
    columns += ["s of steps", "s in all, with measuring and grading", "peak MiB of its process"]
    total = sum(sum(cell["seconds"].values()) for cell in results["cells"] if "seconds" in cell)
    caption = f"All cells together: {total / 3600:.2f} hours. Measuring is not in the seconds of steps."
    return [Table(columns, rows, caption=caption)]


def _failures(failures: Mapping[str, str]) -> list[Section]:
    if not failures:
        return []
    return [Section("Failed", "failed", [Table(["cell", "why"], [[name, why] for name, why in failures.items()])])]


def _rerun(results: JsonRow) -> list[Block]:
    facts = [("models", ", ".join(f"{name}: {path}" for name, path in results["models"].items()))]
    facts += [(name, how) for name, how in results["methods"].items()]
    facts.append(("seeds", ", ".join(map(str, results["seeds"]))))
    for machine in results["hardware"]:
        facts += machine_facts(machine, machine["dtype"])
    facts += [("note", note) for note in results["notes"]]
    return [
        Code("remend study STUDY.yaml --out NEW_DIRECTORY"),
        Facts(facts),
        Code(results["recipe"].rstrip("\n"), folded="STUDY.yaml"),
    ]
