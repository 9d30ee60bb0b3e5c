"""What graded cells scored, item by item: read from their files, and averaged where there are several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object
from remend.files.run_directory import RunDirectory
from remend.studies.cell import grades_file
from remend.studies.grid import Cell, Group, Study
from remend.studies.made import graded

Key = tuple[str, str]
"""A task and its grader."""


@dataclass(frozen=True)
class Done:
    """A finished cell: its directory, cell.json, and the wanted tasks that it was not graded on."""

    cell: Cell
    place: Path
    outcome: JsonRow
    ungraded: Sequence[str]


def mean(values: Sequence[float]) -> float:
    """Of some numbers, added in their order."""
    return sum(values) / len(values)


def prompts_of(place: Path) -> dict[str, JsonObject]:
    """A cell's held-out prompts by id, each with what `remend recover` writes of it.

    Where it counts tokens of equal top-1 choice (older files don't), their complement stands beside it as
    `disagree_degraded` and `disagree_recovered`: sums that a recovery takes down, as those of KL.
    """
    prompts = {}
    for row in RunDirectory(place).rows("held_out.jsonl"):
        whens = [when for when in ("degraded", "recovered") if f"agree_{when}" in row]
        prompts[row["id"]] = row | {f"disagree_{when}": row["tokens"] - row[f"agree_{when}"] for when in whens}
    return prompts


def parts_of(study: Study, group: Group, folders: Sequence[Path], left: Sequence[str]) -> dict[Key, JsonObject]:
    """The results of every task but those `left` out by (task, grader), of several models averaged by item."""
    by_key: dict[Key, list[JsonRow]] = {}
    for name in (name for name in graded(study, group) if name not in left):
        for folder in folders:
            path = grades_file(folder, name)
            content = read_object(path) if path.is_file() else {}
            for part in content.get("results", [content] if content else []):
                by_key.setdefault((part["task"], part["grader"]), []).append(part)
    return {key: _averaged(parts) for key, parts in by_key.items() if len(parts) == len(folders)}


def _averaged(parts: Sequence[JsonRow]) -> JsonObject:
    lists = [{item["id"]: item for item in part.get("items") or ()} for part in parts]
    items = []
    for name, item in lists[0].items():
        if all(name in others for others in lists):
            scores = [float(others[name]["correct"]) for others in lists]
            cluster = {"cluster": item["cluster"]} if item.get("cluster") is not None else {}
            items.append({"id": name, "correct": mean(scores), **cluster})
    first = parts[0]
    score = mean([float(part["score"]) for part in parts])
    return {"task": first["task"], "grader": first["grader"], "score": score, "items": items}
