"""Checkpoints of recoveries as `remend correlate` reads them: of runs, of a study's cells, and of committed records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object, understood
from remend.files.run_directory import MANIFEST, SUMMARY, TRACK, RunDirectory, summary_of
from remend.maths.gap import MEASURABLE_KL
from remend.studies.cell import GRADES, OUTCOME, grades_file
from remend.studies.records import FOLDER, FROM, REMEDY, read_record


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
class CellFacts:
    """What is known of a run that is a study's cell.

    group: model, degradation and task; how: its method, see remend.studies.spec; teacher: reference, base or initial.
    compressed_expert: whether its degradation stands on another, so that the reference is an expert and the base none.
    recipe: of the method, as one text to be compared.
    score: on the group's task, 0 to 1; None where it was not graded.
    """

    group: str
    seed: int
    how: str
    teacher: str
    compressed_expert: bool
    recipe: str
    score: float | None


@dataclass(frozen=True)
class Track:
    """What a run's checkpoints measured; `about` is what the result says of the run, `reference` its files' hashes."""

    name: str
    points: list[Point]
    about: JsonObject
    reference: JsonObject | None
    cell: CellFacts | None = None


def read_tracks(places: Sequence[str | Path]) -> list[Track]:
    """The tracks of runs, in the order in which they are named.

    Args:
        places: directories of recovery runs, records of a study's cells (records.py), or folders of records. Of a
            folder, records without a track (of students that are not trained) or without damage are left aside.

    Raises:
        InputError: none is named, one twice, a place that is neither, a run without track or measurable damage, a row
            that can't be read.
        FileError: a file that can't be read, or a record that changed since it was written.
    """
    named = [Path(place) for place in places]
    if not named:
        raise InputError("no run is given; name the directories of one or more recovery runs")
    paths = [path for place in named for path in _inside(place)]
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} and {seen[path.resolve()]} are the same run; name each once")
        seen[path.resolve()] = path
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    tracks = []
    for path, name in zip(paths, names, strict=True):
        with understood(path, REMEDY if path.is_file() else "run it again with another out"):
            tracks.append(_of_record(path) if path.is_file() else _of_run(path, name))
    return tracks


def _inside(place: Path) -> list[Path]:
    """A run or a record by itself; of a folder of records those that can be correlated."""
    if place.is_file() or (place / MANIFEST).is_file() or not place.is_dir():
        return [place]
    records = sorted(place.glob("*.json"))
    if not records:
        return [place]  # which is said to be no run
    found = [path for path in records if _has_a_track(read_record(path))]
    if not found:
        raise InputError(f"{place} holds {len(records)} records, and none of them has a track of measurable damage")
    return found


def _has_a_track(record: JsonRow) -> bool:
    return bool(record.get("track")) and record["outcome"]["kl"]["degraded"] >= MEASURABLE_KL


def _of_run(path: Path, name: str) -> Track:
    directory = RunDirectory.open(path)
    try:
        rows = [_row(row, f"{path / TRACK}, row {i}") for i, row in enumerate(directory.rows(TRACK), 1)]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / TRACK} can't be read: {error}; run again with another out") from None
    if not rows:
        raise InputError(f"{path} has no {TRACK}; measure it with: remend track {path}")
    finished = (path / SUMMARY).is_file()
    summary = summary_of(path).get("degraded", {}).get("kl") if finished else None
    cell = _cell_at(path)
    return _track(path, name, rows, read_object(path / MANIFEST), summary, finished or cell is not None, cell)


def _of_record(path: Path) -> Track:
    record = read_record(path)
    if not record.get("track"):
        raise InputError(f"{path} is of a cell that was not tracked; leave it out")
    rows = [_row(row, f"{path}, row {i} of track") for i, row in enumerate(record["track"], 1)]
    kl = record["outcome"]["kl"]["degraded"]
    return _track(path, record["cell"], rows, record["manifest"], kl, True, _facts(record["settles"], record))


def _cell_at(place: Path) -> CellFacts | None:
    """What a run is as a study's cell, OUT/cells/GROUP/METHOD/SEED with its record in OUT/records, or None."""
    if not (place / OUTCOME).is_file() or len(place.resolve().parts) < 5:
        return None
    *_, group, method, seed = place.resolve().parts
    record = place.resolve().parents[3] / FOLDER / f"{group}--{method}--{seed}.json"
    if (place / FROM).is_file():
        settled = read_object(place / FROM)["settles"]
    elif record.is_file():
        settled = read_record(record)["settles"]
    else:
        return None
    task = grades_file(place / GRADES, next(iter(settled["grading"]), ""))
    content = read_object(task) if task.is_file() else None
    return _facts(settled, {"cell": f"{group}/{method}/{seed}", "grades": {next(iter(settled["grading"])): content}})


def _facts(settled: JsonRow, record: JsonRow) -> CellFacts:
    """Of what settles a cell, its name and its grades; the first graded task is the group's own."""
    group, _, seed = str(record["cell"]).rsplit("/", 2)
    training = settled["training"]
    graded = record["grades"].get(next(iter(settled["grading"]), ""))
    parts = graded.get("results", [graded]) if graded else []
    return CellFacts(
        group=group,
        seed=int(seed),
        how=training["how"],
        teacher=training.get("teacher", "reference"),
        compressed_expert=len(settled["damage"]) > 1,
        recipe=json.dumps(training["recipe"], sort_keys=True),
        score=float(parts[0]["score"]) if parts else None,
    )


def _track(
    path: Path,
    name: str,
    rows: list[Row],
    manifest: JsonRow,
    summary_kl: float | None,
    finished: bool,
    cell: CellFacts | None,
) -> Track:
    degraded = _degraded_kl(path, rows, summary_kl)
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
    return Track(name, points, about, (manifest.get("models") or {}).get("teacher"), cell)


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


def _degraded_kl(path: Path, rows: Sequence[Row], summary_kl: float | None) -> float:
    """KL of the student as it came in: from the track, measured as the other rows are, else from the summary."""
    values = [row.kl for row in rows if row.stage == "degraded"] or [_finite(summary_kl)]
    if values[0] is None:
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
