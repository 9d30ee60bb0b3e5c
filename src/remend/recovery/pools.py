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

REPAIR_ANSWERS = "repair-answers.jsonl"


def build_sources(
    run: Run, student: Scorer, known: Mapping[str, Teacher], initial: Mapping[str, Tensor] | None
) -> list[Source]:
    """One source per stream, without pools. Streams that name one teacher share it.

    `known` are the teachers that are loaded already; the others are views of the student. `initial` are the trainable
    parameters as the student came in, where they have changed since (repair).
    """
    plan, teachers = run.plan, dict(known)
    rows = rows_of([data.stream for data in plan.streams], plan.rows * run.accelerator.num_processes)
    workplace = run.workplace(student, initial)
    sources = []
    for data in plan.streams:
        name = data.stream.teacher.name
        if name not in teachers:
            teachers[name] = at_work(plan.teachers[name], workplace)
        order = None if teachers[name].train is not None else _order(data, plan.config.seed)
        sources.append(Source(data.stream, teachers[name], order, rows[data.stream.name]))
    return sources


def _order(data: StreamData, seed: int) -> Order[Encoded]:
    name = data.stream.name
    return Order(data.train, seed if name == RECOVER else derive_seed(seed, "stream", name))


def with_pools(
    run: Run, sources: Sequence[Source], shared: int, *, bootstrapping: int, answers: Sequence[Rollout] = ()
) -> list[Source]:
    """Give the sources that need one their pool of the teacher's completions.

    A pool is sampled once per run and kept in its directory, for a resumed run and for the processes after the first.

    Args:
        bootstrapping: so many steps at the start take pools only.
        answers: what the first of the sources takes in place of a pool that would be sampled.
    """
    filled = []
    for source, data in zip(sources, run.plan.streams, strict=True):
        pool: Sequence[Rollout] | None = source.teacher.train
        if pool is None and answers and source is sources[0]:
            pool = answers
        if pool is None:
            pool = _sampled_pool(run, source, data, shared, bootstrapping)
        order = Order(pool, derive_seed(run.plan.config.seed, "pool", source.stream.name)) if pool is not None else None
        filled.append(replace(source, pool=order))
    return filled


def _sampled_pool(
    run: Run, source: Source, data: StreamData, shared: int, bootstrapping: int
) -> Sequence[Rollout] | None:
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
                shared=shared,
                draws=Draws(stream.temperature, [source.seed(config.seed, "off-policy", i) for i in range(count)]),
                shown=True,
            )
        run.directory.note_seconds("pool", time.perf_counter() - began, stream.name)
        return rollouts

    rollouts = answered_once(run.directory, f"off-policy-{stream.name}.jsonl", prompts, run.plan.tokenizer, write)
    return [replace(r, off_policy=True) for r in rollouts]


def repair_answers(run: Run, fresh: Sequence[Rollout] = ()) -> list[Rollout]:
    """The reference's completions that repair was fitted to, kept in the run's directory; none where none was kept.

    `fresh` are those of a repair that was just made; they are kept.
    """
    prompts = {p.id: p for p in run.plan.main.train}
    ids = [r.id for r in fresh] or [row["id"] for row in run.directory.rows(REPAIR_ANSWERS)]
    if not ids:
        return []
    asked = [prompts[i] for i in ids]
    rollouts = answered_once(run.directory, REPAIR_ANSWERS, asked, run.plan.tokenizer, lambda: list(fresh))
    return [replace(r, off_policy=True) for r in rollouts if r.completion]
