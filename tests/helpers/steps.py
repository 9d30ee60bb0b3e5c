"""A recovery's step function on tiny models, without a run: fixed completions in place of sampled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from transformers import LlamaForCausalLM

from remend.data.order import Order
from remend.data.templates import Encoded
from remend.files.settings import build
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.distillation import Distillation
from remend.recovery.rounds import Rounds, Source
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import Stream, resolve
from remend.training.teachers import Teacher


def stream(name: str = "recover", **keys: Any) -> Stream:
    """A stream with the recipe's keys of one."""
    needed = {"student": "s", "teacher": "t", "data": "d", "out": "o", "max_new_tokens": 5}
    (resolved,) = resolve(build(RecoverConfig, {**needed, "streams": {name: keys}}, "a test"))
    return resolved


def encoded(count: int, shown: bool = False) -> list[Encoded]:
    """Prompts of rising length; `shown`: the teacher sees a longer one of its own."""
    return [
        Encoded(f"p{i}", tuple(range(3, 6 + i)), "", tuple(range(7, 20 + 2 * i)) if shown else None)
        for i in range(count)
    ]


def source(
    teacher: Teacher,
    prompts: Sequence[Encoded],
    rows: int,
    pool: Sequence[Rollout] = (),
    seed: int = 0,
    **keys: Any,
) -> Source:
    """A stream at work; `keys` are the recipe's."""
    return Source(stream(**keys), teacher, Order(prompts, seed), rows, Order(pool, 1) if pool else None)


class FixedSampler:
    """Answers with tokens that follow from the seed, and remembers of each call: completions, tokens, temperature."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, float]] = []

    def __call__(
        self, prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        self.calls.append((len(prompts), max_new_tokens, temperature))
        return [
            Rollout(p.id, p.tokens, tuple((s + i) % 300 + 3 for i in range(max_new_tokens)), True, p.shown)
            for p, s in zip(prompts, seeds, strict=True)
        ]


def distillation(
    student: LlamaForCausalLM,
    *sources: Source,
    on_policy: Callable[[int], bool] = lambda step: True,
    micro_rows: int = 3,
    steps: int = 8,
    seed: int = 0,
    checkpointing: bool = False,
    **rounds: int,
) -> Distillation:
    """The step function; `rounds` are `updates`, `process` and `processes`."""
    sampled = Rounds(sources, FixedSampler(), steps, seed, nullcontext(), **rounds)
    return Distillation(scorer(student, checkpointing=checkpointing), sampled, micro_rows, nullcontext(), on_policy)
