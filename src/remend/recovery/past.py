"""What an earlier process of a run measured and decided, read before a resumed one goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from remend.files.atomic import JsonObject
from remend.files.reading import read_object, understood
from remend.files.run_directory import DAMAGED, METRICS, REPAIR, TIMING, TRACK
from remend.models.sampling.answers import read_answers
from remend.models.sampling.rollout import Rollout
from remend.recovery.begin import Run
from remend.recovery.bootstrap import GATE
from remend.recovery.judge import BASELINE, SIDE_BASELINE, HeldOut
from remend.recovery.plateau import APART
from remend.recovery.repair import REPAIR_ANSWERS, Repaired, trained_on
from remend.recovery.selection import SCORE, Best


@dataclass(frozen=True)
class Past:
    """All of it is empty or None where no process came before, or none came so far.

    degraded: the measurement of the student as it came in.
    streams: figures of the streams beside the main one before training, by stream.
    repaired: a repair whose weights are in the checkpoint: what was said of it, and the answers where it was kept.
    gate: steps done at each decision of the gate, and whether it opened.
    scores: of the evaluations, in order.
    best: which weights are kept as the best so far.
    apart: KL on the prompts that `steps: auto` looks at, in order.
    """

    degraded: HeldOut | None
    streams: Mapping[str, Mapping[str, float]] | None
    repaired: Repaired
    gate: Sequence[tuple[int, bool]]
    scores: Sequence[float]
    best: Best | None
    apart: Sequence[float]


def rewind_and_read(run: Run) -> Past:
    """Read the run's directory, once what was written after its last checkpoint is gone: it will be made again."""
    directory = run.directory
    if run.main:
        for name in (METRICS, TIMING, GATE, TRACK):
            directory.rewind(name, run.step)
    run.wait()  # what is read from these files is read as rewound
    with understood(directory.path, DAMAGED):
        return _read(run)


def _read(run: Run) -> Past:
    directory = run.directory
    baseline, streams, repair = (directory.path / name for name in (BASELINE, SIDE_BASELINE, REPAIR))
    record: JsonObject | None = read_object(repair) if repair.is_file() else None
    return Past(
        degraded=HeldOut.read(baseline) if baseline.is_file() else None,
        streams=_before(run, read_object(streams)) if streams.is_file() else None,
        repaired=Repaired(answers=_repair_answers(run), record=record),
        gate=[(row["step"], row["open"]) for row in directory.rows(GATE)],
        scores=[row[SCORE] for row in directory.rows(METRICS) if SCORE in row],
        best=Best.read(directory) if run.plan.config.selects == "best" else None,
        apart=[row[APART] for row in directory.rows(METRICS) if APART in row],
    )


def _before(run: Run, measured: JsonObject) -> Mapping[str, Mapping[str, float]]:
    """Figures of the streams as they were written. Raises ValueError for those of others."""
    known = {data.stream.name for data in run.prompts.streams}
    figures = [figure for before in measured.values() for figure in before.values()]
    if not measured.keys() <= known or any(type(figure) not in (int, float) for figure in figures):
        raise ValueError(f"{SIDE_BASELINE} holds no figures of this run's streams")
    return measured


def _repair_answers(run: Run) -> list[Rollout]:
    prompts = {p.id: p for p in run.prompts.main.train}
    asked = [prompts[row["id"]] for row in run.directory.rows(REPAIR_ANSWERS)]
    return trained_on(read_answers(run.directory, REPAIR_ANSWERS, asked))
