"""`steps: auto`: training after a repair goes on while it wins something.

That is looked at on training prompts that are set apart: nothing is fitted to them or trained on them, and the held-out
prompts, by which the run is measured, decide nothing here. Unless the recipe says which weights are kept, those are
that were best there, be it those of the repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from remend.console import console, stage
from remend.data.order import derive_seed
from remend.files.atomic import JsonObject
from remend.files.run_directory import METRICS
from remend.maths.losses import Target
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.recovery.begin import Run
from remend.recovery.judge import Judge, figures_of
from remend.recovery.plan import Plan
from remend.recovery.prompts import Prompts
from remend.recovery.selection import Best, Selection
from remend.training.constraints import Constraint
from remend.training.measure import compare

APART = "apart/kl"
"""In metrics.jsonl: KL on the prompts that are set apart, nats per token."""

SHARE, MOST, LEAST = 8, 32, 8
"""One in so many training prompts is set apart, at most MOST. Fewer than LEAST say nothing, so none are."""

EVERY, LOOKS = 8, 2
"""Steps from one look to the next, and looks that a plateau is told by."""

GAIN = 0.01
"""Share of the KL that the looks of a plateau won less than."""

CLOSE = 0.1
"""KL in nats per token, below which 40 steps after a repair won nothing that 32 prompts could show: int4-g32-sym, q4_0
and nvfp4 of SmolLM2 (docs/measurements/degradations.md)."""


def with_prompts_apart(prompts: Prompts, plan: Plan) -> Prompts:
    """The prompts, of which some of the main stream's are set apart where training may end early."""
    main = prompts.main
    count = min(MOST, len(main.train) // SHARE)
    if not plan.ends_early or count < LEAST:
        return prompts
    drawn = sorted(main.train, key=lambda prompt: derive_seed(plan.config.seed, "apart", prompt.id))[:count]
    chosen = {prompt.id for prompt in drawn}
    split = replace(
        main,
        train=[prompt for prompt in main.train if prompt.id not in chosen],
        apart=[replace(prompt, shown=None) for prompt in main.train if prompt.id in chosen],
    )
    return replace(prompts, streams=tuple(split if stream is main else stream for stream in prompts.streams))


@dataclass
class Plateau:
    """Looks at the prompts that are set apart, and says when to stop; `begin_plateau` makes it.

    completions: the reference's answers to them.
    kls: after the repair, and after every EVERY steps.
    selection: of the best of these.
    why: why training ended, once it did; "" before.
    """

    judge: Judge
    student: Scorer
    completions: Sequence[Rollout]
    kls: list[float]
    selection: Selection
    why: str = ""
    _targets: dict[int, Target] = field(default_factory=dict)  # of the reference on them, which does not move

    def hook(self, step: int) -> Mapping[str, float] | None:
        """A look after a step, when it is its turn."""
        if step % EVERY:
            return None
        self.kls.append(self.look())
        self.selection.seen(step, -self.kls[-1])
        return {APART: self.kls[-1]}

    def look(self) -> float:
        """The student's KL, nats per token."""
        return figures_of(compare(self.student, self.judge.reference, self.completions, kept=self._targets))["kl"]

    def stop(self) -> bool:
        """Whether nothing is left to win."""
        if not self.why:
            self.why = self._reason()
            if self.why:
                console.print(self.why, soft_wrap=True)
        return bool(self.why)

    def _reason(self) -> str:
        apart = f"on {len(self.completions)} training prompts set apart"
        if self.kls[0] < CLOSE:
            return (
                f"nothing is trained: {apart} repair left {self.kls[0]:.3f} nats per token, and below {CLOSE} training "
                "after it wins nothing that can be seen"
            )
        before, since = self.kls[:-LOOKS], self.kls[-LOOKS:]
        if before and min(since) > (1 - GAIN) * min(before):
            step = EVERY * (len(self.kls) - 1)
            return (
                f"training ends at step {step}: {apart} the last {EVERY * LOOKS} steps won less than "
                f"{GAIN:.0%}{self._kept_instead(step)}"
            )
        return ""

    def _kept_instead(self, step: int) -> str:
        best = self.selection.best
        if best is None or best.step == step:
            return ""
        return (
            f"; the weights of {f'step {best.step}' if best.step else 'the repair'} are kept, which are the best there"
        )

    def record(self) -> JsonObject:
        """For the summary."""
        return {"why": self.why, "prompts": len(self.completions), "kl": self.kls}


def begin_plateau(
    run: Run, judge: Judge, student: Scorer, constraint: Constraint, kls: Sequence[float]
) -> Plateau | None:
    """What ends training early, once the student is repaired; None where no prompts are set apart.

    kls: what an earlier process of the run saw.
    """
    prompts = run.prompts.main.apart
    if not prompts or run.plan.segments:  # steps that were asked for by their number are taken
        return None
    keep = run.plan.keeps_best_apart
    best = Best.read(run.directory) if keep else None
    selection = Selection(run.directory, constraint, keep, None, best=best)
    plateau = Plateau(judge, student, judge.answered(prompts, "apart.jsonl"), [*kls], selection)
    if not plateau.kls:
        with stage("looking at prompts set apart"):
            plateau.kls.append(plateau.look())
        run.directory.append(METRICS, {"step": 0, APART: plateau.kls[0]})
        if plateau.kls[0] >= CLOSE:  # else nothing is trained that could be worse
            selection.seen(0, -plateau.kls[0])
    return plateau
