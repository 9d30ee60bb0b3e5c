"""A prompt with its sampled completion, and the one protocol of engines that sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from remend.data.templates import Encoded


@dataclass(frozen=True)
class Rollout:
    """A prompt with one sampled completion. `clipped` says that it met the length limit before it ended.

    `shown` is the teacher's prompt where that one sees more. `off_policy` marks the teacher's own completions.
    """

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    clipped: bool
    shown: tuple[int, ...] | None = None
    off_policy: bool = False


@dataclass(frozen=True)
class Draws:
    """How completions are drawn: the temperature, 0 being greedy, and for each prompt the seed of its draws."""

    temperature: float
    seeds: Sequence[int]


class Sampler(Protocol):
    """Completions for prompts, from the policy as it is served."""

    def __call__(
        self, prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        """One rollout a prompt, in order. Temperature 0 is greedy. A row's seed settles its draws."""
