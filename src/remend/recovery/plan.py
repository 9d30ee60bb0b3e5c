"""A recovery that has passed its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from remend.data.examples import Example
from remend.data.templates import encode
from remend.errors import CheckError
from remend.files.run_directory import AUTO_STEPS
from remend.maths.losses import of_beta
from remend.models.blocks.placement import Placed
from remend.models.find import ModelSource
from remend.models.protocols import Tokenizer
from remend.models.sizes import Size
from remend.recovery.calibration_text import RepairText
from remend.recovery.epochs import Epochs
from remend.recovery.prompts import Prompts
from remend.recovery.rates import ADAPTER, WEIGHTS, Rate, rate_for
from remend.recovery.segments import Segment
from remend.recovery.settings import Auto, RecoverConfig
from remend.training.constraints import StudentFacts, kind_of
from remend.training.loop import Optimization
from remend.training.teachers import NamedTeacher


@dataclass(frozen=True)
class Places:
    """Where the student's weights are kept, and the healthy model's."""

    student: Placed = field(default_factory=Placed)
    teacher: Placed = field(default_factory=Placed)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is loaded or written.

    config: the recipe; its epochs are steps by now, and `epochs` says how they were counted.
    student: its files; `tokenizer` its own; `size`: how large it is; `activation`: bytes that a backward pass keeps of
        a token of it. reference_size: of the reference, where that is loaded beside it.
    shared: token ids, from 0, that mean the same to the student and to every teacher.
    device, dtype: where and in what the arithmetic runs.
    facts: of the student: what its files say that it is held to.
    repairs: a closed-form repair comes first.
    reference: the name of the healthy teacher that everything is measured against.
    teachers: by name, with their files found.
    prompts: of all streams; a stream whose prompts the reference is to write has none yet.
    checked_in: seconds that the checks took.
    placed: where the models are kept.
    segments: that were added to a run beyond the recipe's steps.
    repair_text: what the repair is fitted to where the recipe gives it.
    """

    config: RecoverConfig
    epochs: Epochs | None
    student: ModelSource
    tokenizer: Tokenizer
    shared: int
    size: Size
    reference_size: Size | None
    activation: int
    device: torch.device
    dtype: torch.dtype
    facts: StudentFacts
    repairs: bool
    reference: str
    teachers: Mapping[str, NamedTeacher]
    prompts: Prompts
    warnings: Sequence[str]
    notes: Sequence[str]
    checked_in: float = 0.0
    placed: Places = field(default_factory=Places)
    segments: tuple[Segment, ...] = ()
    repair_text: RepairText | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps at which segments end, the recipe's first."""
        return (self.config.steps, *(segment.steps for segment in self.segments))

    @property
    def optimization(self) -> Optimization:
        """The schedule of the steps."""
        config = self.config
        return Optimization(
            config.steps,
            self.learning_rate,
            config.warm_up,
            config.final_learning_rate,
            config.weight_decay,
            config.max_grad_norm,
            self.ends[1:],
            config.optimizer,
        )

    @property
    def parameters(self) -> int:
        """How many the student has."""
        return self.size.parameters

    @property
    def template(self) -> tuple[int, ...]:
        """The tokens that its chat template writes around an empty prompt."""
        return encode(self.tokenizer, Example("", " ", {})).tokens

    @property
    def phases(self) -> list[str]:
        """What progress counts."""
        return ["loading", "baseline", *(["repair"] if self.repairs else []), "training", "measuring"]

    @property
    def constraint(self) -> str:
        """What training holds, in words: a grid's name, a mask's share of zeros, or 'none'."""
        return kind_of(self.facts).describe(self.facts)

    @property
    def rate(self) -> Rate:
        """The recipe's learning rate, or the one for what is trained at this size."""
        given = self.config.learning_rate
        if given is not None:
            return Rate(given, "as given")
        small = kind_of(self.facts).learning_rate(self.facts, repaired=self.repairs)
        return rate_for(self.parameters, small, ADAPTER if self.facts.adapted else WEIGHTS)

    @property
    def repair_answers(self) -> int:
        """How many answers a repair is fitted to: the teacher's, or rows of a text that is given."""
        if self.repair_text:
            return len(self.repair_text.rows)
        return self.config.repair_samples or kind_of(self.facts).repair_answers(self.facts)

    @property
    def ends_early(self) -> bool:
        """Whether training after a repair ends where it wins nothing more."""
        return self.repairs and isinstance(self.config.steps, Auto)

    @property
    def keeps_best_apart(self) -> bool:
        """Whether the weights that are kept are the best on the prompts that `ends_early` looks at."""
        return self.ends_early and self.config.select is None and self.config.selects == "last"

    @property
    def chosen(self) -> list[str]:
        """What was settled here and not by the user, a line each."""
        lines = [*([self.epochs.line()] if self.epochs else []), self.rate.line()]
        lines += [placed.why for placed in (self.placed.student, self.placed.teacher) if placed.why]
        if self.ends_early:
            lines.insert(0, f"steps: at most {AUTO_STEPS}; training ends where it wins nothing over the repair")
        if self.config.dtype == "auto" and self.device.type == "cuda" and self.dtype == torch.float32:
            lines.append("dtype float32: this GPU has no bfloat16 of its own, and emulates it")
        return lines

    @property
    def learning_rate(self) -> float:
        """AdamW's peak."""
        return self.rate.value

    @property
    def directions(self) -> str:
        """The divergences of all streams, in words."""
        return "; ".join(dict.fromkeys(s.stream.loss.words for s in self.prompts.streams))

    @property
    def rows(self) -> int:
        """Prompts of a step, of all processes together."""
        return self.config.prompts_a_step

    def verdict(self) -> str:
        """One line."""
        prompts = "; ".join(
            (f"{s.stream.name}: " if len(self.prompts.streams) > 1 else "")
            + ("prompts that the reference writes" if s.unwritten else f"{len(s.train)} training")
            + f" and {len(s.held_out)} held-out prompts"
            for s in self.prompts.streams
        )
        held = f"; held to {self.constraint}" if self.constraint != "none" else ""
        loss = f"; loss {self.directions}" if self.directions != of_beta(0.0).words else ""
        return f"ok: {prompts}, {self.parameters / 1e6:.1f}M parameters, {self.shared} shared token ids{held}{loss}"


@dataclass(frozen=True)
class Checked:
    """The result of all checks: a plan, or all problems. Without a look at files there may be neither."""

    plan: Plan | None
    problems: Sequence[str]
    warnings: Sequence[str]
    notes: Sequence[str]

    def raise_problems(self) -> None:
        """Raise CheckError when there are problems."""
        if self.problems:
            raise CheckError(list(self.problems))

    def verdict(self) -> str:
        """One line for a recipe without problems."""
        return self.plan.verdict() if self.plan else "ok: the settings agree; no file was looked at"
