"""`remend report`: the page of a run or a diagnosis written anew, or one page that compares several.

remend report runs/first
remend report runs/first runs/second runs/diagnosis --out runs/compared
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.files.reading import read_object, understood
from remend.files.run_directory import MANIFEST, RECIPE, SUMMARY, TRACK, RunDirectory, occupied, summary_of
from remend.report.comparison import Compared, Diagnosis, Run, comparison_page
from remend.report.diagnosis import diagnosis_page
from remend.report.page import Page
from remend.report.recovery import recovery_page
from remend.report.study import study_page
from remend.report.writing import write_page

DIAGNOSIS, STUDY = "diagnosis.json", "results.json"

WHAT = (
    f"a recovery's directory holds {MANIFEST}, {RECIPE} and, once it is complete, {SUMMARY}; a diagnosis' "
    f"directory holds {DIAGNOSIS}, a study's {STUDY}"
)


def report(paths: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write report.html, report.md and report.json of one run, diagnosis or study, or of several runs and diagnoses.

    Args:
        paths: directories of complete recoveries and diagnoses, or one study's.
        out: a new directory. Several paths need one; without it the page of one path goes into its own directory.

    Returns:
        The path of report.html.

    Raises:
        InputError: no path, a path that is none of these or given twice, a study beside others, a run that is not
            complete, an `out` that is missing or occupied.
        FileError: a file that can't be read or written, or is damaged or of another version.
    """
    places = [Path(path) for path in paths]
    if not places:
        raise InputError(f"no path is given; name at least one: {WHAT}")
    names = _names(places)
    if len(places) > 1 and out is None:
        raise InputError(
            f"{len(places)} paths are given and no out: a comparison has no directory of its own; name a new one with "
            "--out"
        )
    if out is not None and (problem := occupied(out)):
        raise InputError(problem)
    with understood(" or ".join(map(str, places)), "make it anew with this version"):
        if len(places) == 1 and (places[0] / STUDY).is_file():
            return write_page(out or places[0], study_page(_object(places[0] / STUDY)))
        compared = [_read(place, name) for place, name in zip(places, names, strict=True)]
        page = _page(compared)
        return write_page(out or compared[0].path, page)


def _page(compared: Sequence[Compared]) -> Page:
    if len(compared) > 1:
        return comparison_page(compared)
    (one,) = compared
    return recovery_page(one.path, one.summary) if isinstance(one, Run) else diagnosis_page(one.content)


def _names(places: Sequence[Path]) -> list[str]:
    """Short and distinct: the last parts of each path, as many as it takes. InputError for one given twice."""
    whole = [place.resolve() for place in places]
    for i, place in enumerate(whole):
        if place in whole[:i]:
            raise InputError(f"{places[i]} is given twice; every run and diagnosis is compared once")
    return [_tail(place, [other for other in whole if other != place]) for place in whole]


def _tail(place: Path, others: Sequence[Path]) -> str:
    """As many of a path's last parts as tell it from all others."""
    for count in range(1, len(place.parts)):
        tail = place.parts[-count:]
        if all(other.parts[-count:] != tail for other in others):
            return "/".join(tail)
    return str(place)


def _read(place: Path, name: str) -> Compared:
    if (place / DIAGNOSIS).is_file():
        return Diagnosis(name, place, _object(place / DIAGNOSIS))
    if not (place / MANIFEST).is_file() or not (place / RECIPE).is_file():
        reason = "is no directory" if not place.is_dir() else "is neither a recovery nor a diagnosis"
        raise InputError(f"{place} {reason}: {WHAT}; give what --out named")
    if not (place / SUMMARY).is_file():
        raise InputError(
            f"the recovery in {place} is not complete: {SUMMARY} is written last, and is not there; continue it "
            f"with remend recover --resume {place}"
        )
    return Run(name, place, summary_of(place), _object(place / MANIFEST), RunDirectory(place).rows(TRACK))


def _object(path: Path) -> JsonObject:
    return read_object(path, "write it anew with the run")
