"""How much a recovery asks for: tokens, work and time by phase, and disk. Arithmetic on facts of a plan alone.

`footprint` counts the memory of the same facts.

Work is counted in a few kinds, and COST says how long a unit of each takes on one machine. On another one the times are
multiplied by a factor: of a run that was recorded there, phase by phase; of a measurement, kind by kind; or of a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from remend.models.sizes import Size

Train = Literal["all", "scales", "norms", "last", "adapter"]
"""What moves in training."""

Moments = Literal["adamw", "adamw-host", "adamw-8bit"]
"""Where AdamW's moments are, and in how many bits (training/optimizers)."""

Work = Mapping[str, float]
"""Units by kind of work."""

KINDS = {
    "start": "the checks of one command",
    "load": "parameters read from files, which are hashed too, 10⁶",
    "decode": "multiplications of sampling, 10⁹ (those that reading the weights costs as well are among them)",
    "answer": "the same in float32, in which held-out prompts are answered",
    "forward": "multiplications of scoring, 10⁹",
    "judge": "the same in float32, in which held-out answers are measured",
    "backward": "multiplications of a backward pass, 10⁹",
    "update": "parameters that AdamW moves, 10⁶",
    "walk": "multiplications over calibration text, 10⁹: passes of blocks, and sums of their inputs' products",
    "solve": "multiplications of closed-form solutions, 10⁹",
    "save": "bytes written, 10⁶",
    "report": "one report",
}
"""What a unit is."""

COST: Work = {
    "start": 5.0,
    "load": 0.032,
    "decode": 0.011,
    "answer": 0.011,
    "forward": 0.008,
    "judge": 0.008,
    "backward": 0.015,
    "update": 0.001,
    "walk": 0.0045,
    "solve": 0.12,
    "save": 0.002,
    "report": 1.0,
}
"""Seconds of a unit in float32 where large matrices multiply at NOMINAL: `measured_costs` of SmolLM2, one thread of
an AMD EPYC."""

NOMINAL = 1e11
"""Multiplications, each with its addition, in a second."""

BFLOAT16 = 1.9
"""In bfloat16 the work of a model takes so much longer than its products would, since other things don't get faster."""

BATCH = 64
"""Rows that are sampled together at most."""

READING = {"cpu": 16, "cuda": 192}
"""So many rows more would be decoded in the time in which a pass reads the weights, by kind of device."""

REPAIR_LOOKS = 5
"""Passes of a block over the calibration text for each group of its matrices, and one more."""

WRITTEN_TOKENS, WRITTEN_SHARE = 96, 0.5
"""A try of the reference at writing a prompt has so many tokens at most, and so many tries are kept."""

SAMPLES_SHOWN, WORST, FITTED = 4, 10, 32
"""Answers for people to read, prompts whose tokens are looked at one by one, answers of a repair that are scored."""


@dataclass(frozen=True)
class StreamWork:
    """What a stream asks for.

    name: its own. rows: prompts of a step.
    prompt, longest: tokens of a prompt, on average and of the longest; shown: of the teacher's, on average.
    answer: tokens at most; skipped: of these the first, which are not trained on.
    on_policy: the student's share of the answers. pool: answers that its teacher writes beforehand.
    held_out: prompts that are measured. scored: its teacher runs a model.
    opening: tokens that all its prompts open with, where these are run once for all rows.
    """

    name: str
    rows: int
    prompt: float
    longest: int
    shown: float
    answer: int
    skipped: int = 0
    on_policy: float = 1.0
    pool: int = 0
    held_out: int = 0
    scored: bool = True
    opening: int = 0


@dataclass(frozen=True)
class FrozenBase:
    """What lies under an adapter (models.frozen_base).

    numbers: of the linear layers that are held in fewer bytes than float32 takes. held: bytes of these.
    packed: they are held by their codes on a grid. shared: the reference reads the same memory.
    """

    numbers: int
    held: int
    packed: bool
    shared: bool


@dataclass(frozen=True)
class Facts:
    """What an estimate rests on.

    student, reference: their sizes; the reference is None where none is loaded.
    streams: the first of them is the one that recovery is measured on.
    device: cpu, cuda, mps; itemsize: bytes of a number of the arithmetic; reference_itemsize: of a reference's weight.
    by_block, reference_by_block: blocks come to the device one by one, from the disk or the host's memory.
    mapped, reference_mapped: the weights are those of a file of float32, which a CPU maps.
    steps, evaluations, checkpoints: how many, checkpoints as far as they are kept. updates: steps of a round of
    sampling.
    rows_at_once: that are sampled together at most.
    batch: rows of a micro-batch; micro_batches: of a step. recomputes: layers are run again in the backward pass.
    train: what moves: all, scales, norms or an adapter. codes: numbers on the student's grid; scales: bytes of its
    scales and zeros.
    base: what is frozen under an adapter; None where none is trained.
    trained: parameters that move; held: those of them whose masters lie apart; head_trained: the head is among them.
    optimizer: where and how AdamW's moments are held.
    copies: of them that teachers keep; averages: a checkpoint holds one of these.
    repair: answers that it is fitted to, 0 for none; repair_prompt, repair_answer: tokens of each; repair_rows: tokens
    at most; repair_given: nobody writes them.
    written: prompts that the reference writes.
    best: the best weights are kept beside the checkpoints. saved_itemsize: bytes of a saved weight.
    activation: bytes that the backward pass keeps of a token. chunk: positions of a chunk of logits.
    """

    student: Size
    reference: Size | None
    streams: Sequence[StreamWork]
    device: str
    itemsize: int
    reference_itemsize: int
    by_block: bool
    reference_by_block: bool
    mapped: bool
    reference_mapped: bool
    steps: int
    evaluations: int
    checkpoints: int
    saved_checkpoints: int
    updates: int
    rows_at_once: int
    batch: int
    micro_batches: int
    recomputes: bool
    train: Train
    codes: int
    scales: int
    base: FrozenBase | None
    trained: int
    held: int
    head_trained: bool
    optimizer: Moments
    copies: int
    averages: bool
    repair: int
    repair_prompt: float
    repair_answer: int
    repair_rows: int
    repair_given: bool
    written: int
    best: bool
    saved_itemsize: int
    activation: int
    chunk: int


@dataclass(frozen=True)
class Tokens:
    """Of training: answers and their tokens in a step, and in the whole run; at most, and the longest sequence."""

    answers: int
    step: int
    total: int
    longest: int


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes: the model, each checkpoint, how many of them are kept, the best weights; in all."""

    model: int
    checkpoint: int
    checkpoints: int
    best: int

    @property
    def total(self) -> int:
        """At most."""
        return self.model + self.checkpoint * self.checkpoints + self.best


def tokens_of(facts: Facts) -> Tokens:
    """How many tokens are trained on, if every answer has its full length."""
    step = sum(s.rows * (s.answer - s.skipped) for s in facts.streams)
    longest = max(s.longest + s.answer for s in facts.streams)
    return Tokens(sum(s.rows for s in facts.streams), step, step * facts.steps, longest)


def disk_of(facts: Facts) -> Disk:
    """What a run leaves: weights, and checkpoints with masters, both moments, and what a teacher's average is."""
    return disk(
        facts.student.parameters,
        facts.trained,
        checkpoints=facts.saved_checkpoints,
        averages=facts.averages,
        best=facts.best,
        grid=facts.codes + facts.scales,
        itemsize=facts.saved_itemsize,
    )


def disk(
    parameters: int, trained: int, *, checkpoints: int, averages: bool, best: bool, grid: int, itemsize: int = 4
) -> Disk:
    """`disk_of` in numbers: a checkpoint has 12 bytes a trained parameter, 4 more where a teacher's average is kept.

    grid: bytes of the codes, scales and zeros that lie beside a model.
    """
    each = (12 + 4 * averages) * trained
    return Disk(itemsize * parameters + grid, each, checkpoints, 4 * trained if best else 0)


def work_by_phase(facts: Facts, answered: float = 1.0) -> dict[str, dict[str, float]]:
    """The work of each phase, in order; `answered` is how long answers are as a share of what they may be."""
    main = facts.streams[0]
    loaded = facts.student.parameters + (facts.reference.parameters if facts.reference else 0)
    phases: dict[str, dict[str, float]] = {"loading": {"start": 1.0, "load": loaded / 1e6}}
    if facts.written:
        tries = math.ceil(facts.written / WRITTEN_SHARE)
        phases["prompts"] = {"answer": decoding(_healthy(facts), tries, WRITTEN_TOKENS, 24, facts.device)}
    answers = decoding(_healthy(facts), main.held_out, main.answer, main.prompt, facts.device)
    phases["baseline"] = _summed({"answer": answers}, _measured(facts, answered))
    if facts.repair:
        phases["repair"] = _repair(facts, answered)
    phases["training"] = _training(facts, answered)
    phases["saving"] = {"save": facts.saved_itemsize * facts.student.parameters / 1e6}
    worst = 4 * scoring(facts.student, min(WORST, main.held_out), main.prompt, main.answer * answered)
    again = {"load": facts.student.parameters / 1e6, "judge": worst, "report": 1.0}
    phases["measuring"] = _summed(again, _measured(facts, answered))
    return phases


def _training(facts: Facts, answered: float) -> dict[str, float]:
    student, steps = facts.student, facts.steps
    rounds = math.ceil(steps / facts.updates) if facts.updates else steps
    work = {
        "decode": 0.0,
        "forward": 0.0,
        "judge": 0.0,
        "answer": 0.0,
        "backward": 0.0,
        "update": steps * facts.trained / 1e6,
        "save": facts.checkpoints * disk_of(facts).checkpoint / 1e6,
    }
    for stream in facts.streams:
        rows = round(stream.rows * stream.on_policy * facts.updates)
        work["decode"] += rounds * decoding(student, rows, stream.answer, stream.prompt, facts.device)
        work["answer"] += decoding(_healthy(facts), stream.pool, stream.answer, stream.shown, facts.device)
        answer = stream.answer * answered
        ours = scoring(student, stream.rows, stream.prompt, answer)
        theirs = scoring(facts.reference or student, stream.rows, stream.shown, answer) if stream.scored else 0.0
        work["forward"] += steps * (ours + theirs)
        work["backward"] += steps * ours * (3 if facts.recomputes else 2)
        work["judge"] += facts.evaluations * scoring(student, stream.held_out, stream.prompt, answer)
    return work


def _healthy(facts: Facts) -> Size | None:
    """What answers and scores as the reference: its own model or, as a view of it, the student; None where answers are
    stored."""
    return facts.reference or (facts.student if facts.streams[0].scored else None)


def _measured(facts: Facts, answered: float) -> dict[str, float]:
    """One model on the held-out prompts: the reference's answers and its own, which both models score."""
    main, student = facts.streams[0], facts.student
    once = scoring(student, main.held_out, main.prompt, main.answer * answered)
    theirs = scoring(_healthy(facts), main.held_out, main.prompt, main.answer * answered)
    own = decoding(student, main.held_out, main.answer, main.prompt, facts.device)
    shown = decoding(student, min(SAMPLES_SHOWN, main.held_out), main.answer, main.prompt, facts.device)
    return {"answer": own + shown, "judge": 2 * (once + theirs)}


def _repair(facts: Facts, answered: float) -> dict[str, float]:
    main, student, reference = facts.streams[0], facts.student, _healthy(facts)
    length = facts.repair_answer * (1.0 if facts.repair_given else answered)
    asked = 0 if facts.repair_given else facts.repair
    tokens = min(facts.repair_rows, facts.repair * (facts.repair_prompt + length))
    return {
        "decode": decoding(reference, asked, facts.repair_answer, facts.repair_prompt, facts.device),
        "judge": scoring(student, main.held_out + FITTED, main.prompt, main.answer * answered)
        + scoring(reference, FITTED, facts.repair_prompt, length),
        "walk": walking(student, reference, tokens),
        "solve": solving(student),
    }


def walking(student: Size, teacher: Size | None, tokens: float) -> float:
    """10⁹ multiplications that grow with the calibration text."""
    passes = REPAIR_LOOKS * student.active + (teacher.active if teacher else 0)
    return 2e-9 * tokens * (passes + student.grams + student.matrices)


def solving(student: Size) -> float:
    """10⁹ multiplications of a student's closed-form solutions, which its size alone settles."""
    return 1e-9 * student.fits


def decoding(size: Size | None, rows: int, tokens: float, prompt: float, device: str) -> float:
    """10⁹ multiplications of sampling so many tokens a row: passes of at most BATCH rows, and the prompts once."""
    if size is None or rows <= 0:
        return 0.0
    passes = math.ceil(rows / BATCH)
    each = size.active + size.vocabulary * size.width
    read = passes * READING.get(device, READING["cpu"])
    return 2e-9 * (tokens * each * (rows + read) + rows * prompt * size.active)


def scoring(size: Size | None, rows: int, prompt: float, answer: float) -> float:
    """10⁹ multiplications of scoring so many answers after their prompts; logits at the answers alone."""
    if size is None:
        return 0.0
    return 2e-9 * rows * ((prompt + answer) * size.active + answer * size.vocabulary * size.width)


def _summed(*works: Work) -> dict[str, float]:
    kinds = dict.fromkeys(kind for work in works for kind in work)
    return {kind: sum(work.get(kind, 0.0) for work in works) for kind in kinds}


def seconds_of(work: Work, costs: Work = COST) -> float:
    """How long work takes, by seconds a unit of each kind."""
    return sum(units * costs[kind] for kind, units in work.items())
