"""Figures of a run's steps: loss and held-out KL by stream, learning rate, gradient, memory, tokens per second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from remend.files.atomic import JsonRow
from remend.files.run_directory import METRICS, TIMING, RunDirectory, updates_a_round
from remend.report.charts import Lines, Series
from remend.report.page import Block, Figure, Text
from remend.report.svg import Point, style

MOST_POINTS = 400
"""A line of more steps is drawn through means of as many."""

ROLLING = 5
"""Steps that the smooth line averages."""

Rows = Sequence[JsonRow]


def figures(files: RunDirectory, summary: JsonRow, manifest: JsonRow) -> list[Block]:
    """Loss and held-out KL of each stream over the steps, and the speed."""
    # the report of a finished run that goes on for more steps, and is not there yet, shows those of its summary
    goes_on = "steps" in summary and summary.get("segments", []) != manifest.get("segments", [])
    last = summary["steps"] if goes_on else math.inf
    rows = [row for row in files.rows(METRICS) if row["step"] <= last]
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return [Text("No steps were trained." if "steps" in summary else "No step is done yet.")]
    names = [key.removesuffix("/loss") for key in trained[0] if key.endswith("/loss")]
    main = main_stream(names, summary, manifest)
    losses: list[Block] = []
    for name in sorted(names, key=lambda name: name != main) or [""]:
        is_main = name == main or not name
        teacher = None if is_main else _teacher(name, manifest)
        losses.append(_loss(name, _held_out(rows, summary, name, is_main), trained, _caption(teacher)))
    charts = [*_course(trained, names), *_memory(files)]
    speed = _speed(trained, files.step_seconds(), names, updates_a_round(manifest["recipe"]))
    see = COURSE + "".join(map(_longer, summary.get("segments", [])))
    course = [Figure(charts, see=see, measured=_clipping(manifest))] if charts else []
    return [*losses, *course, *([speed] if speed else [])]


def _teacher(name: str, manifest: JsonRow) -> str:
    """The name of a stream's teacher."""
    stream: JsonRow = (manifest["recipe"].get("streams") or {}).get(name) or {}
    return str(stream.get("teacher") or manifest["reference"])


def _caption(teacher: str | None) -> str:
    """What to see in a stream's loss and held-out KL; None is the stream that is taught by the reference."""
    if teacher == "initial":
        return (
            "This stream holds the student to where it began: its KL starts at 0 and can only rise. It does its work "
            "where the line stays low while the other streams fall."
        )
    if teacher in ("ema", "live"):
        return (
            "This stream's teacher moves with the student, so its KL says how far the two are apart, and not how much "
            "was learned: for that look at the negative log-likelihood of the answers in the table."
        )
    return (
        "Training works where the loss falls and the held-out KL falls with it; a held-out KL that rises again says "
        "that training went on too long."
    )


COURSE = (
    "A learning rate that rises and then falls is the schedule. A gradient norm that jumps and stays high says that "
    "the rate is too large for this model. Memory that climbs from step to step will not last a longer run."
)


def _longer(segment: JsonRow) -> str:
    return (
        f" The steps after {segment['from']} were added later, and have the rate at which the schedule ends, "
        f"{segment['learning_rate']:.3g}."
    )


def _clipping(manifest: JsonRow) -> str:
    limit = manifest["recipe"].get("max_grad_norm")
    scaled = f" The gradient norm is that before it is scaled down to {limit:g} at most." if limit else ""
    return f"By optimizer step.{scaled} Memory is that of the process, after the step."


def _course(trained: Rows, names: Sequence[str]) -> list[Lines]:
    """Learning rate, gradient norm and clipped share over the steps, as far as the metrics have them."""
    charts = []
    for key, title, high in (
        ("learning_rate", "Learning rate", None),
        ("grad_norm", "Gradient norm", None),
        ("clipped_share", "Clipped share: completions that met the length limit", 1.0),
    ):
        lines = [
            Series(label, style(i), thinned(points))
            for i, (label, of) in enumerate([(title.lower(), key), *((name, f"{name}/{key}") for name in names)])
            if (points := [(float(row["step"]), row[of]) for row in trained if of in row])
        ]
        if lines:
            charts.append(Lines(title, lines, x_label="optimizer step", y_label="", high=high))
    return charts


def _memory(files: RunDirectory) -> list[Lines]:
    rows = [row for row in files.rows(TIMING) if row["step"]]
    lines = [
        Series(label, style(i), thinned(points))
        for i, (label, key) in enumerate((("memory of the process", "rss_mib"), ("GPU memory, peak", "gpu_mib")))
        if (points := [(float(row["step"]), row[key]) for row in rows if key in row])
    ]
    return [Lines("Memory", lines, x_label="optimizer step", y_label="MiB")] if lines else []


def main_stream(names: Sequence[str], summary: JsonRow, manifest: JsonRow) -> str | None:
    """The stream that the summary's own figures are of: taught by the reference, and not among its side streams."""
    streams = manifest["recipe"].get("streams") or {}
    taught = [n for n in streams if (streams[n].get("teacher") or manifest["reference"]) == manifest["reference"]]
    beside = summary.get("streams", {})
    return next((name for name in (*taught, *names) if name in names and name not in beside), None)


def _held_out(rows: Rows, summary: JsonRow, name: str, main: bool) -> list[Series]:
    """A stream's held-out KL: before, at every evaluation, after."""
    sides, key = summary.get("streams", {}), "eval/kl" if main else f"eval/{name}/kl"
    if not main and name not in sides:
        return []
    of, names = (summary, ("degraded", "recovered")) if main else (sides[name], ("before", "after"))
    before, after = (of.get(name) for name in names)  # a run under way has no end yet
    repair = summary.get("repair") if main else None
    repair = repair if repair and repair.get("kept", True) else None
    evaluated = [(float(row["step"]), row[key]) for row in rows if key in row]
    points = [(0.0, repair["kl"] if repair else before["kl"])] if before else []
    points += evaluated
    if after:
        selected: JsonRow = summary.get("selected") or {}
        points = sorted([*points, (float(selected.get("step", summary["steps"])), after["kl"])], key=lambda p: p[0])
    label = "held-out KL" + (" (on the reference's answers)" if main else " to its teacher")
    # a line between the two ends alone would show a path that nobody measured
    lines = [Series(label, style(1), points, dots=True, joined=bool(evaluated))]
    if repair and before:
        start = [(0.0, before["kl"])]
        lines.append(Series("held-out KL before one-shot repair", style(2), start, dots=True, joined=False))
    return lines


def _loss(name: str, held_out: Sequence[Series], trained: Rows, see: str) -> Figure:
    key = f"{name}/loss" if name else "loss"
    points = [(float(row["step"]), row[key]) for row in trained if key in row]
    width = -(-len(points) // MOST_POINTS)
    each = "of a step" if width == 1 else f"(mean of {width} steps)"
    chart = Lines(
        f"Loss and held-out KL{f': {name}' if name else ''}",
        [
            Series(f"training loss {each}", f"faint {style(0)}", thinned(points)),
            Series(f"its mean over {ROLLING} steps", style(0), thinned(rolling(points))),
            *held_out,
        ],
        x_label="optimizer step",
        y_label="nats per token",
    )
    return Figure(
        [chart],
        see=see,
        measured="The loss is the divergence from the teacher on the step's own completions, so its tokens change from "
        "step to step. The held-out KL is measured on fixed answers.",
    )


def _speed(trained: Rows, timing: Mapping[int, float], names: Sequence[str], each: int) -> Figure | None:
    """A point every `each` steps: only the first of a round of sampling pays for it."""
    seconds = {step: value for step, value in timing.items() if value > 0}
    timed = [row for row in trained if row["step"] in seconds]
    if not timed:
        return None

    def points(key: str) -> list[Point]:
        rounds = [timed[at : at + each] for at in range(0, len(timed), each)]
        sums = [(sum(row.get(key, 0) for row in part), sum(seconds[row["step"]] for row in part)) for part in rounds]
        return thinned([(float(part[-1]["step"]), n / spent) for part, (n, spent) in zip(rounds, sums, strict=True)])

    lines = [Series("all streams" if names else "completion tokens", style(0), points("tokens"))]
    lines += [Series(name, style(i + 1), points(f"{name}/tokens")) for i, name in enumerate(names)]
    whole = sum(row["tokens"] for row in timed) / sum(seconds[row["step"]] for row in timed)
    return Figure(
        [Lines("Tokens per second", lines, x_label="optimizer step", y_label="tokens per second")],
        see=f"How many completion tokens were trained on in a second: {whole:.0f} over the whole run.",
        measured="Completion tokens over the whole time of the steps that one round of sampling feeds: sampling, "
        "teacher, forward, backward and update.",
    )


def rolling(points: Sequence[Point], width: int = ROLLING) -> list[Point]:
    """Each point's mean with those before it, `width` in all."""
    means: list[Point] = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - width + 1) : i + 1] if y is not None]
        means.append((x, sum(window) / len(window) if window else None))
    return means


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: means over stretches of equal length, each at its last x."""
    width = max(1, -(-len(points) // most))
    if width == 1:
        return list(points)
    means: list[Point] = []
    for at in range(0, len(points), width):
        part = points[at : at + width]
        known = [y for _, y in part if y is not None]
        means.append((part[-1][0], sum(known) / len(known) if known else None))
    return means
