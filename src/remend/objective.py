"""Recovery by on-policy self-distillation as a step function (arXiv 2604.15794; SDFT, 2601.19897).

One step: take the next prompts, let the student answer them as it is served now, and take the divergence between the
teacher's and the student's next-token distributions at every completion token of those answers. Gradients flow
through the divergence, not through the sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from remend.losses import chunked_divergence_sum
from remend.prompts import Encoded
from remend.rollout import Order, Rollout, Sampler, derive_seed
from remend.scoring import Scorer, pack
from remend.teacher import Teacher
from remend.train import Prepared, StepOutput

STREAM = "recover"


@dataclass
class OnPolicy:
    """The step function of recovery; see the module docstring.

    Args:
        student: model as body and head; its weights are as served.
        teacher: scores the same tokens.
        sampler: samples from the student.
        order: which prompts come when.
        batch_size, accumulation: prompts a micro-batch, micro-batches a step (and process).
        beta, max_new_tokens, temperature, seed: see docs/recipe.md.
        process, processes: this process's turn when several share a step.
        precision: context of the forward passes (mixed precision over float32 weights); entered many times.
    """

    student: Scorer
    teacher: Teacher
    sampler: Sampler
    order: Order[Encoded]
    pad_id: int
    batch_size: int
    accumulation: int
    beta: float
    max_new_tokens: int
    temperature: float
    seed: int
    precision: AbstractContextManager[Any]
    process: int = 0
    processes: int = 1
    weights: Mapping[str, float] = field(default_factory=lambda: {STREAM: 1.0})

    def prepare(self, step: int) -> Prepared:
        """Sample this step's rollouts and cut them into micro-batches."""
        size = self.batch_size * self.accumulation * self.processes
        # a draw's seed is its position in the whole run, so splitting a step among processes changes no rollout
        mine = self.order.take((step - 1) * size, size)[self.process :: self.processes]
        with self.precision:
            rollouts = self.sampler(
                [prompt for _, prompt in mine],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seeds=[derive_seed(self.seed, "rollout", at) for at, _ in mine],
            )
        tokens = sum(len(r.completion) for r in rollouts)
        metrics = {
            "clipped_share": sum(r.clipped for r in rollouts) / len(rollouts),
            "completion_tokens": tokens / len(rollouts),
        }
        return Prepared(list(_cut(rollouts, self.batch_size)), {STREAM: tokens}, [r.id for r in rollouts], metrics)

    def __call__(self, micro_batch: Sequence[Rollout]) -> StepOutput:
        """Sum of the divergences at the micro-batch's completion tokens."""
        device = self.student.device
        batch = pack([(r.prompt, r.completion) for r in micro_batch], pad_id=self.pad_id, device=device)
        with self.precision:
            teacher_NE = self.teacher.hidden(micro_batch)
            student_ND = batch.gather(self.student.hidden(batch.tokens_BT))
            total = chunked_divergence_sum(
                student_ND,
                teacher_NE,
                self.student.head,
                self.teacher.head,
                beta=self.beta,
            )
        return StepOutput({STREAM: (total, len(batch.targets_N))})


def _cut(rollouts: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    for start in range(0, len(rollouts), size):
        yield rollouts[start : start + size]
