"""Files of graded results, read and checked: what remend eval writes, or anybody else in its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject
from remend.files.reading import parsed, read_text

Source = str | Path | JsonObject
"""A path, or results as they were loaded."""

Key = tuple[str, str]
"""Task and grader."""

SHAPE = 'a results file is {"task": …, "grader": …, "items": [{"id": …, "correct": …}, …]}, as remend eval writes it'


@dataclass(frozen=True)
class Graded:
    """One task of one file: scores by id, and clusters by id where the items name any."""

    scores: dict[str, float]
    clusters: dict[str, str]


def load(source: Source, label: str) -> dict[Key, Graded]:
    """Each task of a file by task and grader; `label` names loaded results in messages.

    Raises InputError for what is no results file, FileError for one that can't be read.
    """
    where = label if isinstance(source, Mapping) else str(source)
    value = source if isinstance(source, Mapping) else _json(Path(source))
    several = isinstance(value, Mapping) and "results" in value and "items" not in value
    parts = value["results"] if isinstance(value, Mapping) and several else [value]
    if not isinstance(parts, list) or not parts:
        raise InputError(f'{where}: "results" must be a list of one or more results; {SHAPE}')
    by_key: dict[Key, Graded] = {}
    for number, part in enumerate(parts, start=1):
        place = f"{where}, result {number}" if several else where
        key = _key(part, place)
        if key in by_key:
            raise InputError(f"{where} holds task {key[0]} (grader {key[1]}) twice; keep one of them")
        by_key[key] = _items(part["items"], place)
    return by_key


def _json(path: Path) -> object:
    try:
        content: object = parsed(read_text(path, SHAPE))
        return content
    except FileError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; {SHAPE}") from None


def _key(part: object, place: str) -> Key:
    if not isinstance(part, Mapping):
        raise InputError(f"{place} holds a {type(part).__name__}; {SHAPE}")
    missing = [name for name in ("task", "grader", "items") if name not in part]
    if missing:
        raise InputError(
            f"{place} has no {', '.join(missing)} (it has: {', '.join(map(str, part)) or 'nothing'}); {SHAPE}"
        )
    for name in ("task", "grader"):
        if not isinstance(part[name], str) or not part[name]:
            raise InputError(f"{place}: {name} is {part[name]!r}; it must be a name, as text")
    if not isinstance(part["items"], list) or not part["items"]:
        raise InputError(f"{place} has no items; {SHAPE}. Run the evaluation again: there is nothing to compare")
    return part["task"], part["grader"]


def _items(items: Sequence[object], place: str) -> Graded:
    scores: dict[str, float] = {}
    clusters: dict[str, str] = {}
    for number, item in enumerate(items, start=1):
        if not isinstance(item, Mapping) or "id" not in item or "correct" not in item:
            keys = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise InputError(f"{place}, item {number}: id or correct is missing (got {keys}); {SHAPE}")
        name, score = item["id"], item["correct"]
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise InputError(f"{place}, item {number}: id is {name!r}; it must be a text or a whole number")
        if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
            raise InputError(
                f"{place}, item {name}: correct is {score!r}; allowed: true, false, or a number from 0 to 1"
            )
        if str(name) in scores:
            raise InputError(f"{place}: the id {name} stands twice; items are paired by id, so give each its own")
        scores[str(name)] = float(score)
        if item.get("cluster") is not None:
            clusters[str(name)] = str(item["cluster"])
    if clusters and len(clusters) < len(scores):
        raise InputError(
            f"{place}: {len(clusters)} of {len(scores)} items name a cluster; name it in all of them or none"
        )
    return Graded(scores, clusters)


def require_pairs(loaded: Sequence[Mapping[Key, Graded]], labels: Sequence[str]) -> None:
    """Raises InputError unless every file holds the same tasks, graders and items, in the same clusters."""
    for file, label in zip(loaded[1:], labels[1:], strict=True):
        if set(file) != set(loaded[0]):
            mine, first = (", ".join(f"{t} (grader {g})" for t, g in sorted(part)) for part in (file, loaded[0]))
            raise InputError(
                f"{label} holds {mine}, but {labels[0]} holds {first}: only the same tasks and graders compare. "
                "Evaluate both alike, or leave one out"
            )
        for key, graded in file.items():
            other = loaded[0][key]
            odd = [
                f"{len(ids)} only in {name} ({', '.join(sorted(ids)[:3])}{', …' if len(ids) > 3 else ''})"
                for name, ids in (
                    (label, graded.scores.keys() - other.scores.keys()),
                    (labels[0], other.scores.keys() - graded.scores.keys()),
                )
                if ids
            ]
            if odd:
                raise InputError(
                    f"{label} and {labels[0]} can't be paired on {key[0]}: they hold other items, {' and '.join(odd)}. "
                    "Evaluate both on the same data"
                )
    for key in loaded[0]:
        named = [(file[key].clusters, label) for file, label in zip(loaded, labels, strict=True) if file[key].clusters]
        for clusters, label in named[1:]:
            if odd := sorted(name for name in clusters if clusters[name] != named[0][0][name]):
                raise InputError(
                    f"{label} and {named[0][1]} put the item {odd[0]} of {key[0]} into other clusters; make them agree"
                )
