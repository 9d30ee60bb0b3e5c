"""What fits where, said before a file is there: a model's shape, a GPU's memory, and what training would hold.

The arithmetic is `footprint`'s, which `remend check` prints of a recipe whose files are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from remend.compression.formats import GridFormat
from remend.compression.packed_linear import packed_bytes
from remend.errors import InputError, shortened
from remend.models.device import rows_within
from remend.models.shapes import SHAPES, Shape, shape_named, shape_of
from remend.recovery.calibration_text import MOST_ROWS
from remend.recovery.calibration_text import TOKENS as REPAIR_TOKENS
from remend.recovery.estimate import BATCH, Facts, FrozenBase, StreamWork, Train
from remend.recovery.footprint import Memory, loaded_bytes, moment_bytes, moments_of
from remend.recovery.memory import activation_bytes
from remend.recovery.rows_at_once import rows_at_once

GB = 10**9
"""Bytes."""

WAYS: tuple[Train, ...] = ("all", "scales", "norms", "adapter")
"""What can be trained."""

RANK, HELD_OUT, PROMPTS = 16, 64, 8
"""Of an adapter; prompts that measure a run; prompts of a step."""

FEW_SAMPLES = 64
"""Answers of a repair that is to take less memory."""

LEFT = 0.05
"""Of a GPU that is left for its driver and for what torch's allocator can't use."""

LEAST, MOST = 1_000_000, 10**13
"""Parameters."""


@dataclass(frozen=True)
class Wish:
    """What is asked about.

    format: of the student's grid; None for one that is held to nothing.
    prompt, answer: tokens of the longest prompt, and of its answer at most.
    batch, samples: prompts of a micro-batch; answers that repair is fitted to.
    """

    shape: Shape
    capacity: int
    device: str
    gpus: int
    format: GridFormat | None
    prompt: int
    answer: int
    batch: int
    samples: int


@dataclass(frozen=True)
class Way(Memory):
    """One way of training: what it holds by phase and kind, with which settings; and whether that fits.

    host: bytes that a GPU's run holds in the machine's memory beside its files, of the optimizer's moments.
    """

    train: Train
    settings: Sequence[str]
    fits: bool
    host: int = 0

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass(frozen=True)
class WhatFits:
    """The answer: of each way of training what it takes.

    taken: what stands for the model, in words. asked: with the settings that were asked for; found: with those that
    make it fit, or come nearest. advice: what would fit where nothing does. repair: a repair alone, whose blocks come
    one by one from the disk; None for a student that is held to nothing.
    """

    wish: Wish
    taken: str
    asked: Sequence[Way]
    found: Sequence[Way]
    advice: Sequence[str]
    repair: Way | None = None

    @property
    def fits(self) -> bool:
        """Whether any way does."""
        return any(way.fits for way in self.found)


def plan(
    *,
    shape: str | None = None,
    params: str | int | None = None,
    gpu: float | None = None,
    memory: float | None = None,
    gpus: int = 1,
    format: str = "int4-g64",
    prompt_tokens: int = 256,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    repair_samples: int = 600,
) -> WhatFits:
    """What a recovery of a model would hold in memory, phase by phase, and which settings fit.

    Args:
        shape: a known model's name, such as Qwen2.5-7B. Or
        params: how many parameters it has, as 7b, 1.5b, 135m or a number.
        gpu: GB (10⁹ bytes) of one GPU. Or
        memory: GB of a CPU's memory.
        gpus: how many such GPUs share the prompts of a step.
        format: the grid that the student lies on; dense for one that is held to nothing.
        prompt_tokens: of the longest prompt.
        max_new_tokens, batch_size, repair_samples: as in a recipe.

    Raises:
        InputError: an unknown shape or format, or a number that can't be.
    """
    if (shape is None) == (params is None):
        raise InputError("give the model either by --shape, such as Qwen2.5-7B, or by --params, such as 7b")
    if (gpu is None) == (memory is None):
        raise InputError("give either --gpu, the GB of one GPU such as 80, or --memory, the GB that a CPU has")
    capacity = _gigabytes("--gpu", gpu) if gpu is not None else _gigabytes("--memory", memory or 0.0)
    numbers = {"--gpus": gpus, "--prompt-tokens": prompt_tokens, "--max-new-tokens": max_new_tokens}
    for name, number in {**numbers, "--batch-size": batch_size, "--repair-samples": repair_samples}.items():
        if number < 1:
            raise InputError(f"{name} is {number}; allowed is a whole number from 1 on")
    if gpus > 1 and gpu is None:
        raise InputError("--gpus counts GPUs; give --gpu, the GB of one of them")
    if gpus > PROMPTS:
        raise InputError(
            f"{gpus} GPUs share the prompts of a step, of which there are {PROMPTS}; give --gpus {PROMPTS}"
        )
    if shape is not None:
        chosen, taken = shape_named(shape), ""
    else:
        chosen, taken = shape_of(_parameters(params if params is not None else ""))
    grid = None if format == "dense" else GridFormat.parse(format)
    wish = Wish(
        chosen,
        capacity,
        "cuda" if gpu is not None else "cpu",
        gpus,
        grid,
        prompt_tokens,
        max_new_tokens,
        batch_size,
        repair_samples,
    )
    ways = [train for train in WAYS if train != "scales" or grid]
    asked = [_way(wish, _facts(wish, train), []) for train in ways]
    found = [_fitted(wish, train) for train in ways]
    advice = [] if any(way.fits for way in found) else _what_would(wish, found)
    return WhatFits(wish, taken, asked, found, advice, _repaired_alone(wish) if grid else None)


def _gigabytes(name: str, given: float) -> int:
    if not math.isfinite(given) or not 0 < given <= 1e6:
        raise InputError(f"{name} is {given:g}; allowed is a number of GB above 0 and up to 1,000,000, such as 80")
    return round(given * GB)


def _parameters(given: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:[._]?\d+)*)\s*([kmbt]?)", str(given).strip().lower())
    try:
        unit = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
        count = round(float(match[1].replace("_", "")) * unit[match[2]]) if match else 0
    except (ValueError, OverflowError):
        count = 0
    if not LEAST <= count <= MOST:
        raise InputError(
            f'--params is "{shortened(given, 40)}"; allowed is a number of parameters from 1m to 10t, such as 135m, '
            "1.5b, 7b or 7615616512"
        )
    return count


def _facts(wish: Wish, train: Train) -> Facts:
    """The facts of a run as it would be with a recipe's defaults."""
    shape, size = wish.shape, wish.shape.size
    on_gpu = wish.device == "cuda"
    itemsize = 2 if on_gpu else 4
    rows = math.ceil(PROMPTS / wish.gpus)
    codes = size.matrices if wish.format else 0
    vectors = size.vectors
    groups = _groups_of(wish)
    per_group = 1 + bool(wish.format and wish.format.zero is not None)
    trained = {
        "all": size.parameters - (size.embeddings if wish.format else 0),
        "scales": vectors + groups * per_group,
        "norms": vectors,
        "adapter": RANK * size.sides,
    }[train]
    free = wish.capacity - (4 + itemsize) * size.parameters
    stream = StreamWork(
        name="recover",
        rows=rows,
        prompt=float(wish.prompt),
        longest=wish.prompt,
        shown=float(wish.prompt),
        answer=wish.answer,
        held_out=HELD_OUT,
    )
    batch = min(wish.batch, rows)
    return Facts(
        student=size,
        reference=size,
        streams=[stream],
        device=wish.device,
        itemsize=itemsize,
        reference_itemsize=itemsize,
        by_block=False,
        reference_by_block=False,
        mapped=False,
        reference_mapped=False,
        steps=40,
        evaluations=0,
        checkpoints=4,
        saved_checkpoints=3,
        updates=2,
        rows_at_once=BATCH,
        batch=batch,
        micro_batches=math.ceil(rows / batch),
        recomputes=False,
        train=train,
        codes=codes,
        scales=4 * groups * per_group,
        base=_base(wish, groups) if train == "adapter" else None,
        trained=trained,
        held=codes if train == "all" else 0,
        head_trained=train == "all" and not wish.format,
        optimizer="adamw",
        copies=0,
        averages=False,
        repair=wish.samples if wish.format and train != "adapter" else 0,
        repair_prompt=float(wish.prompt),
        repair_answer=REPAIR_TOKENS,
        repair_rows=MOST_ROWS,
        repair_given=False,
        written=0,
        best=False,
        saved_itemsize=4,
        activation=activation_bytes(shape, 1, 1, itemsize, train),
        chunk=rows_within(size.vocabulary, max(0, free) if on_gpu else 0),
    )


def _sampled_together(wish: Wish, facts: Facts) -> Facts:
    """With as many rows at once as a run would take where the capacity is free."""
    return replace(facts, rows_at_once=rows_at_once(facts, wish.capacity - loaded_bytes(facts)))


def _repaired_alone(wish: Wish) -> Way:
    """A repair without steps, with the blocks of both models on the disk; on fewer answers where it must."""
    facts = replace(_facts(wish, "all"), by_block=True, reference_by_block=True, steps=0)
    settings = ["steps: 0", "placement: disk"]
    way = _way(wish, facts, settings)
    return way if way.fits else _way(wish, _on_few(facts), [*settings, FEWER])


def _base(wish: Wish, groups: int) -> FrozenBase:
    """Under an adapter: codes, or else numbers of files in bfloat16. The teacher has files of its own."""
    numbers, fmt = wish.shape.size.matrices, wish.format
    held = packed_bytes(fmt, wish.shape.hidden_size, numbers, groups) if fmt else 2 * numbers
    return FrozenBase(numbers, held, packed=fmt is not None, shared=False)


def _groups_of(wish: Wish) -> int:
    """Groups of weights that share a scale."""
    if wish.format is None:
        return 0
    group, layers = wish.format.group, wish.shape.num_hidden_layers
    return layers * sum(rows * (math.ceil(columns / group) if group else 1) for rows, columns in wish.shape.groups)


def _way(wish: Wish, facts: Facts, settings: Sequence[str]) -> Way:
    facts = _sampled_together(wish, facts)
    by_phase = moments_of(facts)
    peak = max(sum(held.values()) for held in by_phase.values())
    host = 8 * facts.trained - moment_bytes(facts) if facts.optimizer == "adamw-host" else 0
    return Way(by_phase, facts.train, settings, peak <= _room(wish), host)


def _one_by_one(facts: Facts) -> Facts:
    return replace(facts, batch=1, micro_batches=sum(stream.rows for stream in facts.streams))


def _on_few(facts: Facts) -> Facts:
    return replace(facts, repair=min(facts.repair, FEW_SAMPLES))


def _on_host(facts: Facts) -> Facts:
    return replace(facts, optimizer="adamw-host")


FEWER, NONE, HOST = f"repair_samples: {FEW_SAMPLES}", "repair: false", "optimizer: adamw-host"

LIGHTER: Sequence[tuple[str, str, Callable[[Facts], Facts]]] = (
    ("gradient_checkpointing: true", "training", lambda facts: replace(facts, recomputes=True)),
    ("batch_size: 1 with gradient_accumulation", "training", _one_by_one),
    ("updates_per_rollout: 1", "sampling", lambda facts: replace(facts, updates=1)),
    (HOST, "training", _on_host),
    (HOST, "sampling", _on_host),
    (FEWER, "repair", _on_few),
    (NONE, "repair", lambda facts: replace(facts, repair=0)),
)
"""Settings that take less memory, the phase that each is for, and what it does; a phase's dearer one comes last."""


def _fitted(wish: Wish, train: Train) -> Way:
    """The way with as few settings as make it fit; where none do, with those that help."""
    facts = _facts(wish, train)
    way, room = _way(wish, facts, []), _room(wish)
    for setting, phase, changed in LIGHTER:
        if way.phases.get(phase, 0) <= room:
            continue
        kept = [own for own in way.settings if own != FEWER or setting != NONE]
        lighter = _way(wish, changed(facts), [*kept, setting])
        if lighter.phases.get(phase, 0) < way.phases[phase]:
            facts, way = changed(facts), lighter
    return way


def _room(wish: Wish) -> int:
    """Bytes that a recovery may take."""
    return round(wish.capacity * (1 - LEFT)) if wish.device == "cuda" else wish.capacity


def _what_would(wish: Wish, found: Sequence[Way]) -> list[str]:
    """What would fit where nothing does: more memory, a teacher on a disk, a smaller model."""
    needed, least = min((_enough(wish, way.train) for way in found), key=lambda each: each[0])
    where = "one GPU" if wish.device == "cuda" else "memory"
    how = ", ".join([f"train: {least.train}" if least.train != "adapter" else "an adapter (lora)", *least.settings])
    advice = [f"{needed} GB of {where}, with {how}"]
    if wish.device == "cuda":
        on_cpu = replace(wish, device="cpu", gpus=1, capacity=10**15)
        host = min((_way(on_cpu, _facts(on_cpu, way.train), []) for way in found), key=lambda way: way.peak)
        advice.append(f"a CPU with {math.ceil(host.peak / GB)} GB of memory, slowly")
    stored = [_without_teacher(wish, way.train) for way in found]
    lightest = min(stored, key=lambda way: way.peak)
    what = (
        f"a teacher whose answers and scores are stored (remend cache-teacher, policy: off): {lightest.peak / GB:.0f}"
    )
    advice.append(f"{what} GB{'' if lightest.fits else ', which does not fit either'}")
    smaller = [
        shape for shape in _by_size() if any(_fitted(replace(wish, shape=shape), way.train).fits for way in found)
    ]
    if smaller:
        advice.append(f"a smaller model: of the known shapes {smaller[0].name} is the largest that fits")
    return advice


def _enough(wish: Wish, train: Train) -> tuple[int, Way]:
    """The GB that suffice for a way of training, and the way with them: chunks of logits grow with what is free."""
    needed, way = math.ceil(wish.capacity / GB), _fitted(wish, train)
    while not way.fits:
        needed = max(needed + 1, math.ceil(way.peak * wish.capacity / _room(wish) / GB))
        way = _fitted(replace(wish, capacity=needed * GB), train)
    return needed, way


def _without_teacher(wish: Wish, train: Train) -> Way:
    facts = _facts(wish, train)
    (stream,) = facts.streams
    stored = replace(stream, on_policy=0.0, scored=False)
    return _way(wish, _one_by_one(replace(facts, reference=None, streams=[stored], repair=0, recomputes=True)), [])


def _by_size() -> Iterator[Shape]:
    yield from sorted(SHAPES, key=lambda shape: -shape.size.parameters)
