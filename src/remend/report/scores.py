"""Task scores of a run: what remend eval wrote into its folder evals/, told apart by the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from remend.errors import FileError
from remend.files.atomic import JsonObject, JsonRow
from remend.files.reading import read_object
from remend.report.page import Section, Table

EVALS = "evals"
"""A run's folder for results of remend eval. The page has a table of them."""

ROLES = ("degraded", "recovered", "reference")


@dataclass(frozen=True)
class Score:
    """The share of a task's items that a model gets right, with its 95% interval."""

    value: float
    low: float
    high: float
    items: int

    def words(self) -> str:
        """'87.5% (81.0% to 92.0%)'."""
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


Scores = dict[str, dict[str, Score]]
"""By task, and there by role; of several results of one role the last by file name."""


def scores_of(run: Path, manifest: JsonRow) -> Scores:
    """What RUN/evals/*.json say of the run's three models; files that say nothing of them are passed over."""
    models = manifest.get("models", {})
    known = {"degraded": models.get("student"), "reference": models.get("teacher")}
    scores: Scores = {}
    for path in sorted((run / EVALS).glob("*.json")):
        try:
            content = read_object(path)
        except FileError:
            continue
        if not isinstance(content, dict) or "files" not in content:
            continue
        named = Path(str(content.get("model"))).resolve()
        role = next((role for role, files in known.items() if files and files == content["files"]), None)
        role = "recovered" if named in (run.resolve(), (run / "model").resolve()) else role
        for part in content.get("results", [content]) if role else []:
            if score := _score(part):
                scores.setdefault(str(part["task"]), {})[str(role)] = score
    return scores


def _score(part: JsonObject) -> Score | None:
    try:
        low, high = part["interval_95"]
        return Score(float(part["score"]), float(low), float(high), int(part["n"]))
    except (KeyError, TypeError, ValueError):
        return None


def score_section(scores: Scores) -> list[Section]:
    """A table with a row for each task; nothing where no task was graded."""
    if not scores:
        return []
    rows = [
        [task, *(by_role[role].words() if role in by_role else "–" for role in ROLES), _items(by_role)]
        for task, by_role in scores.items()
    ]
    caption = (
        f"Results of remend eval in {EVALS}/, with the 95% interval of each score alone. Whether a difference between "
        "two of them is more than chance, remend compare says, which pairs them item by item."
    )
    return [Section("Task scores", "tasks", [Table(["task", *ROLES, "items"], rows, caption=caption)])]


def _items(by_role: dict[str, Score]) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(score.items for score in by_role.values()))
