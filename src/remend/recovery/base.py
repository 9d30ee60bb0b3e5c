"""The base under an adapter: read once in a run, for the student, for a teacher of its files, and for the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from remend.models.find import ModelSource
from remend.models.frozen_base import held_in, over_the_same_weights
from remend.models.protocols import CausalLM
from remend.recovery.plan import Plan


@dataclass
class Base:
    """What is in memory of the base; nothing before it is first asked for."""

    _model: CausalLM | None = None

    def model(self, dtype: torch.dtype, read: Callable[[], CausalLM]) -> CausalLM | None:
        """A model of its own over the base's weights, in `dtype`; None where only the files can give that.

        `read` is called once in a run, and gives the base in float32, its linear layers as `frozen_base` holds them.
        """
        self._model = self._model or read()
        names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        if dtype != torch.float32 and any(getattr(self._model, name, None) for name in names):
            return None  # transformers leaves some of its weights in float32
        return over_the_same_weights(self._model, dtype)

    def record(self, plan: Plan) -> dict[str, object]:
        """For the manifest: in what the linear layers are held, and which teachers read the same memory."""
        if self._model is None:
            return {}
        return {"frozen_base": {"linear_layers": held_in(self._model), "shared_with": _sharing(plan)}}

    def line(self, plan: Plan) -> str:
        """The same for people; empty where no adapter is trained."""
        if self._model is None:
            return ""
        with_whom = f", in one memory with teacher {', '.join(names)}" if (names := _sharing(plan)) else ""
        return f"frozen base: linear layers in {held_in(self._model)}{with_whom}"


def is_base(plan: Plan, source: ModelSource) -> bool:
    """Whether these files, or those under this adapter, are the ones that a plan freezes under an adapter."""
    ours, theirs = (files.base or files for files in (plan.student, source))
    if not plan.facts.adapted or ours.path is None or theirs.path is None:
        return False
    return ours.path.resolve() == theirs.path.resolve()


def _sharing(plan: Plan) -> list[str]:
    """Names of the teachers that are of the base's files."""
    return [name for name, teacher in plan.teachers.items() if teacher.source and is_base(plan, teacher.source)]
