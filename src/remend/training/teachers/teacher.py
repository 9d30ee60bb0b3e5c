"""What a teacher is: whatever scores the student's tokens, and how a recipe's name becomes one.

A teacher lives twice. `NamedTeacher` is the name in a recipe with what its files say; nothing is loaded. `Teacher` is
that teacher at work. A kind of teacher is a NamedTeacher in a file of its own that ends in a registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from remend.maths.losses import Target
from remend.models.find import ModelSource
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.registry import Registry


class Teacher(Protocol):
    """A teacher at work.

    model: the model whose own weights it has in memory; None where it has none of its own.
    train, held_out: completions that it brings along; None for a teacher that is asked for them.
    """

    @property
    def model(self) -> CausalLM | None:
        """See the class."""
        ...

    @property
    def train(self) -> Sequence[Rollout] | None:
        """See the class."""
        ...

    @property
    def held_out(self) -> Sequence[Rollout] | None:
        """See the class."""
        ...

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> Target:
        """What it says at the completion tokens, rollout after rollout, after the prompts that it is shown.

        `skip_first` tokens at the start of each completion are left out, as `pack` does.
        """
        ...

    def policy(self) -> AbstractContextManager[CausalLM]:
        """The model that samples as this teacher does, inside the context. Raises InputError where there is none."""
        ...

    def updated(self, step: int) -> None:
        """After the update of step `step`, counted from 1: what follows the student follows."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        ...

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        ...

    def move_to(self, student: Scorer | None) -> None:
        """A view of the student moves over to another copy of it, or lets go of it; others stay as they are."""
        ...


@dataclass(frozen=True)
class Comparison:
    """How a student fits a teacher: `shared` leading token ids mean the same; None says nothing of them."""

    shared: int | None = None
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Pupil:
    """What is known of a student before it is loaded.

    source: its files.
    tokenizer: its own.
    rows: of its output embedding.
    """

    source: ModelSource
    tokenizer: Tokenizer
    rows: int


@dataclass(frozen=True)
class Workplace:
    """What a teacher is loaded into.

    student: as it starts.
    initial: its trainable parameters as it came in, where they have changed since (repair).
    dtype, device: of frozen weights.
    recipe: the recipe's values, for settings of a kind's own.
    read: loads a model under a progress line.
    """

    student: Scorer
    initial: Mapping[str, Tensor] | None
    dtype: torch.dtype
    device: torch.device
    recipe: Mapping[str, Any]
    read: Callable[[ModelSource, torch.dtype], CausalLM]


class StreamView(Protocol):
    """What a teacher is told of a stream that names it."""

    @property
    def demonstrations(self) -> bool:
        """Whether the teacher is shown the row's demonstration."""
        ...

    @property
    def on_policy(self) -> float:
        """Share of completions that the student samples."""
        ...

    @property
    def data(self) -> str | None:
        """Where the prompts come from."""
        ...

    @property
    def top_k(self) -> int | None:
        """Tokens of the teacher that are kept by name."""
        ...


@dataclass(frozen=True)
class Brought:
    """Completions that a teacher brings along, with the SHA-256 of what it says of them."""

    train: Sequence[Rollout]
    held_out: Sequence[Rollout]
    digest: str


@dataclass(frozen=True)
class NamedTeacher(ABC):
    """A teacher as a recipe names it. A kind of its own overrides what differs.

    moving: it follows the student, and is no model of its own.
    healthy: everything may be measured against it.
    brings_prompts: it has completions of its own, and is never asked for others.
    copies: of the trained parameters that it keeps in memory; saved: they belong into a checkpoint.
    no_layers: why its layers can't be looked at, or None where they can; `load` gives a Frozen then.
    """

    name: str
    moving: ClassVar[bool] = False
    healthy: ClassVar[bool] = True
    brings_prompts: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    saved: ClassVar[bool] = False
    no_layers: ClassVar[str | None] = None

    @classmethod
    def claims(cls, name: str) -> bool:
        """Whether a recipe that says `name` means this kind."""
        return False

    def refuses(self, stream: StreamView) -> list[str]:
        """Why a stream can't be taught by it, a sentence each."""
        return []

    def opened(self, *, trust_remote_code: bool) -> NamedTeacher:
        """Itself with its files found. Raises FileError or InputError where they can't be used."""
        return self

    @property
    def source(self) -> ModelSource | None:
        """The files of its weights, where it has some of its own."""
        return None

    def brings(self) -> Brought | None:
        """Once opened: completions of its own, where it has some."""
        return None

    def compare(self, pupil: Pupil, *, shown_more: bool) -> Comparison:
        """How a student fits it; `shown_more`: it sees more of a prompt than the student in every stream.

        Raises InputError or FileError for one that does not.
        """
        return Comparison()

    def hashes(self) -> Mapping[str, str] | None:
        """SHA-256 of its files by name, for the manifest; None where it has none of its own."""
        return None

    @abstractmethod
    def load(self, workplace: Workplace) -> Teacher:
        """The teacher at work."""


TEACHERS: Registry[type[NamedTeacher]] = Registry("teacher")


def named(name: str) -> NamedTeacher:
    """What a recipe means by a teacher's name: the first kind that claims it, a model's files if none does."""
    kinds = [TEACHERS.get(kind) for kind in TEACHERS.names()]
    return next((kind for kind in kinds if kind.claims(name)), TEACHERS.get("frozen"))(name)


class Unmoved:
    """What most teachers at work have in common: they bring nothing along, and nothing of them follows the student."""

    train: Sequence[Rollout] | None = None
    held_out: Sequence[Rollout] | None = None

    def updated(self, step: int) -> None:
        """See Teacher."""

    def state(self) -> dict[str, Tensor]:
        """See Teacher."""
        return {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """See Teacher."""

    def move_to(self, student: Scorer | None) -> None:
        """See Teacher."""
