"""Recovery by self-distillation as a step function (arXiv 2604.15794; SDFT, 2601.19897), over several streams.

One step: take each stream's next prompts, let the student answer them as it is served now (or take answers that the
teacher wrote before), and take the divergence between the teacher's and the student's next-token distributions at every
completion token. Gradients flow through the divergence, not through the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remend.data.order import Order, derive_seed
from remend.data.templates import Encoded
from remend.maths.losses import HeadTarget, Target, chunked_loss_sum
from remend.models.device import chunk_rows
from remend.models.sampling.rollout import Rollout, Sampler
from remend.models.scorer import Packed, Scorer, pack
from remend.recovery.alignment import Alignment, Seen
from remend.recovery.streams import RECOVER, Stream
from remend.training.loop import Prepared, StepOutput
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import Ema, Teacher


@dataclass(frozen=True)
class Lane:
    """A stream at work.

    Args:
        stream: its settings.
        teacher: scores its completions.
        order: which prompts come when; None for a stream that samples nothing.
        rows: prompts a step, all processes together.
        pool: the teacher's completions, where some are trained on.
    """

    stream: Stream
    teacher: Teacher | TeacherCache
    order: Order[Encoded] | None
    rows: int
    pool: Order[Rollout] | None = None

    def seed(self, seed: int, purpose: str, at: int) -> int:
        """Of one draw: settled by the run's seed, the stream and the position in the run, and nothing else."""
        name = () if self.stream.name == RECOVER else (self.stream.name,)
        return derive_seed(seed, purpose, *name, at)

    def kept(self, rollout: Rollout) -> int:
        """How many tokens of a completion are trained on."""
        return max(0, len(rollout.completion) - self.stream.skip_first)


@dataclass
class Distillation:
    """The step function of recovery; see the module docstring.

    Args:
        student: model as body and head; its weights are as served.
        lanes: the streams.
        sampler: samples from the student.
        steps: of the run, for lengths that grow.
        micro_rows: completions a micro-batch.
        seed: see docs/recipe.md.
        precision: context of the forward passes (mixed precision over float32 weights); entered many times.
        updates_per_rollout: steps that one round of sampling feeds.
        on_policy: says before each round, given its first step, whether the student's own completions are used yet
            (bootstrap); until then all streams take their pool's.
        process, processes: this process's turn when several share a step.
        alignment: pulls hidden states of the first stream towards its teacher's.
    """

    student: Scorer
    lanes: Sequence[Lane]
    sampler: Sampler
    steps: int
    micro_rows: int
    seed: int
    precision: AbstractContextManager[Any]
    updates_per_rollout: int = 1
    on_policy: Callable[[int], bool] = lambda step: True
    process: int = 0
    processes: int = 1
    alignment: Alignment | None = None

    def __post_init__(self) -> None:
        self._step = 0
        self.weights: Mapping[str, float] = {lane.stream.name: lane.stream.weight for lane in self.lanes}
        self._rounds: dict[int, list[list[Rollout]]] = {}

    def prepare(self, step: int) -> Prepared[tuple[Lane, Sequence[Rollout]]]:
        """This step's completions, cut into micro-batches."""
        if step not in self._rounds:
            self._rounds = self._sample(step, min(step + self.updates_per_rollout, self.steps + 1))
        each, self._step = self._rounds.pop(step), step
        cut = [
            (lane, part) for lane, rows in zip(self.lanes, each, strict=True) for part in _cut(rows, self.micro_rows)
        ]
        tokens = {lane.stream.name: sum(map(lane.kept, rows)) for lane, rows in zip(self.lanes, each, strict=True)}
        means: dict[str, tuple[float, float]] = {}
        for lane, rows in zip(self.lanes, each, strict=True):
            prefix = f"{lane.stream.name}/" if len(self.lanes) > 1 else ""
            means[f"{prefix}clipped_share"] = sum(r.clipped for r in rows), len(rows)
            means[f"{prefix}completion_tokens"] = sum(len(r.completion) for r in rows), len(rows)
            if lane.pool:
                means[f"{prefix}on_policy"] = sum(not r.off_policy for r in rows), len(rows)
        return Prepared(cut, tokens, [r.id for rows in each for r in rows], means)

    def _sample(self, first: int, end: int) -> dict[int, list[list[Rollout]]]:
        """Completions of steps first … end − 1, by step and lane. What the student samples, it samples at once.

        A length that grows stays what it is at the first step: each length more would be another pass of decoding.
        """
        on_policy = self.on_policy(first)
        found: dict[tuple[int, int, int], Rollout] = {}
        asked: dict[tuple[int, float], list[tuple[tuple[int, int, int], Encoded, int]]] = {}
        for step in range(first, end):
            for i, lane in enumerate(self.lanes):
                start = (step - 1) * lane.rows
                for at in range(start, start + lane.rows)[self.process :: self.processes]:
                    if lane.order is None or not on_policy or not self._own(lane, at):
                        assert lane.pool is not None
                        found[step, i, at] = lane.pool.take(at, 1)[0][1]
                        continue
                    how = (lane.stream.length_at(first, self.steps), lane.stream.temperature)
                    prompt = lane.order.take(at, 1)[0][1]
                    asked.setdefault(how, []).append(((step, i, at), prompt, lane.seed(self.seed, "rollout", at)))
        for (length, temperature), wanted in asked.items():
            with self.precision:
                rollouts = self.sampler(
                    [prompt for _, prompt, _ in wanted],
                    max_new_tokens=length,
                    temperature=temperature,
                    seeds=[seed for *_, seed in wanted],
                )
            for (key, *_), rollout in zip(wanted, rollouts, strict=True):
                found[key] = rollout
        keys = sorted(found)
        return {
            step: [[found[k] for k in keys if k[:2] == (step, i)] for i in range(len(self.lanes))]
            for step in range(first, end)
        }

    def _own(self, lane: Lane, at: int) -> bool:
        """Whether the completion at this position is the student's: settled by seed and position (GKD's λ)."""
        share = lane.stream.on_policy
        return share == 1.0 or (share > 0.0 and lane.seed(self.seed, "policy", at) / 2**63 < share)

    def __call__(self, micro_batch: tuple[Lane, Sequence[Rollout]]) -> StepOutput:
        """Sum of the divergences at the micro-batch's completion tokens."""
        lane, rollouts = micro_batch
        stream = lane.stream
        trained = sum(map(lane.kept, rollouts))
        if not trained:
            return StepOutput({})
        pairs = [(r.prompt, r.completion) for r in rollouts]
        batch = pack(pairs, device=self.student.device, skip_first=stream.skip_first)
        aligned = self.alignment if lane is self.lanes[0] else None
        if aligned and aligned.due(self._step):
            # a pass of its own: the divergence's gradient can be taken once only
            total, ours, theirs = self._divergence(lane, rollouts, batch, aligned)
            aligned.balance(self._step, total / trained, ours, theirs)
        total, ours, theirs = self._divergence(lane, rollouts, batch, aligned)
        if aligned and (loss := aligned.loss(ours, theirs)) is not None:
            total = total + aligned.scale * trained * loss  # weighted as if it were a mean a token too
        return StepOutput({stream.name: (total, trained)})

    def _divergence(
        self, lane: Lane, rollouts: Sequence[Rollout], batch: Packed, aligned: Alignment | None
    ) -> tuple[Tensor, Seen, Seen]:
        """Sum over the completion tokens, and what an alignment sees of the student's and the teacher's pass."""
        stream, ours, theirs = lane.stream, Seen(), Seen()
        target: Target
        if isinstance(lane.teacher, TeacherCache):
            target = lane.teacher.targets(rollouts, skip_first=stream.skip_first).to(batch.tokens_BT.device)
        else:
            # in a context of its own: autocast keeps casts of a parameter, and a view of the student puts other values
            # behind the same parameters
            with self.precision:
                states_NE = self._taught(lane.teacher, rollouts, stream.skip_first, theirs, aligned)
                target = HeadTarget(states_NE, lane.teacher.head, stream.top_k)
        with self.precision:
            with ours.by(aligned, "student", batch):
                student_ND = _states(self.student, batch, aligned)
            rows = chunk_rows(self.student.shared, self.student.device)
            total = chunked_loss_sum(student_ND, self.student.head, target, stream.loss, rows=rows)
        return total, ours, theirs

    @torch.no_grad()
    def _taught(
        self, teacher: Teacher, rollouts: Sequence[Rollout], skip: int, seen: Seen, aligned: Alignment | None
    ) -> Tensor:
        """[N, E]: the teacher's states at the same completion tokens, after the prompts that it is shown."""
        pairs = [(r.shown or r.prompt, r.completion) for r in rollouts]
        batch = pack(pairs, device=self.student.device, skip_first=skip)
        with seen.by(aligned, "teacher", batch):
            return _states(teacher, batch, aligned)

    def updated(self, step: int) -> None:
        """After the update of step `step`: moving teachers follow."""
        for ema in self._averages():
            ema.update(step)

    def _averages(self) -> list[Ema]:
        return list({id(a): a for lane in self.lanes if isinstance(a := lane.teacher, Ema)}.values())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and moments: the moving average."""
        found = {name: value for ema in self._averages() for name, value in ema.state().items()}
        return {**found, **self.alignment.state()} if self.alignment else found

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for ema in self._averages():
            ema.load(saved)
        if self.alignment:
            self.alignment.load(saved)


def _states(model: Teacher, batch: Packed, aligned: Alignment | None) -> Tensor:
    # an alignment looks at the blocks' outputs at every position of the rows
    return batch.gather(model.hidden(batch.tokens_BT)) if aligned else model.states(batch)


def _cut(rollouts: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    # like lengths pad least; where one micro-batch holds them all, nothing is won
    if len(rollouts) > size:
        rollouts = sorted(rollouts, key=lambda r: len(r.shown or r.prompt) + len(r.completion))
    for start in range(0, len(rollouts), size):
        yield rollouts[start : start + size]
