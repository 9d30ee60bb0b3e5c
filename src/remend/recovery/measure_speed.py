"""The speed of this machine for a plan, measured: its models are loaded and a step of it is taken; nothing is written.

What a unit of work costs is measured on the code that a run executes: sampling of one round, the teacher's scores and
the forward and backward pass of one micro-batch, one update, and a repair of the first blocks.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from remend.console import stage
from remend.data.examples import Example
from remend.data.templates import encode
from remend.files.run_directory import RunDirectory
from remend.models.activations.walk import Sites, Walked
from remend.models.find import hash_files
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.begin import Run, load
from remend.recovery.bootstrap import Gate
from remend.recovery.estimate import COST, decoding, scoring, solving, walking
from remend.recovery.forecast import facts_of
from remend.recovery.hold import hold
from remend.recovery.output_directory import nearest
from remend.recovery.plan import Plan
from remend.recovery.pools import build_sources
from remend.recovery.prompts import Prompts
from remend.recovery.repair import Repaired
from remend.recovery.training import step_function
from remend.training.constraints import Calibration, Constraint, kind_of
from remend.training.optimizers import OPTIMIZERS
from remend.training.teachers import Teacher

BLOCKS = 2
"""Blocks of a student that are repaired, for the speed of repair."""

FEW, MORE = 4, 32
"""Answers that they are repaired on, in two tries: what takes longer in the second grows with the text."""

T = TypeVar("T")

SHORT = 8
"""Tokens of the answers that are sampled in float32."""

WRITTEN = 64 * 2**20
"""Bytes that are written to learn how fast the disk is."""


def measured_costs(plan: Plan) -> dict[str, float]:
    """Seconds of a unit of each kind of work, see `estimate.KINDS`, on this machine with this plan's models."""
    costs = {**COST, "start": plan.checked_in}
    with tempfile.TemporaryDirectory() as place:
        run = Run(plan, RunDirectory(Path(place)), Accelerator(cpu=plan.device.type == "cpu"), None, _prompts(plan))
        with stage("measuring: loading the models"):
            began = time.perf_counter()
            student, teachers = load(run)
            files = [plan.student, *(t.source for t in plan.teachers.values() if t.source)]
            for source in files:
                hash_files(source)
            loaded = plan.parameters + (plan.reference_size.parameters if plan.reference_size else 0)
            costs["load"] = (time.perf_counter() - began) / (loaded / 1e6)
        reference = teachers[plan.reference]
        constraint = hold(run, student, reference, Repaired())
        answers = _step(run, student, teachers, constraint, costs)
        del constraint
        if plan.repairs and reference.model is not None and answers:
            _repair(run, student, reference.model, answers, costs)
        costs["save"] = _writing(nearest(plan.config.out))
    return costs


def _prompts(plan: Plan) -> Prompts:
    """The plan's prompts; of a stream whose prompts are not written yet, texts that stand for them."""
    stand_in = encode(plan.tokenizer, Example("any", "What is the largest city of the country that you know best?", {}))
    streams = [
        replace(data, train=[replace(stand_in, id=f"any {i}") for i in range(2 * plan.rows)])
        if data.unwritten
        else data
        for data in plan.prompts.streams
    ]
    return Prompts(tuple(streams))


def _step(
    run: Run, student: CausalLM, teachers: Mapping[str, Teacher], constraint: Constraint, costs: dict[str, float]
) -> Sequence[Rollout]:
    """One round of sampling, and one micro-batch with its update; the completions."""
    plan, facts = run.plan, facts_of(run.plan)
    parts = scorer(student, plan.shared, checkpointing=facts.recomputes)
    sources = build_sources(run, parts, teachers, None)
    sampled = [source for source in sources if source.order is not None and source.stream.on_policy]
    if not sampled:
        return []
    gate = Gate("off", 0, None, run.directory, run.accelerator)
    distillation = step_function(
        run, parts, [replace(s, stream=replace(s.stream, on_policy=1.0)) for s in sampled], gate
    )
    with stage("measuring: one step"):
        first = [prompt for _, prompt in sampled[0].order.take(0, 1)] if sampled[0].order else []
        with distillation.precision:  # the first answer of a model takes longer: it is tried out
            distillation.rounds.sampler(first, max_new_tokens=2, temperature=1.0, seeds=[0])
        prepared, seconds = _timed(lambda: distillation.prepare(1), plan.device)
        works, worked = {work.name: work for work in facts.streams}, 0.0
        for source in sampled:
            work = works[source.stream.name]
            rows = source.rows * min(facts.updates, facts.steps or 1)
            worked += decoding(facts.student, rows, source.stream.length_at(1, facts.steps), work.prompt, facts.device)
        costs["decode"] = seconds / worked
        source, rollouts = prepared.micro_batches[0]
        tokens = sum(len(r.completion) for r in rollouts) / len(rollouts)
        asked = sum(len(r.prompt) for r in rollouts) / len(rollouts)
        ours = scoring(facts.student, len(rollouts), asked, tokens)

        def score() -> object:
            with distillation.precision:
                return source.teacher.score(rollouts)

        def learn() -> None:
            output = distillation((source, rollouts))
            for total, count in output.sums.values():
                torch.autograd.backward(total / count)

        theirs = scoring(facts.reference or facts.student, len(rollouts), asked, tokens)
        learn()
        _, scored = _timed(score, plan.device)
        costs["forward"] = scored / theirs
        _, learned = _timed(learn, plan.device)
        backward = ours * (3 if facts.recomputes else 2)
        costs["backward"] = max(learned - costs["forward"] * (ours + theirs), 0.1 * learned) / backward
        costs |= {"answer": costs["decode"], "judge": costs["forward"]}
        if plan.dtype != torch.float32:
            prompts = [prompt for _, prompt in source.order.take(0, len(rollouts))] if source.order else []
            sampler, seeds = distillation.rounds.sampler, list(range(len(prompts)))
            _, spent = _timed(lambda: sampler(prompts, max_new_tokens=SHORT, temperature=1.0, seeds=seeds), plan.device)
            costs["answer"] = spent / decoding(facts.student, len(prompts), SHORT, asked, facts.device)
            _, spent = _timed(lambda: source.teacher.score(rollouts), plan.device)
            costs["judge"] = spent / theirs
        costs["update"] = _update(constraint, plan.config.optimizer, plan.device) / (facts.trained / 1e6)
    return rollouts


def _update(constraint: Constraint, name: str, device: torch.device) -> float:
    """Seconds of one update: AdamW over the masters, as the recipe's optimizer, and the constraint."""
    group = {"params": list(constraint.masters().values()), "weight_decay": 0.0}
    optimizer = OPTIMIZERS.get(name).make([group], 1e-9)

    def update() -> None:
        constraint.take_gradients()
        optimizer.step()
        constraint.project()

    update()
    return _timed(update, device)[1]


class _Enough(Exception):
    """Ends a repair after the first blocks."""


@dataclass(frozen=True)
class _FirstBlocks(Calibration):
    """A calibration whose walk ends after BLOCKS blocks, and notes when each begins."""

    began: list[float] | None = None

    def walk(
        self, student: CausalLM, visit: Callable[[Sites], None], title: str, layer_map: Sequence[int] | None = None
    ) -> Walked:
        """See Calibration."""
        assert self.began is not None
        times, seen = self.began, set[int]()

        def noted(sites: Sites) -> None:
            if sites.index not in seen:
                seen.add(sites.index)
                times.append(time.perf_counter())
            if len(seen) > BLOCKS:
                raise _Enough
            visit(sites)

        return super().walk(student, noted, "measuring: repair of the first blocks", layer_map)


def _repair(
    run: Run, student: CausalLM, teacher: CausalLM, answers: Sequence[Rollout], costs: dict[str, float]
) -> None:
    """Repair the first blocks on few answers and on more; the student is of no use afterwards."""
    plan, facts, kind = run.plan, facts_of(run.plan), kind_of(run.plan.facts)
    if next(teacher.parameters()).dtype != torch.float32:
        teacher = copy.deepcopy(teacher).to(torch.float32)
    seconds: list[float] = []
    tokens: list[int] = []
    for count in (FEW, MORE):
        text = [answers[i % len(answers)] for i in range(count)]
        times: list[float] = []
        with suppress(_Enough):
            kind.repair(student, plan.facts, _FirstBlocks(teacher, text, run.precision(), began=times))
        if len(times) < 2:
            return  # a student of one block: what it costs is left to the guess
        seconds.append((times[-1] - times[0]) / (len(times) - 1))
        tokens.append(sum(len(r.prompt) + len(r.completion) for r in text))
    grown = walking(facts.student, facts.reference, tokens[1] - tokens[0])
    layers = facts.student.layers
    costs["walk"] = max(layers * (seconds[1] - seconds[0]), 0.0) / grown
    rest = layers * seconds[0] - costs["walk"] * walking(facts.student, facts.reference, tokens[0])
    costs["solve"] = max(rest, 0.0) / solving(facts.student)


def _writing(place: Path) -> float:
    """Seconds of writing 10⁶ bytes."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began = time.perf_counter()
            file.write(bytes(WRITTEN))
            file.flush()
            return (time.perf_counter() - began) / (WRITTEN / 1e6)
    except OSError:
        return COST["save"]


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What it gives, and how long it takes until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    done = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done, time.perf_counter() - began
