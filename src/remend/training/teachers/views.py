"""Teachers that are views of the student's own memory: they need no second copy of what is not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from remend.maths.losses import HeadTarget
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.training.teachers.frozen import scored
from remend.training.teachers.teacher import Teacher


class View(Teacher):
    """The student as it is. Scored without gradients."""

    model = None

    def __init__(self, student: Scorer) -> None:
        self.student: Scorer | None = student

    @property
    def parts(self) -> Scorer:
        """The student whose view this is."""
        assert self.student is not None, "the student has gone, and nothing has taken its place"
        return self.student

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        """Inside the context the student's model is this teacher."""
        yield self.parts.model

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> HeadTarget:
        """The head keeps the tensors that the model has inside the context."""
        with self.policy():
            return scored(self.parts, rollouts, skip_first)

    def move_to(self, student: Scorer | None) -> None:
        self.student = student


class Weights(View):
    """The student with other values in its trainable parameters.

    The values are kept in float32 whatever the parameters are. `values` starts as what the parameters hold.
    """

    def __init__(self, student: Scorer) -> None:
        super().__init__(student)
        self._parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        self.values = {n: p.detach().to(torch.float32, copy=True) for n, p in self._parameters.items()}

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        """Pointers are exchanged, nothing is copied (unless a parameter is not float32)."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.values[name].to(p.dtype)
            yield self.parts.model
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Take other values, in place."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def approach(self, rate: float) -> None:
        """Move the values towards the student's by `rate` of the distance."""
        for name, p in self._parameters.items():
            self.values[name].lerp_(p.detach().float(), rate)
