"""From streams to sources: each stream gets its teacher, and the completions that the teacher is to write."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from remend.console import warn
from remend.data.order import Order, derive_seed
from remend.data.templates import Encoded
from remend.models.sampling.answers import answer, answered_once
from remend.models.sampling.rollout import Draws, Rollout
from remend.models.scorer import Scorer
from remend.recovery.begin import Run
from remend.recovery.prompts import StreamData
from remend.recovery.rounds import Source
from remend.recovery.streams import RECOVER, rows_of
from remend.training.teachers import Teacher, at_work


def build_sources(
    run: Run, student: Scorer, known: Mapping[str, Teacher], initial: Mapping[str, Tensor] | None
) -> list[Source]:
    """One source per stream, without pools. Streams that name one teacher share it.

    `known` are the teachers that are loaded already; the others are views of the student. `initial` are the trainable
    parameters as the student came in, where they have changed since (repair).
    """
    plan, teachers = run.plan, dict(known)
    rows = rows_of([data.stream for data in run.prompts.streams], plan.rows)
    workplace = run.workplace(student, initial)
    sources = []
    for data in run.prompts.streams:
        name = data.stream.teacher.name
        if name not in teachers:
            teachers[name] = at_work(plan.teachers[name], workplace)
        order = None if teachers[name].train is not None else _order(data, plan.config.seed)
        sources.append(Source(data.stream, teachers[name], order, rows[data.stream.name]))
    return sources


def _order(data: StreamData, seed: int) -> Order[Encoded]:
    name = data.stream.name
    return Order(data.train, seed if name == RECOVER else derive_seed(seed, "stream", name))


def sample_pools(
    run: Run, sources: Sequence[Source], *, bootstrapping: int, answers: Sequence[Rollout] = ()
) -> list[Source]:
    """Give the sources that need one their pool of the teacher's completions.

    A pool is sampled once per run and kept in its directory, for a resumed run and for the processes after the first.

    Args:
        bootstrapping: so many steps at the start take pools only.
        answers: what the first of the sources takes in place of a pool that would be sampled.
    """
    with run.accelerator.main_process_first():  # it samples the pools, the others read them
        return [
            _with_pool(run, source, data, bootstrapping, answers if number == 0 else ())
            for number, (source, data) in enumerate(zip(sources, run.prompts.streams, strict=True))
        ]


def _with_pool(run: Run, source: Source, data: StreamData, bootstrapping: int, answers: Sequence[Rollout]) -> Source:
    pool: Sequence[Rollout] | None = source.teacher.train
    if pool is None:
        pool = answers or None
    if pool is None:
        pool = _sampled_pool(run, source, data, bootstrapping)
    order = Order(pool, derive_seed(run.plan.config.seed, "pool", source.stream.name)) if pool is not None else None
    return replace(source, pool=order)


def _warn_of_more(run: Run, source: Source, count: int) -> None:
    """Added steps take the completions that were sampled for the recipe's, so that those of then stay the same."""
    first, *_, last = run.plan.ends
    more = source.rows * math.ceil((last - first) * (1 - source.stream.on_policy))
    if more:
        warn(
            f"the steps after {first} train on the {count} completions that the teacher of {source.stream.name} wrote "
            f"for those before, about {more / count:.1f} more times each; a new run from its model samples others"
        )


def _sampled_pool(run: Run, source: Source, data: StreamData, bootstrapping: int) -> Sequence[Rollout] | None:
    """As many of the teacher's completions as the source will ask for; None where it asks for none."""
    config = run.plan.config
    mixed = math.ceil((config.steps - bootstrapping) * (1 - source.stream.on_policy))
    wanted = source.rows * (bootstrapping + mixed)
    if not wanted:
        return None
    count = min(len(data.train), math.ceil(wanted / config.off_policy_passes))
    if wanted > count * config.off_policy_passes:
        warn(
            f"{source.stream.name} has {count} prompts, so each of its teacher's completions "
            f"is trained on about {wanted / count:.0f} times, more than off_policy_passes = "
            f"{config.off_policy_passes}; give more prompts"
        )
    if run.plan.segments:
        _warn_of_more(run, source, count)
    stream = source.stream
    chosen = Order(data.train, derive_seed(config.seed, "pool", stream.name)).take(0, count)
    prompts = [prompt for _, prompt in chosen]

    def write() -> list[Rollout]:
        began = time.perf_counter()
        with source.teacher.policy() as model:
            rollouts = answer(
                model,
                run.plan.tokenizer,
                prompts,
                f"the teacher of {stream.name} writes {count} completions",
                max_new_tokens=stream.lengths[1],
                shared=run.plan.shared,
                draws=Draws(stream.temperature, [source.seed(config.seed, "off-policy", i) for i in range(count)]),
                shown=True,
                rows=run.rows_at_once,
            )
        run.directory.note_seconds("pool", time.perf_counter() - began, stream.name)
        return rollouts

    rollouts = answered_once(run.directory, f"off-policy-{stream.name}.jsonl", prompts, run.plan.tokenizer, write)
    return [replace(r, off_policy=True) for r in rollouts]
