"""Recovery by self-distillation as a step function (arXiv 2604.15794; SDFT, 2601.19897), over several streams.

One step: take each stream's next prompts, let the student answer them as it is served now (or take answers that the
teacher wrote before), and take the divergence between the teacher's and the student's next-token distributions at every
completion token. Gradients flow through the divergence, not through the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from remend.data.order import batches_by_length
from remend.maths.losses import HeadTarget, chunked_loss_sum
from remend.models.device import chunk_rows
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack
from remend.recovery.rounds import Rounds, Source
from remend.training.loop import Prepared, StepOutput
from remend.training.teachers import Teacher

MicroBatch = tuple[Source, Sequence[Rollout]]


@dataclass
class Distillation:
    """The step function of recovery; see the module docstring.

    Args:
        student: model as body and head; its weights are as served.
        rounds: the completions of each step.
        micro_rows: completions per micro-batch.
        precision: context of the forward passes (mixed precision over float32 weights); entered many times.
        on_policy: says before each round, given its first step, whether the student's own completions are used yet.
    """

    student: Scorer
    rounds: Rounds
    micro_rows: int
    precision: AbstractContextManager[object]
    on_policy: Callable[[int], bool] = lambda step: True

    @property
    def weights(self) -> Mapping[str, float]:
        return {source.stream.name: source.stream.weight for source in self.rounds.sources}

    def prepare(self, step: int) -> Prepared[MicroBatch]:
        """This step's completions, cut into micro-batches."""
        if self.rounds.begins_at(step):
            self.rounds.sample(step, on_policy=self.on_policy(step))
        sources = self.rounds.sources
        each = list(zip(sources, self.rounds.take(step), strict=True))
        cut = [(source, part) for source, rollouts in each for part in _cut(rollouts, self.micro_rows)]
        tokens = {source.stream.name: sum(map(source.trained_tokens, rollouts)) for source, rollouts in each}
        means: dict[str, tuple[float, float]] = {}
        for source, rollouts in each:
            prefix = f"{source.stream.name}/" if len(sources) > 1 else ""
            means[f"{prefix}clipped_share"] = sum(r.clipped for r in rollouts), len(rollouts)
            means[f"{prefix}completion_tokens"] = sum(len(r.completion) for r in rollouts), len(rollouts)
            if source.pool:
                means[f"{prefix}on_policy"] = sum(not r.off_policy for r in rollouts), len(rollouts)
        return Prepared(cut, tokens, [r.id for _, rollouts in each for r in rollouts], means)

    def __call__(self, micro_batch: MicroBatch) -> StepOutput:
        """Sum of the divergences at the micro-batch's completion tokens."""
        source, rollouts = micro_batch
        stream, trained = source.stream, sum(map(source.trained_tokens, rollouts))
        if not trained:
            return StepOutput({})
        with self.precision:
            # in a context of its own: autocast keeps casts of a parameter, and a view of the student puts other values
            # behind the same parameters
            target = source.teacher.score(rollouts, skip_first=stream.skip_first)
            if isinstance(target, HeadTarget):
                target = replace(target, top_k=stream.top_k)
        with self.precision:
            pairs = [(r.prompt, r.completion) for r in rollouts]
            batch = pack(pairs, device=self.student.device, skip_first=stream.skip_first)
            student_ND, head = self.student.states(batch), self.student.head
            rows = chunk_rows(self.student.shared, self.student.device)
            total = chunked_loss_sum(student_ND, head, target, stream.loss, rows=rows)
        return StepOutput({stream.name: (total, trained)})

    def updated(self, step: int) -> None:
        """After the update of step `step`: teachers that follow the student follow."""
        for teacher in self._teachers():
            teacher.updated(step)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and moments."""
        return {name: value for teacher in self._teachers() for name, value in teacher.state().items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for teacher in self._teachers():
            teacher.load(saved)

    def _teachers(self) -> list[Teacher]:
        return list({id(source.teacher): source.teacher for source in self.rounds.sources}.values())


def _cut(rollouts: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    if len(rollouts) <= size:
        return [rollouts] if rollouts else []
    lengths = [len(r.shown or r.prompt) + len(r.completion) for r in rollouts]
    return [[rollouts[i] for i in batch] for batch in batches_by_length(lengths, rows=size)]
