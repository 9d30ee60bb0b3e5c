"""A recipe's streams, resolved: what each trains on and who teaches it.

The loss of a step is Σ weight_s · (Σ divergences of stream s) / (completion tokens of stream s); see training/loop.py.
A recipe without `streams` is one stream named `recover`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remend.errors import InputError
from remend.files.settings import build
from remend.maths.losses import Loss, choose, of_beta
from remend.recovery.settings import BASE, MOVING, RecoverConfig, StreamConfig
from remend.training.teachers.cache import is_cache

RECOVER = "recover"
"""Name of the stream of a recipe without streams."""


SELF_PROMPTS = 512
"""Self-written prompts at most, unless the recipe says how many."""


SKIPPED = 3
"""Completion tokens left out of the loss when the teacher sees a demonstration: it likes to open with 'Based on the
example…' (SDFT authors' code)."""


@dataclass(frozen=True)
class Stream:
    """One stream with every setting in its place.

    `teacher` is a model's or a cache's name, or one of config.MOVING; `on_policy` the share of completions that the
    student samples; `lengths` the tokens a rollout at the first and the last step; `data` None only with a cache.
    """

    name: str
    data: str | None
    teacher: str
    demonstrations: bool
    on_policy: float
    weight: float
    share: float
    loss: Loss
    top_k: int | None
    lengths: tuple[int, int]
    temperature: float
    skip_first: int
    eval_data: str | None
    held_out: int | None
    task: str | None

    @property
    def moving(self) -> bool:
        """Whether the teacher is a view of the student, and no model of its own."""
        return self.teacher in MOVING

    def length_at(self, step: int, steps: int) -> int:
        """Tokens a rollout at `step` of `steps`, from 1: on a line from the first length to the last."""
        first, last = self.lengths
        return round(first + (last - first) * (step - 1) / max(1, steps - 1))


def resolve(config: RecoverConfig) -> list[Stream]:
    """The recipe's streams. Raises InputError when a stream lacks its teacher or its data."""
    given = config.streams or {RECOVER: build(StreamConfig, {}, RECOVER)}
    problems = [p for name, stream in given.items() for p in _missing(name, stream, config)]
    if problems:
        raise InputError("\n".join(problems))
    return [_resolved(name, stream, config) for name, stream in given.items()]


def reference_of(config: RecoverConfig) -> str:
    """The healthy model that everything is measured against: the recipe's teacher, else the first stream's own.

    `base`, the student without its adapter, may be it.

    Raises InputError when there is none, or when it would move with the student.
    """
    if config.teacher in MOVING and config.teacher != BASE:
        raise InputError(
            f"teacher {config.teacher} is a view of the student, which is damaged, and recovery is measured against a "
            "healthy model: name that (or base, where the student is an adapter), and give "
            f"teacher: {config.teacher} to a stream"
        )
    if config.teacher:
        return config.teacher
    named = [stream.teacher for stream in (config.streams or {}).values() if stream.teacher]
    for teacher in (*(t for t in named if t not in MOVING), *(t for t in named if t == BASE)):
        return teacher
    raise InputError('"teacher" is missing: the healthy model that recovery is measured against')


def _missing(name: str, stream: StreamConfig, config: RecoverConfig) -> Iterator[str]:
    teacher = stream.teacher or config.teacher
    if not teacher:
        yield f'streams.{name}: "teacher" is missing (the healthy reference that scores the tokens)'
    if not (stream.data or config.data or (teacher and is_cache(teacher))):
        yield f'streams.{name}: "data" is missing (prompts: a file, a datasets id, or self)'


def _resolved(name: str, stream: StreamConfig, config: RecoverConfig) -> Stream:
    share = {"on": 1.0, "off": 0.0}.get(str(stream.policy))
    length = stream.max_new_tokens if stream.max_new_tokens is not None else config.max_new_tokens
    skip = stream.skip_first_tokens if stream.skip_first_tokens is not None else config.skip_first_tokens
    return Stream(
        name=name,
        data=stream.data or config.data,
        teacher=stream.teacher or config.teacher or "",
        demonstrations=stream.demonstrations,
        on_policy=float(stream.policy) if share is None else share,
        weight=stream.weight,
        share=stream.share,
        loss=_loss_of(stream) or _loss_of(config) or of_beta(0.0),
        top_k=config.top_k if stream.top_k is None else stream.top_k,
        lengths=(length, length) if isinstance(length, int) else (length[0], length[1]),
        temperature=config.temperature if stream.temperature is None else stream.temperature,
        skip_first=skip if skip is not None else SKIPPED if stream.demonstrations else 0,
        eval_data=config.eval_data if stream.eval_data is None else stream.eval_data,
        held_out=config.held_out if stream.held_out is None else stream.held_out,
        task=stream.task,
    )


def _loss_of(level: RecoverConfig | StreamConfig) -> Loss | None:
    if level.loss is not None:
        return choose(level.loss.name, level.loss.parameters)
    return None if level.beta is None else of_beta(level.beta)


def rows_of(streams: Sequence[Stream], size: int) -> dict[str, int]:
    """How many of a step's `size` prompts each stream gets: by share, largest remainder first, each at least one.

    Raises InputError when there are fewer prompts than streams.
    """
    if size < len(streams):
        raise InputError(
            f"a step has {size} prompts and there are {len(streams)} streams, each of which needs one; raise "
            "batch_size or gradient_accumulation"
        )
    total = sum(s.share for s in streams)
    exact = {s.name: max(1.0, size * s.share / total) for s in streams}
    rows = {name: int(value) for name, value in exact.items()}
    while sum(rows.values()) > size:  # those that were raised to 1 take from the largest
        rows[max(rows, key=lambda name: rows[name])] -= 1
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name]):
        if sum(rows.values()) < size:
            rows[name] += 1
    return rows


def asks_for_pools(config: RecoverConfig) -> bool:
    """Whether teachers may be asked for completions to begin with; repair's answers are there already."""
    return config.bootstrap in ("auto", "on")


def reuses_repair(config: RecoverConfig, streams: Sequence[Stream]) -> bool:
    """Whether training begins with repair's answers, and they are of the kind that the streams want."""
    (first, *others) = streams
    plain = not (others or first.demonstrations or first.moving) and first.on_policy == 1 and first.temperature == 1
    return config.bootstrap == "repair" and plain and first.teacher == reference_of(config)


def repair_budget(config: RecoverConfig, answers: int, processes: int) -> int:
    """Steps that so many answers serve, in whole rounds of sampling; each is trained on off_policy_passes times."""
    rows, each = config.batch_size * config.gradient_accumulation * processes, config.updates_a_round
    served = min(config.steps, config.bootstrap_steps or config.steps, config.off_policy_passes * answers // rows)
    return served if served == config.steps else served // each * each


def bootstrap_budget(config: RecoverConfig) -> int:
    """Steps of bootstrap at most; whole rounds of sampling, since the gate is asked once a round."""
    wanted, each = config.bootstrap_steps or max(1, config.steps // 3), config.updates_a_round
    return -(-wanted // each) * each
