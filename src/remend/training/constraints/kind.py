"""What a constraint is: one of a registry of kinds, and what it gives a recovery to train under.

A kind says from a student's files whether it holds that student, and what it does with it: repair in closed form, and
training under the constraint. To add one, write a class with the methods of `ConstraintKind` and register an instance
in CONSTRAINTS; docs/extending shows one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Size, Tensor

from remend.compression.recognise import Recognised
from remend.compression.stored_grid import StoredGrid
from remend.models.activations.walk import Sites, Walked, walk
from remend.models.blocks.journal import BlockJournal
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.registry import Registry
from remend.training.constraints.fitting import shapes

RATE, REPAIRED_RATE = 2e-4, 1e-4
"""AdamW's peak where the recipe names none; they served SmolLM2 (docs/measurements/degradations.md).
A repaired student is near its goal, where large steps add more noise than they win."""

REPAIR_ANSWERS = 600
"""Of the teacher that a repair is fitted to where the recipe names none."""

Shapes = Mapping[str, Size]
"""Of the decoder's linear weights, by layer name."""


class Constraint(Protocol):
    """A constraint at work: what the loop needs to know of it. A class that names this one as its base need only write
    `masters`, and of the rest what does something."""

    @abstractmethod
    def masters(self) -> dict[str, Tensor]:
        """The float32 tensors that the optimizer moves, by parameter name; a checkpoint holds these."""
        ...

    def take_gradients(self) -> None:
        """After the last backward pass of a step: make every master's `.grad` hold its gradient."""
        return

    def project(self) -> None:
        """After an update, or after masters were loaded: write the weights as served, on the constraint."""
        return

    def save(self, directory: Path) -> None:
        """Write what describes the constraint beside a saved model."""
        return

    def kept(self) -> dict[str, Tensor]:
        """What repair changed and training does not move, so that neither the masters nor the student's files hold it:
        a checkpoint does."""
        return {}

    def take_kept(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `kept`, before the masters are put in place."""
        return


@dataclass(frozen=True)
class StudentFacts:
    """What is known of a student before a weight is loaded.

    Attributes:
        recognised: which grid or mask its files show.
        directory: where its files are; None for a GGUF file and for an adapter.
        record: the content of its degradation.json, empty where there is none.
        adapted: an adapter is trained: one that the student brought along, or a new one.
        as_dense: the user wants its weights trained freely, whatever they lie on.
        train: what the recipe lets move: all, scales, norms or last.
        layer_map: for each of its layers the teacher's; None where it is not known to have fewer.
    """

    recognised: Recognised
    directory: Path | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    adapted: bool = False
    as_dense: bool = False
    layer_map: Sequence[int] | None = None
    train: str = "all"

    @property
    def compressed(self) -> bool:
        """Whether it lies on a grid, was pruned, or lost layers or channels."""
        return bool(self.recognised.stored or self.recognised.mask or self.record.get("kind") == "pruning")


@dataclass(frozen=True)
class Start:
    """What a repair leaves for training to start from.

    stored, masters: a grid with new codes, and the weights that were rounded.
    walked: what `Calibration.walk` found.
    """

    stored: StoredGrid | None = None
    masters: Mapping[str, Tensor] | None = None
    walked: Walked = field(default_factory=Walked)


@dataclass(frozen=True)
class Calibration:
    """What a repair is fitted to: the teacher in float32, its answers, and the context of the forward passes.

    `journal` is where a student whose blocks are on the disk gets its new ones.
    """

    teacher: CausalLM
    text: Sequence[Rollout]
    precision: AbstractContextManager[object] | None = None
    journal: BlockJournal | None = None

    def walk(
        self, student: CausalLM, visit: Callable[[Sites], None], title: str, layer_map: Sequence[int] | None = None
    ) -> Walked:
        """Visit the student's linear layers in order, each with what it sees and ought to give; see `walk`."""
        return walk(
            student,
            self.text,
            visit,
            teacher=self.teacher,
            layer_map=layer_map,
            precision=self.precision,
            title=title,
            journal=self.journal,
        )


class ConstraintKind(Protocol):
    """One kind of constraint. A class that names this one as its base need only write `holds`, `describe`, `hold`."""

    @abstractmethod
    def holds(self, facts: StudentFacts) -> bool:
        """Whether a student is one of this kind. Kinds are asked in turn, see `kind_of`.

        A kind from outside is asked before the adapter's, so it answers no for facts that are `adapted`.
        """
        ...

    @abstractmethod
    def describe(self, facts: StudentFacts) -> str:
        """What training holds, in words for verdict, manifest and summary; 'none' for nothing."""
        ...

    @abstractmethod
    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        """The constraint at work on a loaded model.

        Args:
            model: holds the student's weights, or those that repair made of them.
            facts: of the student.
            origin: the teacher's model; None where it is not in memory.
            start: what `repair` gave; None where nothing was repaired.
            rate: the peak learning rate.

        Raises InputError where the model does not lie on the constraint.
        """
        ...

    def lost(self, facts: StudentFacts) -> str | None:
        """What the record promises of this constraint and the files no longer hold: a problem for the user, or None.

        Every kind is asked, whichever holds the student.
        """
        return None

    def check(self, model: CausalLM, facts: StudentFacts) -> None:
        """Raise InputError where the loaded weights are not what the files promised; asked before repair."""
        return

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        """Why `repair` will have no effect, as far as shapes tell (`theirs` is None for a cache), or None."""
        return "nothing of it can be won back in closed form"

    def repairs(self, model: CausalLM, facts: StudentFacts, teacher: CausalLM) -> bool:
        """Whether `repair` has something to do; asked with the loaded models, before the teacher is let answer."""
        return self.no_repair(facts, shapes(model), shapes(teacher)) is None

    def repair(self, model: CausalLM, facts: StudentFacts, calibration: Calibration) -> Start:
        """Win back in closed form what needs no gradient, under the constraint; the student is changed in place."""
        return Start()

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        """AdamW's peak for 135M parameters where the recipe names none; larger models are given a share of it
        (recovery/rates.py). `repaired` says whether repair comes first."""
        return REPAIRED_RATE if repaired and not facts.layer_map else RATE

    def repair_answers(self, facts: StudentFacts) -> int:
        """How many of the teacher's answers a repair is fitted to where the recipe says nothing."""
        return REPAIR_ANSWERS


CONSTRAINTS: Registry[ConstraintKind] = Registry("constraint")


def kind_of(facts: StudentFacts) -> ConstraintKind:
    """The kind that holds a student. The one that was registered last is asked first, and the free one holds all."""
    return next(kind for kind in reversed(CONSTRAINTS.entries.values()) if kind.holds(facts))


def other_shapes(ours: Shapes, theirs: Shapes | None) -> str | None:
    """Why a student whose layers are all still there can't be repaired from its teacher, or None."""
    if theirs is None:
        return NO_WEIGHTS
    return None if ours == theirs else "its matrices and the teacher's have other shapes"


NO_WEIGHTS = "repair needs the teacher's weights, and a cache holds none"
