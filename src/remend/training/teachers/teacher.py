"""What a teacher is: whatever scores the student's tokens, and how a recipe's name becomes one.

A teacher lives twice. `NamedTeacher` is the name in a recipe with what its files say; nothing is loaded. `Teacher` is
that teacher at work. A kind of teacher is a NamedTeacher in a file of its own that ends in a registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from remend.errors import InputError
from remend.maths.losses import Target
from remend.models.find import ModelSource
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.models.vocabulary import VocabularyMatch
from remend.registry import Registry


class Teacher(Protocol):
    """A teacher at work. A class that names this one as its base need only write `model`, `score` and `policy`.

    model: the model whose own weights it has in memory; None where it has none of its own.
    train, held_out: completions that it brings along; None for a teacher that is asked for them.
    """

    @property
    def model(self) -> CausalLM | None: ...

    @property
    def train(self) -> Sequence[Rollout] | None:
        return None

    @property
    def held_out(self) -> Sequence[Rollout] | None:
        return None

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> Target:
        """What it says at the completion tokens, rollout after rollout, after the prompts that it is shown.

        `skip_first` tokens at the start of each completion are left out, as `pack` does.
        """

    @abstractmethod
    def policy(self) -> AbstractContextManager[CausalLM]:
        """The model that samples as this teacher does, inside the context. Raises InputError where there is none."""

    def updated(self, step: int) -> None:
        """After the update of step `step`, counted from 1: what follows the student follows."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        return

    def move_to(self, student: Scorer | None) -> None:
        """A view of the student moves over to another copy of it, or lets go of it; others stay as they are."""
        return


@dataclass(frozen=True)
class Workplace:
    """What a teacher is loaded into.

    student: as it starts.
    initial: its trainable parameters as it came in, where they have changed since (repair).
    dtype: of frozen weights.
    recipe: the recipe's values, for settings of a kind's own.
    read: loads a model under a progress line.
    """

    student: Scorer
    initial: Mapping[str, Tensor] | None
    dtype: torch.dtype
    recipe: Mapping[str, Any]
    read: Callable[[ModelSource, torch.dtype], CausalLM]


class StreamView(Protocol):
    """What a teacher is told of a stream that names it.

    demonstrations: it is shown the row's demonstration.
    on_policy: share of completions that the student samples.
    data: where the prompts come from.
    top_k: tokens of the teacher that are kept by name.
    """

    @property
    def demonstrations(self) -> bool: ...
    @property
    def on_policy(self) -> float: ...
    @property
    def data(self) -> str | None: ...
    @property
    def top_k(self) -> int | None: ...


@dataclass(frozen=True)
class NamedTeacher(ABC):
    """A teacher as a recipe names it. A kind of its own overrides what differs.

    word: what a recipe says for it, where that is one word.
    moving: it follows the student, and is no model of its own.
    healthy: everything may be measured against it.
    brings_prompts: it has completions of its own, and is never asked for others.
    copies: of the trained parameters that it keeps in memory; saved: they belong into a checkpoint.
    no_layers: why its layers can't be looked at, or None where they can: the loaded teacher's `model` has them.
    needs_initial: it is given the trainable parameters as the student came in (`Workplace.initial`).
    recipe_keys: keys of the recipe that nothing else reads.
    """

    name: str
    word: ClassVar[str | None] = None
    moving: ClassVar[bool] = False
    healthy: ClassVar[bool] = True
    brings_prompts: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    saved: ClassVar[bool] = False
    no_layers: ClassVar[str | None] = "this kind of teacher shows none. Name a model"
    needs_initial: ClassVar[bool] = False
    recipe_keys: ClassVar[Sequence[str]] = ()

    @classmethod
    def claims(cls, name: str) -> bool:
        """Whether a recipe that says `name` means this kind."""
        return name == cls.word

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

    def brings(self) -> tuple[Sequence[Rollout], Sequence[Rollout], str] | None:
        """Once opened: its own completions for training and held-out ones, and a SHA-256 of them; None has none."""
        return None

    def compare(
        self, student: ModelSource, tokenizer: Tokenizer, rows: int, *, shown_more: bool
    ) -> VocabularyMatch | None:
        """How a student fits it; None says nothing of the vocabulary.

        Args:
            student, tokenizer: its files, and its own tokenizer.
            rows: of its output embedding.
            shown_more: the teacher sees more of a prompt than the student in every stream.

        Raises InputError or FileError for a student that does not fit.
        """
        return None

    def hashes(self) -> Mapping[str, str] | None:
        """SHA-256 of its files by name, for the manifest; None where it has none of its own."""
        return None

    @abstractmethod
    def load(self, workplace: Workplace) -> Teacher:
        """The teacher at work."""


TEACHERS: Registry[type[NamedTeacher]] = Registry("teacher")


def at_work(teacher: NamedTeacher, workplace: Workplace) -> Teacher:
    """The teacher, loaded. Raises InputError for one that promises layers to look at and brings no model."""
    loaded = teacher.load(workplace)
    if teacher.no_layers is None and loaded.model is None:
        raise InputError(
            f"teacher {teacher.name}: {type(teacher).__name__}.no_layers is None, so it must bring a model whose "
            "layers can be looked at, and it brings none; let no_layers say why"
        )
    return loaded


def as_directory(name: str) -> str:
    """Where a teacher's one word is a directory's name too, how that one is written: a sentence, else ''."""
    return f". The directory {name} is written ./{name}" if named(name).word == name and Path(name).is_dir() else ""


def named(name: str) -> NamedTeacher:
    """What a recipe means by a teacher's name: the first kind that claims it, a model's files if none does."""
    kinds = [TEACHERS.get(kind) for kind in TEACHERS.names()]
    return next((kind for kind in kinds if kind.claims(name)), TEACHERS.get("frozen"))(name)
