"""When is a student ready to learn from its own answers? Until then it learns from the teacher's (bootstrap).

On-policy training needs completions that say something: a student that babbles, loops or never ends teaches itself
little, and a demonstration only helps a teacher that can learn in context. The SDFT paper (arXiv 2601.19897) advises
off-policy training first for small models. The gate measures this and says why it is open or shut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from remend.console import console
from remend.data import tasks
from remend.files.run_directory import RunDirectory
from remend.maths.gap import bootstrap_mean
from remend.models.protocols import Tokenizer
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Rollout
from remend.recovery.begin import Run
from remend.recovery.prompts import StreamData
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import Stream, reference_of
from remend.training.measure import PromptSums, negative_log_likelihoods, pool, repetition
from remend.training.teachers import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

GATE = "gate.jsonl"

EVERY = 4
"""Steps from one measurement to the next."""

KL_LIMIT = 1.5
"""Nats a token of KL(reference ‖ student) on the student's own samples, above which they are no text to learn from."""

REPEATED_LIMIT = 0.3
"""Share of 4-grams that stood in the same sample before. Like the other limits a first guess, not yet compared."""

UNENDED_LIMIT = 0.5
"""By how much more often the student's samples than the reference's answers may run into the length limit."""

GRADED_ROWS, GRADED_TOKENS = 32, 128
"""Held-out rows whose answers a task grades, and tokens per answer, at most."""


@dataclass(frozen=True)
class Verdict:
    """One measurement: `reasons` say why on-policy training should wait; none, and the gate is open."""

    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)


def judge_rollouts(own: Sequence[Rollout], sums: Sequence[PromptSums], reference: Sequence[Rollout]) -> Verdict:
    """Are the student's own samples at temperature 1 degenerate, beside the reference's answers to the same prompts?

    `sums` are the student's divergence from the reference on its samples; one length limit holds for both models.
    """
    kl = pool(sums)["kl"]
    repeated = sum(repetition(r.completion) for r in own) / len(own)
    unended = sum(r.clipped for r in own) / len(own) - sum(r.clipped for r in reference) / len(reference)
    reasons = []
    if kl > KL_LIMIT:
        reasons.append(f"KL {kl:.2f} on the student's own samples is above {KL_LIMIT}")
    if repeated > REPEATED_LIMIT:
        reasons.append(f"{repeated:.0%} of its 4-grams are repetitions, above {REPEATED_LIMIT:.0%}")
    if unended > UNENDED_LIMIT:
        reasons.append(f"its samples run into the length limit {unended:.0%} more often than the reference's answers")
    return Verdict(reasons, {"kl_on_policy": kl, "repetition": repeated, "unended": unended})


def judge_demonstrations(name: str, gains: Mapping[str, Sequence[float]], seed: int) -> Verdict:
    """Does seeing the demonstration help the teacher of stream `name`?

    `gains` are paired differences (with − without demonstration, above 0 is better) of each held-out row, by measure.
    """
    reasons, figures = [], {}
    for measure, values in gains.items():
        mean, interval = sum(values) / len(values), bootstrap_mean(values, seed=seed)
        low, high = interval or (float("-inf"), float("inf"))
        figures[f"{name}/{measure}_gain"] = mean
        if interval:
            figures |= {f"{name}/{measure}_gain_low": low, f"{name}/{measure}_gain_high": high}
        if low <= 0:
            reasons.append(
                f"demonstrations don't show to help the teacher of {name}: {measure} gain {mean:.3f} "
                f"({low:.3f} to {high:.3f} on {len(values)} rows)"
            )
    return Verdict(reasons, figures)


def likelihood_gain(teacher: Teacher, rollouts: Sequence[Rollout]) -> list[float]:
    """By how many nats per token the negative log-likelihood of each row's answer falls when the teacher sees it."""
    without, shown = (negative_log_likelihoods(teacher, rollouts, shown=s) for s in (False, True))
    return [a - b for a, b in zip(without, shown, strict=True)]


def score_gain(data: StreamData, teacher: Teacher, tokenizer: Tokenizer, shared: int, rows: int) -> list[float]:
    """Does the teacher solve more of the stream's task when it sees the row's demonstration?

    Its greedy answers to the first GRADED_ROWS held-out prompts are graded in `robust` mode: 1 for a row that is solved
    only with its demonstration, −1 for one solved only without, else 0. `rows` are answered at once.
    """
    assert data.stream.task is not None
    task, prompts = tasks.get(data.stream.task), data.held_out[:GRADED_ROWS]
    solved: list[list[bool]] = []
    with teacher.policy() as model:
        for shown in (False, True):
            title = f"the teacher of {data.stream.name} answers {'with' if shown else 'without'} demonstrations"
            length = GRADED_TOKENS
            answers = answer(
                model, tokenizer, prompts, title, max_new_tokens=length, shared=shared, shown=shown, rows=rows
            )
            texts = [tokenizer.decode(r.completion, skip_special_tokens=True) for r in answers]
            asked = [data.examples[p.id].row for p in prompts]
            pairs = zip(texts, asked, strict=True)
            solved.append([task.grade(text, row, mode="robust").correct for text, row in pairs])
    return [float(b) - float(a) for a, b in zip(*solved, strict=True)]


def reuses_repair(config: RecoverConfig, streams: Sequence[Stream]) -> bool:
    """Whether training begins with repair's answers, and they are of the kind that the streams want."""
    (first, *others) = streams
    plain = not (others or first.demonstrations or first.teacher.moving)
    alike = plain and first.on_policy == 1 and first.temperature == 1
    return config.bootstrap == "repair" and alike and first.teacher.name == reference_of(config)


def repair_budget(config: RecoverConfig, answers: int) -> int:
    """Steps that so many answers serve, in whole rounds of sampling; each is trained on off_policy_passes times."""
    rows, each = config.prompts_a_step, config.updates_a_round
    served = min(config.steps, config.bootstrap_steps or config.steps, config.off_policy_passes * answers // rows)
    return served if served == config.steps else served // each * each


def bootstrap_budget(config: RecoverConfig) -> int:
    """Steps of bootstrap at most; whole rounds of sampling, since the gate is asked once per round."""
    wanted, each = config.bootstrap_steps or max(1, config.steps // 3), config.updates_a_round
    return -(-wanted // each) * each


@dataclass
class Gate:
    """Shut while the student should learn from the teacher's completions; once open it stays open.

    mode: 'off' is open at once, 'on' opens when the budget of steps is spent, 'auto' by measurement.
    measure: makes a Verdict of the student as it is; called in the main process, which the others follow.
    directory: gets a row of each decision.
    decided: steps done at each decision, and whether it opened; a resumed run goes on from those before.
    """

    mode: str
    budget: int
    measure: Callable[[], Verdict] | None
    directory: RunDirectory
    accelerator: Accelerator
    decided: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def opened(self) -> bool:
        """Whether training is on-policy from here."""
        return self.mode == "off" or (bool(self.decided) and self.decided[-1][1])

    @property
    def bootstrapping(self) -> int:
        """How many steps at most are, or were, trained on the teacher's completions for the gate's sake."""
        shut = self.mode == "on" or not self.opened or not all(opened for _, opened in self.decided)
        return self.budget if self.mode != "off" and shut else 0

    def __call__(self, step: int) -> bool:
        """Whether step `step` (from 1) trains on the student's own completions."""
        done = step - 1
        if self.opened:
            return True
        fresh = bool(self.decided) and done - self.decided[-1][0] < EVERY
        if done < self.budget and (self.mode == "on" or fresh):
            return False
        opens = [self._decide(done)] if self.accelerator.is_main_process else [False]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(opens)
        self.decided.append((done, opens[0]))
        return opens[0]

    def _decide(self, done: int) -> bool:
        if done >= self.budget:
            row: dict[str, Any] = {"open": True, "reasons": [f"the budget of {self.budget} bootstrap steps is spent"]}
        else:
            assert self.measure is not None
            verdict = self.measure()
            row = {"open": not verdict.reasons, "reasons": verdict.reasons, **verdict.figures}
        self.directory.append(GATE, {"step": done, **row})
        why = "; ".join(row["reasons"]) or "the student's own completions can be learned from"
        state = "on-policy from here" if row["open"] else "off-policy on the teacher's completions"
        console.print(f"bootstrap gate at step {done}: {state} ({why})", soft_wrap=True)
        return bool(row["open"])


def ask_gate(
    run: Run, measure: Callable[[], Verdict] | None, decided: Sequence[tuple[int, bool]], answers: int
) -> Gate:
    """The gate, asked once before the first step.

    Args:
        run: whose recipe says how it opens.
        measure: judges the student, in the main process; else None.
        decided: before an interruption.
        answers: how many answers of a repair there are to begin with.
    """
    config = run.plan.config
    mode, budget = config.bootstrap, bootstrap_budget(config)
    if mode == "repair":
        budget = repair_budget(config, answers)
        mode = "on" if budget else "off"
    gate = Gate(mode, budget, measure, run.directory, run.accelerator, list(decided))
    if config.steps and not run.resumed:  # a resumed run has decided, and its weights are not in place yet
        began = time.perf_counter()
        gate(1)  # on the clock; what it measures later is part of its step's time
        if len(gate.decided) > len(decided) and run.main:
            run.directory.note_seconds("gate", time.perf_counter() - began)
    if config.bootstrap == "repair":
        said = f"steps 1 to {gate.bootstrapping} train on the {answers} answers that repair was fitted to"
        console.print(said if gate.bootstrapping else "no repair was kept, so every step is on-policy")
    return gate
