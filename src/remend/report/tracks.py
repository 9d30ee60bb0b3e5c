"""Recovery against alignment: checkpoints of a run (track.jsonl) or students of a diagnosis, KL over mean CKA."""

from __future__ import annotations

from collections.abc import Sequence

from remend.files.atomic import JsonRow
from remend.report.charts import Heatmap, Points, Scatter
from remend.report.page import Figure, Section
from remend.report.words import number

CAUTION = (
    "That alignment and recovery go together does not say that one causes the other: CKA can change while behaviour "
    "does not, and the other way round (arXiv 2210.16156)."
)

Rows = Sequence[JsonRow]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def track_group(name: str, track: Rows) -> Points:
    """A run's checkpoints (rows of track.jsonl) as points: mean CKA over layers, KL."""
    points = [(mean(row["cka"]), row["kl"], _said(f"step {_when(row)}", row)) for row in track]
    return Points(name, points)


_NAMES = {"degraded": "start", "repaired": "repair", "recovered": "end"}
"""Short names of a track's stages that are no step of the training."""


def _when(row: JsonRow) -> str:
    """The step, and what the model was where that is no step of the training."""
    stage = row.get("stage", "training")
    return str(row["step"]) if stage == "training" else f"{row['step']} ({stage})"


def _said(what: str, row: JsonRow) -> str:
    agreement = row.get("top1_agreement")
    agreed = "" if agreement is None else f", agreement {agreement:.1%}"
    return f"{what}: mean CKA {number(mean(row['cka']))}, KL {number(row['kl'])}{agreed}"


def student_point(student: JsonRow, before: bool = False) -> tuple[float | None, float | None, str]:
    """A diagnosed student as a point."""
    values = {
        "cka": [layer["cka"] for layer in student["layers"]],
        "kl": student["behaviour"]["kl"],
        "top1_agreement": student["behaviour"]["top1_agreement"],
    }
    return mean(values["cka"]), values["kl"], _said(student["name"] + (" (before)" if before else ""), values)


def student_groups(diagnosis: JsonRow, prefix: str = "") -> list[Points]:
    """Each recovered student joined to the one that it is compared with; students that none is made from, alone."""
    students = [diagnosis, *diagnosis.get("others", [])]
    by_name = {student["name"]: student for student in students}
    groups, seen = [], set()
    for student in students:
        before = by_name.get((student.get("compared_with") or {}).get("name", ""))
        if before is not None:
            name = f"{prefix}{before['name']} → {student['name']}"
            groups.append(Points(name, [student_point(before, before=True), student_point(student)]))
            seen |= {before["name"], student["name"]}
    alone = [Points(prefix + s["name"], [student_point(s)], joined=False) for s in students if s["name"] not in seen]
    return groups + alone


def against(groups: Sequence[Points], what: str) -> Figure:
    """The scatter, with its caption."""
    return Figure(
        [Scatter("Recovery against alignment", groups, "mean CKA over layers", "KL to the reference, nats per token")],
        see=f"Each point is {what}. Down is closer to the reference in behaviour, right is closer in representation: "
        "a path from its open marker to the lower right recovers and realigns together.",
        measured="Both from one teacher-forced pass over the reference's answers. " + CAUTION,
    )


def _rows(track: Rows) -> str:
    counts = sorted({row["rows"] for row in track if "rows" in row})
    return f" ({' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} rows)" if counts else ""


def alignment(track: Rows) -> Section:
    """The section of a run that has a track: the scatter, and CKA by layer over the steps."""
    layers = max(len(row["cka"]) for row in track)
    values = [[row["cka"][i] if i < len(row["cka"]) else None for row in track] for i in range(layers)]
    grid = Figure(
        [
            Heatmap(
                "CKA by layer and step",
                values,
                "step",
                "layer",
                columns=[_NAMES.get(row.get("stage", ""), str(row["step"])) for row in track],
            )
        ],
        see="Where along the depth alignment comes back, and when: brighter is more like the reference.",
        measured="Debiased linear CKA of each layer's residual stream with the reference's, one row a held-out prompt"
        f"{_rows(track)}: noisier than a diagnosis of its own.",
    )
    scatter = against([track_group("checkpoints", track)], "a checkpoint of this run")
    return Section("Recovery against alignment", "alignment", [scatter, grid])
