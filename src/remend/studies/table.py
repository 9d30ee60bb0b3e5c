"""The rows of a study as CSV and as lines for a terminal."""

from __future__ import annotations

import csv
import io

from remend.files.atomic import JsonObject, JsonRow
from remend.studies.parts import mean
from remend.studies.results import DEGRADED, RECOVERED, REFERENCE

COLUMNS = (
    "group model degradation task method how seeds kl_degraded kl_recovered gap_closed gap_closed_low gap_closed_high "
    "agreement_degraded agreement_recovered agreement_gap_closed agreement_gap_closed_low agreement_gap_closed_high "
    "ability graded grader n reference degraded recovered recovered_low recovered_high "
    "interval_method difference difference_low difference_high difference_method p_holm verdict can_show "
    "task_gap_closed task_gap_closed_low task_gap_closed_high not_graded steps tokens_trained training_seconds"
)


def table_of(results: JsonRow) -> str:
    """The rows as CSV: one line a group, method and task."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS.split(), lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        writer.writerows({**_plain(row), **_graded(grade)} for grade in row["grades"] or [None])
    return stream.getvalue()


def _plain(row: JsonRow) -> JsonObject:
    low, high = row["gap_closed_95"] or (None, None)
    kept = {key: row[key] for key in ("group", "model", "degradation", "task", "method", "how", "gap_closed")}
    means = {key: round(mean(row[key]), 2) for key in ("steps", "tokens_trained", "training_seconds")}
    by_time = {f"{what}_{when}": row[what][when] for what in ("kl", "agreement") for when in (DEGRADED, RECOVERED)}
    seeds = " ".join(map(str, row["seeds"]))
    ends = {"gap_closed_low": low, "gap_closed_high": high}
    agreed = row["agreement_gap_closed"]
    low, high = row["agreement_gap_closed_95"] or (None, None)
    ends |= {"agreement_gap_closed": agreed, "agreement_gap_closed_low": low, "agreement_gap_closed_high": high}
    return {**kept, **means, **by_time, "seeds": seeds, **ends, "not_graded": " ".join(row["not_graded"])}


def _graded(grade: JsonRow | None) -> JsonObject:
    if grade is None:
        return {}
    scores, change = grade["scores"], grade["change"] or {}
    low, high = scores[RECOVERED]["interval"] or (None, None)
    ends = change.get("interval") or (None, None)
    gap = grade["gap"] or {}
    closed = gap.get("interval") or (None, None)
    return {
        "ability": grade["ability"],
        "graded": grade["name"],
        "grader": grade["grader"],
        "n": grade["n"],
        **{who: scores[who]["score"] for who in (REFERENCE, DEGRADED, RECOVERED)},
        "recovered_low": low,
        "recovered_high": high,
        "interval_method": scores[RECOVERED]["method"],
        "difference": change.get("difference"),
        "difference_low": ends[0],
        "difference_high": ends[1],
        "difference_method": change.get("method"),
        "p_holm": change.get("p_holm"),
        "verdict": change.get("verdict"),
        "can_show": change.get("minimum_detectable_effect"),
        "task_gap_closed": gap.get("value"),
        "task_gap_closed_low": closed[0],
        "task_gap_closed_high": closed[1],
    }


def lines(results: JsonRow) -> list[str]:
    """What `study` returned, for a terminal: the cost of a dry run, or the table of a finished one."""
    return _cost(results) if results.get("dry_run") else _results(results)


def _cost(results: JsonRow) -> list[str]:
    width = max(len(cell["name"]) for cell in results["cells"])
    said = [f"{'cell':<{width}}  {'steps':>6} {'tokens':>8} {'hours':>7}  estimated from"]
    for cell in results["cells"]:
        hours = "–" if cell["hours"] is None else f"{cell['hours']:.2f}"
        said.append(f"{cell['name']:<{width}}  {cell['steps']:>6} {cell['tokens']:>8} {hours:>7}  {cell['basis']}")
    total = results["total"]
    hours = "unknown" if total["hours"] is None else f"{total['hours']:.1f}"
    said.append(
        f"{total['cells']} cells, {total['trained']} of them trained, {total['done']} done before; to do: "
        f"{total['steps']} steps, {total['tokens']} tokens, {hours} hours one after the other"
    )
    return [*said, *_power(results["power"]), *(f"note: {note}" for note in results["notes"])]


def _power(power: JsonRow) -> list[str]:
    """The least difference that can be found, for the middle of what is assumed of items."""
    said = []
    for measure in power["measures"]:
        one = measure["least"][1]
        words = [_amount(one[key], measure["unit"]) for key in ("alone", "in_table")]
        assumed = "of rows flip" if measure["unit"] == "points" else "is the spread over prompts"
        seeds = f"{power['seeds']} seed{'s' * (power['seeds'] != 1)}"
        said.append(
            f"least difference in {measure['measure']}, {measure['items']} items × {seeds}: {words[0]} by one test, "
            f"{words[1]} by the first of all {power['tests']} (power {power['power']:.0%}, where {one['spread']:.0%} "
            f"{assumed})"
        )
    return said


def _amount(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{100 * value:.1f} points" if unit == "points" else f"{value:.1%} of the gap"


def _results(results: JsonRow) -> list[str]:
    said = []
    for row in results["rows"]:
        low, high = row["gap_closed_95"] or (None, None)
        ends = "" if low is None else f" (95% {low:.0%} to {high:.0%})"
        gap = "no gap" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}{ends} of it closed"
        text = f"{row['group']}, {row['method']}: KL {row['kl'][DEGRADED]:.3f} -> {row['kl'][RECOVERED]:.3f}, {gap}"
        for grade in row["grades"]:
            scores = grade["scores"]
            text += f"; {grade['name']} {scores[DEGRADED]['score']:.1%} -> {scores[RECOVERED]['score']:.1%}"
            text += f" (reference {scores[REFERENCE]['score']:.1%}"
            text += f"; {grade['change']['verdict']})" if grade["change"] else ")"
        if row["not_graded"]:
            text += f"; not graded on {', '.join(row['not_graded'])}, since its model was not kept"
        said.append(text)
    said += results["correlation"].get("quotable", [])
    said += [sentence["text"] for sentence in results["correlation"].get("sentences", [])]
    if "reason" in results["correlation"]:
        said.append(f"CKA and recovery: {results['correlation']['reason']}")
    said += [f"failed: {name}: {message}" for name, message in results["failures"].items()]
    states = [cell["state"] for cell in results["cells"]]
    said.append(f"{states.count('done')} of {len(states)} cells are done, {len(results['failures'])} failed")
    return [*said, *(f"{key:>7}  {results[key]}" for key in ("report", "csv", "json"))]
