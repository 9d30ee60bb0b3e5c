"""Does recovery go with alignment? Over the checkpoints of recovery runs, within runs and between them.

remend correlate runs/a runs/b runs/c
remend correlate docs/measurements/records/paper-small      committed records of a study's cells

Recovery is 1 − KL / KL of the degraded student, alignment the mean CKA over the student's layers, both as a run with
`diagnose_every: n` keeps them in track.jsonl. What is found is said as found, and nothing of cause (arXiv 2210.16156).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from remend.diagnosis.severity import Sentence
from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow, write_json
from remend.maths.correlation import CONFIDENCE, LEVELS, RUNS_TO_RESAMPLE, Correlation, Level, pearson, spearman
from remend.report.words import minus
from remend.studies.teachers import base_and_expert, kl_only, kl_sentence, late_cka, late_layer, teacher_sentence
from remend.studies.tracks import Point, read_tracks

CORRELATION = "correlation.json"

MEASURES = {"spearman": spearman, "pearson": pearson}

STRENGTHS = ((0.9, "very strong"), (0.7, "strong"), (0.4, "moderate"), (0.1, "weak"), (0.0, "negligible"))
"""Words for a coefficient's size, from each limit up: Schober et al. 2018, Anesth. Analg. 126:1763."""

SIGNIFICANT = 0.05

CAUTION = (
    "This says nothing of cause. Both measures change as training goes on, which alone makes curves correlate, and CKA "
    "can change while behaviour does not, or the other way round (arXiv 2210.16156)."
)


@dataclass(frozen=True)
class Relation:
    """Recovery and alignment, by level and measure."""

    by: Mapping[Level, Mapping[str, Correlation]]

    @property
    def disagree(self) -> dict[str, bool]:
        """For each measure whether pooled and within have different signs."""
        pairs = {key: (self.by["pooled"][key].coefficient, self.by["within"][key].coefficient) for key in MEASURES}
        return {key: None not in pair and math.prod(v or 0 for v in pair) < 0 for key, pair in pairs.items()}

    def to_json(self) -> JsonObject:
        """As plain values."""
        levels: JsonObject = {
            level: {key: asdict(one) for key, one in measures.items()} for level, measures in self.by.items()
        }
        return {**levels, "disagree": self.disagree}


def correlate(
    runs: Sequence[str | Path], out: str | Path | None = None, *, permutations: int = 10_000, seed: int = 0
) -> JsonObject:
    """Relate recovery to alignment over the checkpoints of runs.

    Args:
        runs: directories of recovery runs that have a track.jsonl (`diagnose_every: n` in the recipe), records of a
            study's cells, or folders of records; see remend.studies.tracks.
        out: a directory for correlation.json, made where it is missing; None writes nothing.
        permutations: rearrangements for each p-value.
        seed: of rearrangements and resamples.

    Returns:
        `overall` and each of `layers` (numbered as in the reference) hold pooled, within, between, each with spearman
        and pearson as remend.maths.correlation.Correlation; `disagree` tells for each measure whether pooled and within
        have different signs; `near_the_end` is the same of the reference's last layer but one; `kl_only` and `teachers`
        are as remend.studies.teachers has them; `quotable` are three sentences on all of these; `sentences` say what
        was found, each with the places that it rests on; `runs`, `points`, `notes`, and how it was computed.

    Raises:
        InputError: no run, one named twice, a path that is no run, a run without track or measurable damage, a row
            that can't be read, fewer than 3 measurements in all; permutations below 1, seed below 0.
        FileError: a file that can't be read or written.
    """
    target = _target(out)
    tracks = read_tracks(runs)
    total = sum(point.alignment is not None for track in tracks for point in track.points)
    if total < 3:
        raise InputError(
            f"{total} measurement{'s' * (total != 1)} in all; a correlation needs 3 or more. "
            "Give more runs, or run again with a smaller diagnose_every."
        )

    def related(aligned: Callable[[Point], float | None], what: str = "CKA") -> Relation:
        """Of what is taken for a point's alignment."""
        triples = [(track.name, aligned(point), point.recovery) for track in tracks for point in track.points]
        return _related(triples, what, permutations, seed)

    overall = related(lambda point: point.alignment, "alignment")
    late = late_layer(tracks)
    near_the_end = related(lambda point: late_cka(point, late))
    by_kl, by_teacher = kl_only(tracks, seed), base_and_expert(tracks, late, seed)
    numbers = sorted({layer for track in tracks for point in track.points for layer in point.cka})
    layers = {layer: related(partial(_cka, layer)) for layer in numbers}
    about = [track.about for track in tracks]
    references = {repr(track.reference) for track in tracks if track.reference is not None}
    result: JsonObject = {
        "recovery": "1 - KL / KL of the degraded student, on held-out answers",
        "alignment": "mean CKA with the reference over the student's layers",
        "checkpoints": total,
        "overall": overall.to_json(),
        "near_the_end": {"layer": late, **near_the_end.to_json()},
        "layers": [{"layer": layer, **relation.to_json()} for layer, relation in layers.items()],
        "kl_only": by_kl,
        "teachers": by_teacher,
        "runs": about,
        "points": [{"run": t.name, **_plain(point)} for t in tracks for point in t.points],
        "permutations": permutations,
        "seed": seed,
        "confidence": CONFIDENCE,
        "quotable": [
            _in_one(overall, near_the_end, late),
            kl_sentence(by_kl),
            teacher_sentence(by_teacher),
        ],
        "sentences": [sentence.to_json() for sentence in _sentences(overall, layers, about)],
        "notes": _notes(overall, about, len(references)),
    }
    if target:
        write_json(target, result)
    return result


def _target(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    if Path(out).is_file():
        raise InputError(f"out {out} is a file; name a directory, {CORRELATION} is written into it")
    return Path(out) / CORRELATION


def _cka(layer: int, point: Point) -> float | None:
    return point.cka.get(layer)


def _plain(point: Point) -> JsonObject:
    return {key: value for key, value in asdict(point).items() if key != "cka"}


def _related(triples: Sequence[tuple[str, float | None, float]], what: str, permutations: int, seed: int) -> Relation:
    """Of (run, alignment, recovery), those whose alignment is known; `what` it is called."""
    known = [(run, x, y) for run, x, y in triples if x is not None]
    runs, x_N, y_N = ([triple[i] for triple in known] for i in range(3))
    return Relation(
        {
            level: {
                key: measure(
                    x_N,
                    y_N,
                    groups=runs,
                    level=level,
                    permutations=permutations,
                    seed=seed,
                    names=(what, "recovery"),
                )
                for key, measure in MEASURES.items()
            }
            for level in LEVELS
        }
    )


def _sentences(overall: Relation, layers: Mapping[int, Relation], runs: Sequence[JsonObject]) -> list[Sentence]:
    """What the figures say, in plain words."""
    least = 1 / math.prod(run["checkpoints"] for run in runs if run["checkpoints"] > 1)
    said = [_sentence(overall, "within", "Within runs", least)]
    if len(runs) > 1:
        said += [_sentence(overall, "between", "Between runs"), _sentence(overall, "pooled", "Pooled")]
    opposed = [key.capitalize() for key, disagree in overall.disagree.items() if disagree]
    if opposed:
        text = (
            f"Pooled and within runs differ in sign ({' and '.join(opposed)}): the runs' "
            "levels hide or reverse what happens along each run (Simpson's paradox). Trust neither alone."
        )
        said.append(Sentence(text, ("/overall/disagree",)))
    by_layer = ((relation.by["within"]["spearman"].coefficient, at) for at, relation in enumerate(layers.values()))
    known = [(value, at) for value, at in by_layer if value is not None]
    if len(known) > 1:
        (low, i), (high, j) = min(known), max(known)
        first, last = (list(layers)[at] for at in (i, j))
        text = (
            f"By layer, Spearman within runs goes from {low:.2f} (layer {first}) to {high:.2f} (layer {last}); "
            f"the layers' p-values are not adjusted for being {len(known)}."
        )
        said.append(Sentence(text, (f"/layers/{i}/within/spearman", f"/layers/{j}/within/spearman")))
    return [*said, Sentence(CAUTION, ())]


def _in_one(overall: Relation, near_the_end: Relation, late: int) -> str:
    """What is found of recovery and CKA, in one sentence to be quoted."""
    within, between = (
        [_brief(relation.by[level]["spearman"]) for relation in (overall, near_the_end)]
        for level in ("within", "between")
    )
    return minus(
        f"Spearman's correlation of recovery with CKA is, within cells, {within[0]} over all layers and {within[1]} "
        f"near the last layer ({late}); between cells it is {between[0]} over all layers and {between[1]} near the "
        "last."
    )


def _brief(one: Correlation) -> str:
    """A coefficient with its p-value, the larger of the two where there are two."""
    if one.coefficient is None or one.p_value is None:
        return f"no coefficient ({one.reason})"
    ends = "" if one.low is None else f"95% interval {one.low:.2f} to {one.high:.2f}, "
    return f"{one.coefficient:.2f} ({ends}p {max(one.p_value, one.shift_p_value or 0.0):.2g})"


def _sentence(overall: Relation, level: Level, title: str, least: float = 0.0) -> Sentence:
    rank, line = (overall.by[level][key] for key in MEASURES)
    rests_on = tuple(f"/overall/{level}/{key}" for key in MEASURES)
    if rank.coefficient is None or rank.p_value is None:
        return Sentence(f"{title} there is no correlation to give: {rank.reason}.", rests_on)
    unit = "run means" if level == "between" else f"checkpoints of {_count(rank.runs, 'run')}"
    figures = f"Spearman {_figures(rank)}"
    figures += f", Pearson {_figures(line)}" if line.coefficient is not None else ""
    p_value = max(rank.p_value, rank.shift_p_value or 0.0)
    if p_value > SIGNIFICANT:
        verdict = "no relation of recovery and alignment can be told from chance"
    else:
        how = "rise and fall together" if rank.coefficient > 0 else "move against each other"
        size = next(word for limit, word in STRENGTHS if abs(rank.coefficient) >= limit)
        verdict = f"recovery and alignment {how}: a {size} correlation"
    text = f"{title} ({rank.n} {unit}) {verdict}. {figures}."
    return Sentence(text + _hedge(level, rank, least), rests_on)


def _hedge(level: Level, rank: Correlation, least: float) -> str:
    """What to bear in mind with this level's figures; `least` is the smallest p-value of shifts there can be."""
    if level == "pooled":
        return " This mixes the two above and takes every checkpoint for independent."
    if level == "between" and 2 / math.factorial(rank.n) > SIGNIFICANT:
        return f" With {rank.n} runs Spearman's p-value can't be below {2 / math.factorial(rank.n):.2g}."
    if level == "within" and least > SIGNIFICANT:
        return f" With so few checkpoints the p-value of shifts can't be below {least:.2g}."
    if level == "within" and (rank.p_value or 0.0) <= SIGNIFICANT < (rank.shift_p_value or 0.0):
        return " Shuffling takes checkpoints for independent, which they are not; the p-value of shifts counts here."
    return ""


def _figures(one: Correlation) -> str:
    parts = [] if one.low is None else [f"95% interval {one.low:.2f} to {one.high:.2f}"]
    parts.append(f"p {one.p_value:.2g} by permutation")
    if one.shift_p_value is not None:
        parts.append(f"{one.shift_p_value:.2g} by circular shifts, which keep the checkpoints' order")
    return f"{one.coefficient:.2f} ({', '.join(parts)})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _notes(overall: Relation, runs: Sequence[JsonObject], references: int) -> list[str]:
    """What a reader has to know of the runs."""
    notes = []
    if overall.by["within"]["spearman"].resampled == "points":
        notes.append(
            "Intervals resample checkpoints as if independent and are too narrow; "
            f"with {RUNS_TO_RESAMPLE} runs or more they resample whole runs."
        )
    students = {run["student"] for run in runs if run["student"]}
    if 0 < len(students) < len(runs):
        notes.append(f"The {len(runs)} runs start from {_count(len(students), 'student')}: they are not independent.")
    if references > 1:
        notes.append(
            f"The runs are compared with {references} references; layers of one number are the same layer only where "
            "one of them was trained from the other."
        )
    for run in runs:
        if not run["finished"]:
            notes.append(f"{run['name']} is unfinished; its checkpoints so far are used.")
        notes += [f"{run['name']}, step {o['step']} ({o['stage']}), left out: {o['why']}." for o in run["left_out"]]
    return notes


def lines(result: JsonRow) -> list[str]:
    """What `correlate` gave, as lines for a terminal: tables, sentences, notes."""
    head = f"{'':<14}{'n':>4}  {'':<9}{'r':>6}  {'95% interval':<15}{'p':>8}{'p, shifts':>11}"
    table = [head]
    for level in LEVELS:
        for key in MEASURES:
            one = result["overall"][level][key]
            label, n = ("", "") if key != "spearman" else (_title(level), str(one["n"]))
            table.append(f"{label:<14}{n:>4}  {key.capitalize():<9}{_cells(one)}".rstrip())
    columns = [(level, key) for level in LEVELS for key in MEASURES]
    by_layer = ["layer".rjust(6) + "".join(f"{_title(level):^20}" for level in LEVELS).rstrip()]
    by_layer.append(" " * 6 + "".join(f"{key.capitalize():>10}" for _, key in columns))
    for layer in result["layers"]:
        cells = "".join(f"{_number(layer[level][key]['coefficient']):>10}" for level, key in columns)
        by_layer.append(f"{layer['layer']:>6}{cells}")
    said = [*(f"in short: {sentence}" for sentence in result["quotable"]), ""]
    said += [sentence["text"] for sentence in result["sentences"]]
    return [
        f"recovery: {result['recovery']}",
        f"alignment: {result['alignment']}",
        *("", *table, "", *by_layer, "", *said),
        *(f"note: {note}" for note in result["notes"]),
    ]


def _title(level: str) -> str:
    return level if level == "pooled" else f"{level} runs"


def _cells(one: JsonRow) -> str:
    if one["coefficient"] is None:
        return f"{'–':>6}  {one['reason']}"
    interval = "–" if one["low"] is None else f"{one['low']:.2f} to {one['high']:.2f}"
    shifts = "–" if one["shift_p_value"] is None else f"{one['shift_p_value']:.2g}"
    return f"{one['coefficient']:>6.2f}  {interval:<15}{one['p_value']:>8.2g}{shifts:>11}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
