"""Divergences between the teacher's and the student's next-token distributions.

Legend for suffixes: N completion positions, V vocabulary entries that both models share, D width of the student,
E width of the teacher. p is the teacher's distribution, q the student's. All results are in nats.

    beta = 0        forward KL,  KL(p ‖ q)   "teacher‖student": every published SDFT result used it
    beta = 1        reverse KL,  KL(q ‖ p)   "student‖teacher"
    0 < beta < 1    generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 2):
                    beta KL(p ‖ m) + (1 − beta) KL(q ‖ m),  m = beta p + (1 − beta) q

The family is discontinuous at its ends: D/beta → KL(p ‖ q) as beta → 0 and D/(1 − beta) → KL(q ‖ p) as beta → 1,
so a beta of 0.01 gives a loss 100 times smaller than the KL. It is implemented as published.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remend.maths.topk import TopK, floored, fold, unfold_gradient


def direction(beta: float) -> str:
    """The divergence that `beta` names, for logs and reports, e.g. 'forward KL, teacher‖student'."""
    if beta == 0.0:
        return "forward KL, teacher‖student"
    if beta == 1.0:
        return "reverse KL, student‖teacher"
    return f"generalised JSD, beta {beta:g}"


def divergence(student_NV: Tensor, teacher_NV: Tensor, beta: float = 0.0) -> Tensor:
    """Divergence of each position, full vocabulary.

    Args:
        student_NV: student logits, any float dtype; computed in float32, or float64 if given so.
        teacher_NV: teacher logits of the same shape; gradients flow to the student only.
        beta: 0 forward KL, 1 reverse KL, between them the generalised JSD (module docstring).

    Returns:
        [N] nats, float32 (float64 for float64 input), with a gradient with respect to the student's logits.

    Raises:
        ValueError: shapes differ, or beta is outside 0 to 1.
    """
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student logits {tuple(student_NV.shape)} and teacher logits {tuple(teacher_NV.shape)} differ"
        )
    _check_beta(beta)
    dtype = _accurate(student_NV.dtype)
    log_q, log_p = _log_probabilities(student_NV.to(dtype)), _log_probabilities(teacher_NV.detach().to(dtype))
    if beta == 0.0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    to_student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * to_teacher + (1.0 - beta) * to_student


def _with_gradient(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`divergence` and its gradient at the student's logits, in closed form: (values [N], gradient [N, V]).

    forward KL: q − p.   Otherwise, with g = ∂D/∂log q = w q (log q − log m), gradient = g − q Σ g, where m is the
    mixture and w = 1 − beta for the JSD, and m = p, w = 1 for the reverse KL (the terms from ∂m cancel).
    """
    dtype = _accurate(student_NV.dtype)
    log_q, log_p = _log_probabilities(student_NV.to(dtype)), _log_probabilities(teacher_NV.to(dtype))
    q = log_q.exp()
    if beta == 0.0:
        p = log_p.exp()
        return log_p.sub_(log_q).mul_(p).sum(-1), q.sub_(p)
    if beta == 1.0:
        values, weight = torch.zeros_like(log_q[:, 0]), 1.0
        log_m = log_p
    else:
        log_m, weight = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta)), 1.0 - beta
        values = beta * (log_p.exp() * (log_p - log_m)).sum(-1)
    inner = log_q.sub_(log_m).mul_(q).mul_(weight)
    total = inner.sum(-1)
    return values + total, inner.sub_(q.mul_(total.unsqueeze(-1)))


def truncated_divergence(student_NV: Tensor, target: TopK, beta: float = 0.0) -> Tensor:
    """Divergence of each position between the two distributions folded to the teacher's top k and a tail.

    Args:
        student_NV: student logits, any float dtype; computed in float32, or float64 if given so.
        target: the teacher's folded distributions (remend.truncated).
        beta: see `divergence`.

    Returns:
        [N] nats with a gradient with respect to the student's logits. Never above `divergence`; equal to it at k = V.

    Raises:
        ValueError: positions differ in number, an id is outside the logits, or beta is outside 0 to 1.
    """
    _check_target(target, *student_NV.shape)
    return divergence(fold(student_NV.to(_accurate(student_NV.dtype)), target.ids_NK)[0], target.folded_NK1, beta)


def _truncated_with_gradient(student_NV: Tensor, target: TopK, beta: float) -> tuple[Tensor, Tensor]:
    """`truncated_divergence` and its gradient at the student's logits in closed form: (values [N], gradient [N, V])."""
    folded_NK1, rest_NV = fold(student_NV.to(_accurate(student_NV.dtype)), target.ids_NK)
    values_N, grad_NK1 = _with_gradient(folded_NK1, target.folded_NK1, beta)
    return values_N, unfold_gradient(grad_NK1, folded_NK1, rest_NV, target.ids_NK)


def _check_target(target: TopK, positions: int, vocabulary: int) -> None:
    if len(target) != positions:
        raise ValueError(f"the student has {positions} positions and the teacher's top k {len(target)}")
    if len(target) and not 0 <= int(target.ids_NK.min()) <= int(target.ids_NK.max()) < vocabulary:
        raise ValueError(f"the teacher's top k names id {int(target.ids_NK.max())}, ids go to {vocabulary - 1}")


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; allowed is 0 (forward KL) to 1 (reverse KL)")


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_probabilities(logits_NV: Tensor) -> Tensor:
    return torch.log_softmax(floored(logits_NV), dim=-1)
