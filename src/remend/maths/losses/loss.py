"""What a loss is, how one is added and how one is chosen.

A loss is a function of two tensors of logits, with parameters that have defaults:

    @LOSSES.register("total_variation", source="https://…")
    def total_variation(student_NV, teacher_NV, *, scale: float = 1.0):
        return scale * (student_NV.softmax(-1) - teacher_NV.softmax(-1)).abs().sum(-1) / 2

It gives one value for each position, [N], in nats. That is all that is needed: autograd differentiates it, a few
positions at a time, on the full vocabulary and on distributions folded to their top k. Folded log-probabilities are
logits of k + 1 entries, so the function needs no other form for them. `described` adds what a loss may bring beside.

Legend for suffixes: N completion positions, V vocabulary entries that both models share, K1 the k kept entries and the
tail. p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from remend.errors import InputError, did_you_mean
from remend.maths.topk import TopK, floored, fold, unfold_gradient
from remend.registry import Registry

LossFunction = Callable[..., Tensor]
"""(student_NV, teacher_NV, *, parameters with defaults) to [N] nats. Both arguments are float32, or float64 where the
student's logits are, and hold no −inf."""

LOSSES: Registry[LossFunction] = Registry("loss")


@dataclass(frozen=True)
class Described:
    """A loss that brings more than its value; made by `described`."""

    function: LossFunction
    words: str
    with_gradient: Callable[..., tuple[Tensor, Tensor]] | None
    caution: Callable[..., str | None] | None

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor, **parameters: object) -> Tensor:
        """The function's own value."""
        return self.function(student_NV, teacher_NV, **parameters)


def described(
    words: str,
    *,
    with_gradient: Callable[..., tuple[Tensor, Tensor]] | None = None,
    caution: Callable[..., str | None] | None = None,
) -> Callable[[LossFunction], LossFunction]:
    """Decorator below `LOSSES.register` for a loss that brings words or a closed form.

    Args:
        words: what the loss is, for titles and reports, e.g. 'forward KL, teacher‖student'. Without this decorator
            they are made of its name. Its parameters are added.
        with_gradient: the closed form: the function's arguments to (values [N], their gradient at the student's logits
            [N, V]). Both functions then get the logits as they are, in any float dtype and with −inf where an entry is
            masked, and make log-probabilities of them by `log_probabilities`: no other copy of a chunk is alive.
        caution: the parameters to what a user should know of them before training, or None.
    """
    return lambda function: Described(function, words, with_gradient, caution)


@dataclass(frozen=True)
class Loss:
    """A registered loss with its parameters. `choose` makes one from a user's words."""

    name: str
    parameters: Mapping[str, object] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What it is, for titles and reports, e.g. 'generalised JSD, beta 0.5'."""
        entry = LOSSES.get(self.name)
        words = entry.words if isinstance(entry, Described) else self.name.replace("_", " ")
        values = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.parameters.items()]
        return ", ".join([words, *values])

    @property
    def caution(self) -> str | None:
        """What a user should know of these parameters, a sentence; mostly None."""
        entry = LOSSES.get(self.name)
        return entry.caution(**self.parameters) if isinstance(entry, Described) and entry.caution else None

    def __call__(self, student_NV: Tensor, teacher: Tensor | TopK) -> Tensor:
        """The loss of each position.

        Args:
            student_NV: student logits, any float dtype; computed in float32, or float64 if given so.
            teacher: teacher logits of the same shape, or its folded distributions. Then the student's are folded
                likewise. Gradients flow to the student only.

        Returns:
            [N] nats, float32 (float64 for float64 input), with a gradient with respect to the student's logits.

        Raises:
            ValueError: shapes differ, or an id of a folded distribution is outside the logits.
        """
        dtype = accurate(student_NV.dtype)
        if isinstance(teacher, TopK):
            teacher.check(*student_NV.shape)
            return self(fold(student_NV.to(dtype), teacher.ids_NK)[0], teacher.folded_NK1)
        if student_NV.shape != teacher.shape:
            raise ValueError(
                f"student logits {tuple(student_NV.shape)} and teacher logits {tuple(teacher.shape)} differ"
            )
        entry, teacher_NV = LOSSES.get(self.name), teacher.detach()
        if not (isinstance(entry, Described) and entry.with_gradient):
            student_NV, teacher_NV = floored(student_NV.to(dtype)), floored(teacher_NV.to(dtype))
        return entry(student_NV, teacher_NV, **self.parameters)

    def with_gradient(self, student_NV: Tensor, teacher: Tensor | TopK) -> tuple[Tensor, Tensor]:
        """The loss of each position [N] and its gradient at the student's logits [N, V]; arguments as of a call.

        In closed form where the loss brings one, else by autograd. Nothing is attached to either result.
        """
        dtype = accurate(student_NV.dtype)
        if isinstance(teacher, TopK):
            folded_NK1, rest_NV = fold(student_NV.to(dtype), teacher.ids_NK)
            values_N, grad_NK1 = self.with_gradient(folded_NK1, teacher.folded_NK1)
            return values_N, unfold_gradient(grad_NK1, folded_NK1, rest_NV, teacher.ids_NK)
        entry = LOSSES.get(self.name)
        if isinstance(entry, Described) and entry.with_gradient:
            return entry.with_gradient(student_NV, teacher, **self.parameters)
        with torch.enable_grad():
            leaf_NV = student_NV.detach().to(dtype).requires_grad_()
            values_N = self(leaf_NV, teacher)
            (grad_NV,) = torch.autograd.grad(values_N.sum(), leaf_NV)
        return values_N.detach(), grad_NV


def choose(name: str, parameters: Mapping[str, object] | None = None) -> Loss:
    """A registered loss with these parameters, and with its defaults for the others; one that is None is left out.

    The loss is tried on two positions, so that what it refuses is known before anything is trained.

    Raises:
        InputError: no such loss or parameter, a value of another type than the default, or one that the loss refuses.
    """
    entry = LOSSES.get(name)
    signature = inspect.signature(entry.function if isinstance(entry, Described) else entry)
    defaults = {p.name: p.default for p in list(signature.parameters.values())[2:]}
    values = dict(defaults)
    for key, value in (parameters or {}).items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise InputError(f'loss "{name}" has no parameter "{key}"; it has: {known}.{did_you_mean(key, defaults)}')
        if value is not None:
            values[key] = _like(defaults[key], value)
            if type(values[key]) is not type(defaults[key]):
                raise InputError(f'{key} of loss "{name}" is {value!r}; its default is {defaults[key]!r}')
    loss = Loss(name, values)
    probe_NV = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    try:
        shape = tuple(loss.with_gradient(probe_NV, probe_NV.flip(1))[0].shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f'loss "{name}" can\'t be used: {error}') from None
    if shape != (2,):
        raise InputError(f'loss "{name}" gives shape {shape} for 2 positions; it must give one value for each')
    return loss


def _like(default: object, value: object) -> object:
    """A value as the default's type where YAML has another: whole numbers and 1e-4 for floats, lists for tuples."""
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_like(default[0] if default else None, part) for part in value)
    return value


def of_beta(beta: float) -> Loss:
    """The family that GKD's beta spans: 0 forward KL, 1 reverse KL, between them the generalised JSD.

    The family is discontinuous at its ends: D/beta → KL(p ‖ q) as beta → 0 and D/(1 − beta) → KL(q ‖ p) as beta → 1,
    so a beta of 0.01 gives a loss 100 times smaller than the KL. It is implemented as published.

    Raises ValueError for a beta outside 0 to 1.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; allowed is 0 (forward KL) to 1 (reverse KL)")
    ends = {0.0: Loss("forward_kl"), 1.0: Loss("reverse_kl")}
    return ends.get(beta) or Loss("jsd", {"beta": float(beta)})


def divergence(student_NV: Tensor, teacher_NV: Tensor | TopK, beta: float = 0.0) -> Tensor:
    """Divergence of each position [N], in nats, of the family that `of_beta` names; arguments as of a call of `Loss`.

    Folded to the teacher's top k it is never above that of the full vocabulary, and equal to it at k = V.

    Raises:
        ValueError: shapes differ, or beta is outside 0 to 1.
    """
    return of_beta(beta)(student_NV, teacher_NV)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss of logits in `dtype` is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_probabilities(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p) [N, V] in nats, in the student's accurate dtype; finite where logits are −inf."""
    dtype = accurate(student_NV.dtype)
    log_q_NV = torch.log_softmax(floored(student_NV.to(dtype)), dim=-1)
    return log_q_NV, torch.log_softmax(floored(teacher_NV.to(dtype)), dim=-1)
