"""A recipe's streams, resolved: what each trains on and who teaches it.

The loss of a step is Σ weight_s · (Σ divergences of stream s) / (completion tokens of stream s); see training/loop.py.
A recipe without `streams` is one stream named `recover`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remend.data.sources import Columns
from remend.errors import InputError
from remend.files.settings import build
from remend.maths.losses import Loss, choose, of_beta
from remend.recovery.settings import RecoverConfig, StreamConfig
from remend.training.teachers import NamedTeacher, as_directory, named

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

    `teacher` is what the recipe names; `on_policy` the share of completions that the student samples; `lengths` the
    tokens per rollout at the first and the last step; `data` is None only where the teacher brings its own prompts.
    """

    name: str
    data: str | None
    teacher: NamedTeacher
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
    columns: Columns | None
    task: str | None

    def length_at(self, step: int, steps: int) -> int:
        """Tokens a rollout at `step` of `steps`, from 1: on a line from the first length to the last, which stays."""
        first, last = self.lengths
        return round(first + (last - first) * (min(step, steps) - 1) / max(1, steps - 1))


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
    if config.teacher and not named(config.teacher).healthy:
        raise InputError(
            f"teacher {config.teacher} is a view of the student, which is damaged, and recovery is measured against a "
            "healthy model: name that (or base, where the student is an adapter), and give "
            f"teacher: {config.teacher} to a stream{as_directory(config.teacher)}"
        )
    if config.teacher:
        return config.teacher
    taught_by = [named(stream.teacher) for stream in (config.streams or {}).values() if stream.teacher]
    healthy = sorted((t for t in taught_by if t.healthy), key=lambda teacher: teacher.moving)
    if healthy:
        return healthy[0].name
    raise InputError('"teacher" is missing: the healthy model that recovery is measured against')


def _missing(name: str, stream: StreamConfig, config: RecoverConfig) -> Iterator[str]:
    teacher = stream.teacher or config.teacher
    if not teacher:
        yield f'streams.{name}: "teacher" is missing (the healthy reference that scores the tokens)'
    if not (stream.data or config.data or (teacher and named(teacher).brings_prompts)):
        yield f'streams.{name}: "data" is missing (prompts: a file, a datasets id, or self)'


def _resolved(name: str, stream: StreamConfig, config: RecoverConfig) -> Stream:
    share = {"on": 1.0, "off": 0.0}.get(str(stream.policy))
    length = stream.max_new_tokens if stream.max_new_tokens is not None else config.max_new_tokens
    skip = stream.skip_first_tokens if stream.skip_first_tokens is not None else config.skip_first_tokens
    return Stream(
        name=name,
        data=stream.data or config.data,
        teacher=named(stream.teacher or config.teacher or ""),
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
        columns=config.columns if stream.columns is None else stream.columns,
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
            "prompts_per_step or batch_size"
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
