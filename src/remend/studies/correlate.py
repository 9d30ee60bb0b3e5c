"""Does recovery go with alignment? Over the checkpoints of recovery runs, within runs and between them.

remend correlate runs/a runs/b runs/c

Recovery is 1 − KL / KL of the degraded student, alignment the mean CKA over the student's layers, both as a run with
`diagnose_every: n` keeps them in track.jsonl. What is found is said as found, and nothing of cause (arXiv 2210.16156).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from remend.diagnosis.severity import Sentence
from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow, write_json
from remend.files.reading import read_object, understood
from remend.files.run_directory import MANIFEST, SUMMARY, TRACK, RunDirectory, summary_of
from remend.maths.correlation import CONFIDENCE, LEVELS, RUNS_TO_RESAMPLE, Correlation, Level, pearson, spearman
from remend.maths.gap import MEASURABLE_KL

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
class Point:
    """A checkpoint: `alignment` is None where a layer's CKA is missing; `cka` by the reference's layer."""

    step: int
    stage: str
    kl: float
    recovery: float
    alignment: float | None
    cka: Mapping[int, float]


@dataclass(frozen=True)
class Row:
    """A row of track.jsonl, its CKA by the reference's layer; what is not a finite number is None."""

    step: int
    stage: str
    kl: float | None
    cka: Mapping[int, float | None]

    def left_out(self, why: str) -> JsonObject:
        """As the result names it."""
        return {"step": self.step, "stage": self.stage, "why": why}


@dataclass(frozen=True)
class Track:
    """What a run's checkpoints measured; `about` is what the result says of the run, `reference` its files' hashes."""

    name: str
    points: list[Point]
    about: JsonObject
    reference: JsonObject | None


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
        runs: directories of recovery runs that have a track.jsonl (`diagnose_every: n` in the recipe).
        out: a directory for correlation.json, made where it is missing; None writes nothing.
        permutations: rearrangements for each p-value.
        seed: of rearrangements and resamples.

    Returns:
        `overall` and each of `layers` (numbered as in the reference) hold pooled, within, between, each with spearman
        and pearson as remend.maths.correlation.Correlation; `disagree` tells for each measure whether pooled and within
        have different signs; `sentences` say what was found, each with the places that it rests on; `runs`, `points`,
        `notes`, and how it was computed.

    Raises:
        InputError: no run, one named twice, a path that is no run, a run without track or measurable damage, a row
            that can't be read, fewer than 3 measurements in all; permutations below 1, seed below 0.
        FileError: a file that can't be read or written.
    """
    target = _target(out)
    tracks = _tracks(runs)
    total = sum(point.alignment is not None for track in tracks for point in track.points)
    if total < 3:
        raise InputError(
            f"{total} measurement{'s' * (total != 1)} in all; a correlation needs 3 or more. "
            "Give more runs, or run again with a smaller diagnose_every."
        )

    def related(layer: int | None = None) -> Relation:
        """Of one layer's CKA, by default of the mean over layers."""
        triples = [
            (track.name, point.alignment if layer is None else point.cka.get(layer), point.recovery)
            for track in tracks
            for point in track.points
        ]
        return _related(triples, "alignment" if layer is None else "CKA", permutations, seed)

    overall = related()
    numbers = sorted({layer for track in tracks for point in track.points for layer in point.cka})
    layers = {layer: related(layer) for layer in numbers}
    about = [track.about for track in tracks]
    references = {repr(track.reference) for track in tracks if track.reference is not None}
    result: JsonObject = {
        "recovery": "1 - KL / KL of the degraded student, on held-out answers",
        "alignment": "mean CKA with the reference over the student's layers",
        "checkpoints": total,
        "overall": overall.to_json(),
        "layers": [{"layer": layer, **relation.to_json()} for layer, relation in layers.items()],
        "runs": about,
        "points": [{"run": t.name, **_plain(point)} for t in tracks for point in t.points],
        "permutations": permutations,
        "seed": seed,
        "confidence": CONFIDENCE,
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


def _tracks(runs: Sequence[str | Path]) -> list[Track]:
    paths = [Path(path) for path in runs]
    if not paths:
        raise InputError("no run is given; name the directories of one or more recovery runs")
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} and {seen[path.resolve()]} are the same run; name each once")
        seen[path.resolve()] = path
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    tracks = []
    for path, name in zip(paths, names, strict=True):
        with understood(path, "run it again with another out"):
            tracks.append(_track(path, name))
    return tracks


def _track(path: Path, name: str) -> Track:
    directory = RunDirectory.open(path)
    try:
        rows = [_row(row, f"{path / TRACK}, row {i}") for i, row in enumerate(directory.rows(TRACK), 1)]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / TRACK} can't be read: {error}; run again with another out") from None
    if not rows:
        raise InputError(f"{path} has no {TRACK}; measure it with: remend track {path}")
    manifest = read_object(path / MANIFEST)
    finished = (path / SUMMARY).is_file()
    degraded = _degraded_kl(path, rows)
    rows, left_out = _once(rows)
    layers = sorted({layer for row in rows for layer, cka in row.cka.items() if cka is not None})
    points = []
    for row in rows:
        if row.kl is None or not layers:
            left_out.append(row.left_out("KL is not a number" if row.kl is None else "no layer has a CKA"))
            continue
        cka = {layer: value for layer, value in row.cka.items() if value is not None}
        whole = len(cka) == len(layers)  # a mean over fewer layers than at other steps would not be comparable
        if not whole:
            left_out.append(row.left_out(f"{len(layers) - len(cka)} of {len(layers)} layers have no CKA"))
        alignment = math.fsum(cka.values()) / len(cka) if whole else None
        points.append(Point(row.step, row.stage, row.kl, 1 - row.kl / degraded, alignment, cka))
    about = {
        "name": name,
        "path": str(path),
        "student": manifest.get("recipe", {}).get("student"),
        "constraint": manifest.get("constraint"),
        "degraded_kl": degraded,
        "checkpoints": sum(point.alignment is not None for point in points),
        "layers": layers,
        "left_out": left_out,
        "finished": finished,
    }
    return Track(name, points, about, manifest.get("models", {}).get("teacher"))


def _row(row: JsonObject, where: str) -> Row:
    """A row that was checked."""
    allowed = {"step": int, "stage": str, "kl": float | int | None, "cka": list, "reference_layers": list}
    row = row if isinstance(row, dict) else {}
    wrong = [key for key in allowed if key not in row]
    wrong += [f"{key} = {row[key]!r}" for key, kind in allowed.items() if key in row and not isinstance(row[key], kind)]
    if not wrong:
        values, layers = row["cka"], row["reference_layers"]
        if len(values) != len(layers) or len(set(layers)) != len(layers):
            wrong.append(f"{len(values)} values of cka for the reference_layers {layers}")
        elif not all(isinstance(value, float | int | None) for value in values):
            wrong.append(f"cka = {values}")
    if wrong:
        raise InputError(
            f"{where}: missing or wrong: {', '.join(wrong)}. A row needs step, stage, kl, and for each of the "
            "student's layers one cka and one of reference_layers."
        )
    cka = {layer: _finite(value) for layer, value in zip(layers, values, strict=True)}
    return Row(row["step"], row["stage"], _finite(row["kl"]), cka)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _once(rows: Sequence[Row]) -> tuple[list[Row], list[JsonObject]]:
    """Rows without the recovered model where it is a checkpoint that has its row already, and those left out."""
    others = {row.step for row in rows if row.stage != "recovered"}
    twice = [row for row in rows if row.stage == "recovered" and row.step in others]
    why = "the checkpoint of this step, measured again after saving"
    return [row for row in rows if row not in twice], [row.left_out(why) for row in twice]


def _degraded_kl(path: Path, rows: Sequence[Row]) -> float:
    """KL of the student as it came in: from the track, measured as the other rows are, else from the summary."""
    values = [row.kl for row in rows if row.stage == "degraded"]
    if not values and (path / SUMMARY).is_file():
        values = [_finite(summary_of(path).get("degraded", {}).get("kl"))]
    if not values or values[0] is None:
        raise InputError(
            f"{path} does not say the degraded student's KL: {TRACK} has no row of the stage degraded with a KL, nor "
            f"has {SUMMARY} one. Without it there is no recovery to compute; leave this run out or run it again."
        )
    if values[0] < MEASURABLE_KL:
        raise InputError(
            f"{path} has no measurable damage: the degraded student's KL is {values[0]:.2g} nats per token, below "
            f"{MEASURABLE_KL}. There is nothing to recover; leave this run out."
        )
    return float(values[0])


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
        notes.append(f"The runs have {references} different references: layers of one number are not the same layer.")
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
    said = [sentence["text"] for sentence in result["sentences"]]
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
