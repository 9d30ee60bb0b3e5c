"""Whatever scores the student's tokens, seen as body and head.

A frozen checkpoint is a `scoring.Scorer`. The others are views of the student's own memory and need no second copy of
what is not trained: its moving average, the weights that it came in with, itself as it is, itself without its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from remend.maths.losses import Head
from remend.models.adapters import without_adapter
from remend.models.scorer import Packed, Scorer


class Teacher(Protocol):
    """A model that gives hidden states and the head to read them."""

    @property
    def head(self) -> Head:
        """From its hidden states to logits over the shared ids."""
        ...

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D]; see Scorer."""
        ...

    def states(self, batch: Packed) -> Tensor:
        """[N, D] at completion tokens; see Scorer."""
        ...


class View:
    """The student as it is: the teacher `live`. Without gradients."""

    def __init__(self, student: Scorer) -> None:
        self.student = student

    def worn(self) -> Any:
        """A context in which the student's model is this teacher."""
        return nullcontext()

    @property
    def head(self) -> Head:
        """See Teacher. Detached within the context, so it keeps the tensors that the model wears there."""
        with self.worn():
            return self.student.head.detach()

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """See Teacher."""
        with self.worn():
            return self.student.hidden(tokens_BT)

    @torch.no_grad()
    def states(self, batch: Packed) -> Tensor:
        """See Teacher."""
        with self.worn():
            return self.student.states(batch)


def policy_of(teacher: Teacher) -> tuple[Any, AbstractContextManager[Any]]:
    """The model that samples as the teacher does, and the context in which it does."""
    if isinstance(teacher, View):
        return teacher.student.model, teacher.worn()
    assert isinstance(teacher, Scorer)
    return teacher.model, nullcontext()


class AdapterOff(View):
    """The student without its LoRA adapter: the base is the same memory. The teacher `base`."""

    def worn(self) -> Any:
        """See View."""
        return without_adapter(self.student.model)


class Weights(View):
    """The student with other values in its trainable parameters: the teacher `initial`.

    The values are kept in float32 whatever the parameters are.
    """

    def __init__(self, student: Scorer) -> None:
        super().__init__(student)
        self._parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        self.values = {n: p.detach().to(torch.float32, copy=True) for n, p in self._parameters.items()}

    @contextmanager
    def worn(self) -> Iterator[None]:
        """See View. Pointers are exchanged, nothing is copied (unless a parameter is not float32)."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.values[name].to(p.dtype)
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]

    def state(self) -> dict[str, Tensor]:
        """The values, to be saved."""
        return self.values

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take saved values, in place."""
        for name, value in self.values.items():
            value.copy_(saved[name])


class Ema(Weights):
    """The moving average of the student's weights as served: the teacher `ema` (mean teacher, arXiv 1703.01780).

    Args:
        student: as it is at the start.
        rate: ema += rate · (student − ema).
        every: after every n steps.
    """

    def __init__(self, student: Scorer, rate: float, every: int = 1) -> None:
        super().__init__(student)
        self.rate, self.every = rate, every

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after step `step`, counted from 1."""
        if step % self.every == 0:
            for name, p in self._parameters.items():
                self.values[name].lerp_(p.detach().float(), self.rate)
