"""What a plan asks of this machine: the facts that an estimate rests on, and the estimate with this machine's speed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from remend.compression.packed_linear import packed_bytes
from remend.data.examples import held_out_count
from remend.files.atomic import JsonObject
from remend.files.run_directory import METRICS
from remend.models.device import chunk_rows, free_bytes
from remend.models.load import maps_float32, stored_dtype
from remend.models.scorer import LEAST_OPENING
from remend.recovery.base import is_base
from remend.recovery.begin import Run
from remend.recovery.bootstrap import bootstrap_budget
from remend.recovery.calibration_text import MOST_ROWS
from remend.recovery.calibration_text import TOKENS as REPAIR_TOKENS
from remend.recovery.estimate import (
    BATCH,
    BFLOAT16,
    COST,
    WRITTEN_TOKENS,
    Disk,
    Facts,
    FrozenBase,
    StreamWork,
    Tokens,
    Train,
    disk,
    disk_of,
    seconds_of,
    tokens_of,
    work_by_phase,
)
from remend.recovery.footprint import Memory, loaded_bytes, memory_of
from remend.recovery.memory import COPY_BYTES, SHARE, STATE_BYTES
from remend.recovery.output_directory import nearest
from remend.recovery.plan import Plan
from remend.recovery.prompts import StreamData
from remend.recovery.rows_at_once import rows_at_once
from remend.recovery.settings import SELF
from remend.recovery.speeds import RecordedRun, best_of, factors_of, guessed_factor, machine_of, record, recorded
from remend.recovery.streams import SELF_PROMPTS, rows_of
from remend.training.constraints import kind_of
from remend.training.constraints.last import LAYERS
from remend.training.teachers import NamedTeacher

IN_DTYPE = ("decode", "forward", "backward", "walk")
"""Kinds of work that are done in the arithmetic's dtype; the others are in float32, or no products."""

ADAPTER_SHARE = 50
"""An adapter on some of the matrices, or one that the student brings, has one in so many parameters or so."""

WRITTEN_PROMPT = 24
"""Tokens that a prompt of the reference's has on average, beside the chat template's."""


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to ask for.

    tokens: of training. answered: how long answers are expected to be, as a share; None where no run says.
    seconds: by phase, in order. memory and free: in bytes, of the device that the run is on. disk: what is written, and
    how much is free there. source: what the times rest on, in words.
    """

    facts: Facts
    tokens: Tokens
    answered: float | None
    seconds: Mapping[str, float]
    memory: Memory
    free: int
    disk: Disk
    disk_free: int
    source: str


def forecast(plan: Plan, costs: Mapping[str, float] | None = None, source: str = "") -> Forecast:
    """The estimate of a plan.

    Args:
        plan: what would run.
        costs: seconds of a unit of work by kind, as measured on this machine (`source` says how); None takes what
            earlier runs on this machine took, and without any a guess from how fast it multiplies.
    """
    facts = facts_of(plan)
    machine = machine_of(plan.device, plan.dtype)
    runs = best_of(recorded(), machine, plan.parameters, held_by(plan))
    answered = runs[0].answered if runs else None
    work = work_by_phase(facts, answered or 1.0)
    if costs is not None:
        seconds = {phase: seconds_of(units, costs) for phase, units in work.items()}
    elif runs:
        factors = factors_of(runs)
        seconds = {phase: seconds_of(units) * factors.get(phase, factors.get("", 1.0)) for phase, units in work.items()}
        source = f"what {'a run' if len(runs) == 1 else f'{len(runs)} runs'} on this machine took"
    else:
        guessed = guessed_costs(plan)
        seconds = {phase: seconds_of(units, guessed) for phase, units in work.items()}
        source = "no run was recorded on this machine; a guess from how fast it multiplies"
    return Forecast(
        facts,
        tokens_of(facts),
        answered,
        seconds,
        memory_of(facts),
        free_bytes(plan.device),
        disk_of(facts),
        free_disk(plan.config.out),
        source,
    )


def guessed_costs(plan: Plan) -> dict[str, float]:
    """Seconds of a unit of each kind of work, by how fast this machine multiplies."""
    plain = guessed_factor(plan.device, torch.float32)
    own = plain if plan.dtype == torch.float32 else BFLOAT16 * guessed_factor(plan.device, plan.dtype)
    costs = {kind: cost * (own if kind in IN_DTYPE else plain) for kind, cost in COST.items()}
    return {**costs, "start": plan.checked_in, "save": COST["save"]}


def record_speed(run: Run, seconds: Mapping[str, float], steps: int) -> None:
    """Keep what the phases of a finished run took: in its directory, and for the next check on this machine.

    A run that several processes share says nothing of this machine alone, nor does one that ended early.
    """
    plan, directory = run.plan, run.directory
    directory.note_phases(seconds)
    rows = [row for row in directory.rows(METRICS) if "loss" in row]
    if run.accelerator.num_processes > 1 or steps < plan.config.steps:
        return
    plan = replace(plan, prompts=run.prompts)
    facts, answered = facts_of(plan), _answered(plan, rows)
    work = work_by_phase(facts, answered)
    expected = {phase: seconds_of(units) for phase, units in work.items()}
    taken = {phase: round(seconds.get(phase, 0.0), 3) for phase in expected}
    record(
        RecordedRun(
            machine_of(plan.device, plan.dtype), plan.parameters, held_by(plan), expected, taken, round(answered, 4)
        )
    )


def _answered(plan: Plan, rows: Sequence[JsonObject]) -> float:
    """Mean length of a run's completions, as a share of what they might have had; 1 for a run without steps."""
    streams, shares = plan.prompts.streams, list[float]()
    for row in rows:
        for data in streams:
            key = "completion_tokens" if len(streams) == 1 else f"{data.stream.name}/completion_tokens"
            if key in row:
                shares.append(row[key] / data.stream.length_at(row["step"], plan.config.steps))
    return min(1.0, sum(shares) / len(shares)) if shares else 1.0


def held_by(plan: Plan) -> str:
    """The kind of constraint that holds a plan's student, as rates.json names it."""
    return type(kind_of(plan.facts)).__name__


def free_disk(out: str) -> int:
    """Bytes that are free where a run would write."""
    return shutil.disk_usage(nearest(out)).free


def disk_at_most(plan: Plan) -> Disk:
    """As `disk_of`, if no embedding turns out to be the teacher's still. No device is asked for its memory."""
    config = plan.config
    return disk(
        plan.parameters,
        _trained(plan) if plan.facts.adapted or config.train != "all" else plan.parameters,
        checkpoints=min(config.keep_checkpoints + 1, _checkpoints(plan)),
        averages=any(teacher.saved for teacher in _teachers(plan)),
        best=config.selects == "best" or plan.keeps_best_apart,
        grid=sum(_grid(plan)),
    )


def _grid(plan: Plan) -> tuple[int, int]:
    """Of the student's grid: its codes, of a byte each, and the bytes of scales and zeros in float32."""
    stored = plan.facts.recognised.stored
    on_grid = list(stored.matrices.values()) if stored else []
    codes = sum(codes.numel() for codes, _ in on_grid)
    return codes, sum(4 * grid.scales.numel() * (1 + (grid.zeros is not None)) for _, grid in on_grid)


def _base(plan: Plan) -> FrozenBase | None:
    """What is frozen under the plan's adapter: codes of a grid, or else numbers in the dtype of their files."""
    if not plan.facts.adapted:
        return None
    source, stored = plan.teachers[plan.reference].source, plan.facts.recognised.stored
    shared, linear = source is not None and is_base(plan, source), plan.size.matrices - plan.size.experts
    if stored is None:
        dtype = stored_dtype(plan.student.base or plan.student)
        numbers = 0 if dtype == torch.float32 else linear
        return FrozenBase(numbers, dtype.itemsize * numbers, packed=False, shared=shared)
    on_grid = [(codes.shape[1], codes.numel(), grid.scales.numel()) for codes, grid in stored.matrices.values()]
    numbers = sum(codes for _, codes, _ in on_grid)
    held = sum(packed_bytes(stored.format, *each) for each in on_grid)
    left = min(numbers, linear)  # experts stay as they are
    return FrozenBase(left, held * left // max(1, numbers), packed=True, shared=shared)


def _trained(plan: Plan) -> int:
    """Parameters that move, as far as they are known before a weight is loaded."""
    size = plan.size
    lora = plan.config.lora
    if lora and lora.targets == "all-linear":
        return lora.rank * size.sides
    if plan.facts.adapted:
        return size.parameters // ADAPTER_SHARE
    if plan.config.train == "last":
        inside = size.parameters - size.embeddings
        return inside * min(LAYERS, size.layers) // size.layers + size.vocabulary * size.width
    if plan.config.train != "all":
        stored = plan.facts.recognised.stored if plan.config.train == "scales" else None
        grids = [grid for _, grid in stored.matrices.values()] if stored else []
        return size.vectors + sum(grid.scales.numel() * (1 + (grid.zeros is not None)) for grid in grids)
    kept = plan.facts.compressed and not plan.config.train_embeddings
    return size.parameters - (size.embeddings if kept else 0)


def _checkpoints(plan: Plan) -> int:
    every = plan.config.steps_a_checkpoint
    return math.ceil(plan.config.steps / every) if every else 0  # one is saved at the end


def _teachers(plan: Plan) -> Collection[NamedTeacher]:
    """Of all streams, each once."""
    return {s.stream.teacher.name: s.stream.teacher for s in plan.prompts.streams}.values()


def facts_of(plan: Plan) -> Facts:
    """The facts of a plan."""
    config, size, trained = plan.config, plan.size, _trained(plan)
    (codes, scales), text = _grid(plan), plan.repair_text
    train: Train = "adapter" if plan.facts.adapted else config.train
    on_cpu = plan.device.type == "cpu"
    source = plan.teachers[plan.reference].source
    copies = sum(teacher.copies for teacher in _teachers(plan))
    evaluations = config.steps // config.eval_every if config.eval_every else 0
    if config.selects == "best" and config.eval_every and config.steps % config.eval_every:
        evaluations += 1
    own = any(s.stream.data == SELF and not s.stream.teacher.brings_prompts for s in plan.prompts.streams)
    streams = streams_of(plan)
    longest = max(stream.longest + stream.answer for stream in streams)
    recomputes = config.gradient_checkpointing
    if recomputes is None:
        left = free_bytes(plan.device) - (STATE_BYTES + COPY_BYTES * copies) * trained - 8 * size.parameters
        recomputes = plan.activation * config.batch_size * longest > SHARE * left
    facts = Facts(
        student=size,
        reference=plan.reference_size,
        streams=streams,
        device=plan.device.type,
        itemsize=plan.dtype.itemsize,
        reference_itemsize=plan.dtype.itemsize if plan.device.type == "cuda" else 4,
        by_block=plan.placed.student.by_block,
        reference_by_block=plan.placed.teacher.by_block,
        mapped=on_cpu and maps_float32(plan.student),
        reference_mapped=on_cpu and source is not None and maps_float32(source),
        steps=config.steps,
        evaluations=evaluations,
        checkpoints=_checkpoints(plan),
        saved_checkpoints=min(config.keep_checkpoints + 1, _checkpoints(plan)),
        updates=config.updates_a_round,
        rows_at_once=BATCH,
        batch=min(config.batch_size, plan.rows),
        micro_batches=sum(math.ceil(stream.rows / config.batch_size) for stream in streams),
        recomputes=recomputes,
        train=train,
        codes=codes,
        scales=scales,
        base=_base(plan),
        trained=trained,
        held=codes if train == "all" else 0,
        head_trained=train == "last" or (train == "all" and (not plan.facts.compressed or config.train_embeddings)),
        optimizer=config.optimizer,
        copies=copies,
        averages=any(teacher.saved for teacher in _teachers(plan)),
        repair=plan.repair_answers if plan.repairs else 0,
        repair_prompt=text.prompt if text else streams[0].prompt,
        repair_answer=text.answer if text else REPAIR_TOKENS,
        repair_rows=MOST_ROWS,
        repair_given=text is not None,
        written=written_prompts(plan) if own else 0,
        best=config.selects == "best" or plan.keeps_best_apart,
        saved_itemsize=2 if config.save_dtype in ("bfloat16", "float16") else 4,
        activation=plan.activation,
        chunk=chunk_rows(plan.shared, plan.device),
    )
    return replace(facts, rows_at_once=rows_at_once(facts, free_bytes(plan.device) - loaded_bytes(facts)))


def written_prompts(plan: Plan) -> int:
    """How many prompts the reference would write."""
    return plan.config.self_prompts or min(SELF_PROMPTS, max(2, plan.config.steps * plan.rows))


def streams_of(plan: Plan) -> list[StreamWork]:
    """Each stream's, the one that is measured first."""
    main = plan.prompts.main
    rows = rows_of([data.stream for data in plan.prompts.streams], plan.rows)
    ordered = [main, *(data for data in plan.prompts.streams if data is not main)]
    return [_stream(plan, data, rows[data.stream.name]) for data in ordered]


def _stream(plan: Plan, data: StreamData, rows: int) -> StreamWork:
    config, stream = plan.config, data.stream
    brings = stream.teacher.brings_prompts
    prompts = [len(p.tokens) for p in data.train]
    shown = [len(p.shown or p.tokens) for p in data.train]
    held_out = len(data.held_out)
    if data.unwritten:
        total, template = written_prompts(plan), len(plan.template)
        prompts = shown = [template + WRITTEN_PROMPT]
        held_out = held_out or held_out_count(stream.held_out, total)
    bootstrapping = 0
    if config.bootstrap in ("auto", "on"):
        bootstrapping = min(config.steps, bootstrap_budget(config))
    own = 0.0 if brings else stream.on_policy * (1 - bootstrapping / config.steps if config.steps else 1)
    asked = rows * (config.steps - own * config.steps)
    most = written_prompts(plan) if data.unwritten else len(data.train)
    pool = 0 if brings else min(most, math.ceil(asked / config.off_policy_passes))
    return StreamWork(
        name=stream.name,
        rows=rows,
        prompt=fmean(prompts or [1]),
        longest=max(prompts, default=1) + (WRITTEN_TOKENS - WRITTEN_PROMPT if data.unwritten else 0),
        shown=fmean(shown or [1]),
        answer=stream.lengths[1],
        skipped=stream.skip_first,
        on_policy=own,
        pool=pool,
        held_out=held_out,
        scored=not brings,
        opening=_opening([prompt.tokens for prompt in data.train]),
    )


def _opening(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts open with, if that is enough to be run once (models.scorer)."""
    first, last = min(prompts, default=()), max(prompts, default=())
    pairs = zip(first, last, strict=False)
    length = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(last)))
    return length if length >= LEAST_OPENING else 0
