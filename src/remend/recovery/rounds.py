"""Which completions a step takes: the student's own answers to each stream's next prompts, or its teacher's.

Everything follows from the run's seed and the position in the run, so a resumed run and one that is shared by several
processes take the same completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from remend.data.order import Order, derive_seed
from remend.data.templates import Encoded
from remend.models.sampling.rollout import Rollout, Sampler
from remend.recovery.streams import RECOVER, Stream
from remend.training.teachers import Teacher


@dataclass(frozen=True)
class Source:
    """A stream at work.

    Args:
        stream: its settings.
        teacher: scores its completions.
        order: which prompts come when; None for a stream whose teacher brings all completions.
        rows: prompts per step, all processes together.
        pool: the teacher's completions, where some are trained on.
    """

    stream: Stream
    teacher: Teacher
    order: Order[Encoded] | None
    rows: int
    pool: Order[Rollout] | None = None

    def seed(self, seed: int, purpose: str, at: int) -> int:
        """Of one draw: settled by the run's seed, the stream and the position in the run, and nothing else."""
        name = () if self.stream.name == RECOVER else (self.stream.name,)
        return derive_seed(seed, purpose, *name, at)

    def trained_tokens(self, rollout: Rollout) -> int:
        """How many tokens of a completion are trained on."""
        return max(0, len(rollout.completion) - self.stream.skip_first)

    def own(self, seed: int, at: int) -> bool:
        """Whether the completion at this position is the student's: settled by seed and position (GKD's λ)."""
        share = self.stream.on_policy
        return share == 1.0 or (share > 0.0 and self.seed(seed, "policy", at) / 2**63 < share)


@dataclass
class Rounds:
    """One round of sampling feeds several steps: what the student samples, it samples at once.

    Args:
        sources: the streams.
        sampler: samples from the student as it is served now.
        steps: over which lengths grow.
        seed: of the run.
        precision: context of the sampling; entered many times.
        updates: steps that one round feeds.
        ends: steps at which a round ends in any case; the last is the run's. Without them it is `steps`.
        process, processes: this process's turn when several share a step.
    """

    sources: Sequence[Source]
    sampler: Sampler
    steps: int
    seed: int
    precision: AbstractContextManager[object]
    updates: int = 1
    ends: Sequence[int] = ()
    process: int = 0
    processes: int = 1
    _ahead: dict[int, list[list[Rollout]]] = field(default_factory=dict, init=False)

    def begins_at(self, step: int) -> bool:
        """Whether `step` asks for a new round."""
        return step not in self._ahead

    def sample(self, first: int, *, on_policy: bool) -> None:
        """Fill the round that begins at step `first`.

        A length that grows stays what it is at the first step: each length more would be another pass of decoding.
        Until `on_policy`, all streams take their pool's completions.
        """
        end = min((end for end in self.ends if end >= first), default=self.steps)
        steps = range(first, min(first + self.updates, end + 1))
        taken: dict[tuple[int, int, int], Rollout] = {}
        asked: dict[tuple[int, float], list[tuple[tuple[int, int, int], Encoded, int]]] = {}
        for step in steps:
            turn = self.process
            for number, source in enumerate(self.sources):
                start = (step - 1) * source.rows
                mine = range(start, start + source.rows)[turn % self.processes :: self.processes]
                turn -= source.rows  # the next stream's first row is the next process's
                for at in mine:
                    if source.order is None or not on_policy or not source.own(self.seed, at):
                        assert source.pool is not None
                        taken[step, number, at] = source.pool.take(at, 1)[0][1]
                        continue
                    how = (source.stream.length_at(first, self.steps), source.stream.temperature)
                    prompt, draw = source.order.take(at, 1)[0][1], source.seed(self.seed, "rollout", at)
                    asked.setdefault(how, []).append(((step, number, at), prompt, draw))
        for (length, temperature), wanted in asked.items():
            with self.precision:
                rollouts = self.sampler(
                    [prompt for _, prompt, _ in wanted],
                    max_new_tokens=length,
                    temperature=temperature,
                    seeds=[seed for *_, seed in wanted],
                )
            taken |= {key: rollout for (key, *_), rollout in zip(wanted, rollouts, strict=True)}
        keys = sorted(taken)
        self._ahead = {
            step: [[taken[k] for k in keys if k[:2] == (step, number)] for number in range(len(self.sources))]
            for step in steps
        }

    def take(self, step: int) -> list[list[Rollout]]:
        """The completions of a step, by source."""
        return self._ahead.pop(step)
