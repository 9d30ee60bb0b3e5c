"""From streams to lanes: load or build each stream's teacher, and let it write the completions that are off-policy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from remend.console import console
from remend.data.order import Order, derive_seed
from remend.data.templates import Encoded
from remend.files.run_directory import RunDirectory
from remend.models.sampling.answers import answer, kept
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.recovery.distillation import Lane
from remend.recovery.prompts import StreamData
from remend.recovery.settings import BASE, RecoverConfig
from remend.recovery.streams import RECOVER, rows_of
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import AdapterOff, Ema, Teacher, View, Weights, policy_of


def build_lanes(
    data: Sequence[StreamData],
    config: RecoverConfig,
    student: Scorer,
    known: Mapping[str, Teacher | TeacherCache],
    *,
    initial: Mapping[str, Any] | None,
    processes: int = 1,
) -> list[Lane]:
    """One lane a stream, without pools. Streams that name one teacher share it.

    Args:
        data: the streams with their prompts.
        config: the recipe.
        student: as it starts.
        known: frozen teachers and caches by name; base where that is the reference.
        initial: the trainable parameters as the student came in, where they have changed since (repair).
        processes: how many share a step.
    """
    size = config.batch_size * config.gradient_accumulation * processes
    rows = rows_of([d.stream for d in data], size)
    views: dict[str, Teacher] = {}

    def teacher_of(name: str) -> Teacher | TeacherCache:
        if name in known:
            return known[name]
        if name not in views:
            views[name] = _view(name, config, student, initial)
        return views[name]

    return [
        Lane(
            stream=d.stream,
            teacher=teacher_of(d.stream.teacher),
            order=None if d.stream.teacher in known and _cached(known[d.stream.teacher]) else _order(d, config.seed),
            rows=rows[d.stream.name],
        )
        for d in data
    ]


def _cached(teacher: object) -> bool:
    return isinstance(teacher, TeacherCache)


def _view(name: str, config: RecoverConfig, student: Scorer, initial: Mapping[str, Any] | None) -> Teacher:
    if name == "ema":
        return Ema(student, config.ema.rate, config.ema.every)
    if name == BASE:
        return AdapterOff(student)
    if name == "live":
        return View(student)
    assert name == "initial"
    weights = Weights(student)
    if initial is not None:
        weights.load(initial)
    return weights


def _order(data: StreamData, seed: int) -> Order[Encoded]:
    name = data.stream.name
    return Order(data.train, seed if name == RECOVER else derive_seed(seed, "stream", name))


def with_pools(
    lanes: Sequence[Lane],
    data: Sequence[StreamData],
    config: RecoverConfig,
    student: Scorer,
    directory: RunDirectory,
    *,
    tokenizer: Any,
    bootstrapping: int,
    answers: Sequence[Rollout] = (),
) -> list[Lane]:
    """Give the lanes that need one their pool of the teacher's completions, sampled once.

    Args:
        lanes, data, config, student: as in `build_lanes`; teachers are as at the start.
        directory: pools are kept there, for a resumed run and for the processes after the first.
        tokenizer: the student's.
        bootstrapping: so many steps at the start take pools only.
        answers: what the first of the lanes takes in place of a pool that would be sampled.
    """
    found = []
    for lane, source in zip(lanes, data, strict=True):
        if isinstance(lane.teacher, TeacherCache):
            pool = lane.teacher.train
        elif answers and lane is lanes[0]:
            pool = list(answers)
        else:
            mixed = math.ceil((config.steps - bootstrapping) * (1 - lane.stream.on_policy))
            wanted = lane.rows * (bootstrapping + mixed)
            if not wanted:
                found.append(lane)
                continue
            count = min(len(source.train), math.ceil(wanted / config.off_policy_passes))
            if wanted > count * config.off_policy_passes:
                console.print(
                    f"[yellow]warning[/]: {lane.stream.name} has {count} prompts, so each of its teacher's completions "
                    f"is trained on about {wanted / count:.0f} times, more than off_policy_passes = "
                    f"{config.off_policy_passes}; give more prompts",
                    soft_wrap=True,
                )
            pool = _pool(lane, source, count, config, student, directory, tokenizer)
        found.append(replace(lane, pool=Order(pool, derive_seed(config.seed, "pool", lane.stream.name))))
    return found


REPAIR_ANSWERS = "repair-answers.jsonl"


def repair_answers(
    directory: RunDirectory, data: StreamData, tokenizer: Any, fresh: Sequence[Rollout] = ()
) -> list[Rollout]:
    """The reference's completions that repair was fitted to, kept in the run's directory; none where none was kept.

    Args:
        directory: of the run.
        data: the stream whose prompts they answer.
        tokenizer: makes text of them to read.
        fresh: those of a repair that was just made; they are kept.
    """
    prompts = {p.id: p for p in data.train}
    ids = [r.id for r in fresh] or [row["id"] for row in directory.rows(REPAIR_ANSWERS)]
    if not ids:
        return []
    found = kept(directory, REPAIR_ANSWERS, [prompts[i] for i in ids], tokenizer, lambda: list(fresh))
    return [replace(r, off_policy=True) for r in found if r.completion]


def _pool(
    lane: Lane,
    data: StreamData,
    count: int,
    config: RecoverConfig,
    student: Scorer,
    directory: RunDirectory,
    tokenizer: Any,
) -> list[Rollout]:
    """`count` distinct prompts with the teacher's completions, from the run's directory or sampled into it."""
    stream, teacher = lane.stream, lane.teacher
    prompts = [prompt for _, prompt in Order(data.train, derive_seed(config.seed, "pool", stream.name)).take(0, count)]

    def write() -> list[Rollout]:
        assert not isinstance(teacher, TeacherCache)
        model, worn = policy_of(teacher)
        began = time.perf_counter()
        with worn:
            found = answer(
                model,
                tokenizer,
                prompts,
                f"the teacher of {stream.name} writes {count} completions",
                max_new_tokens=stream.lengths[1],
                shared=student.shared,
                temperature=stream.temperature,
                seeds=[lane.seed(config.seed, "off-policy", i) for i in range(count)],
                shown=True,
            )
        directory.note_seconds("pool", time.perf_counter() - began, stream.name)
        return found

    found = kept(directory, f"off-policy-{stream.name}.jsonl", prompts, tokenizer, write)
    return [replace(r, off_policy=True) for r in found]
