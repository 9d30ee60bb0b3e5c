"""Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 2), between forward and reverse KL:

    beta KL(p ‖ m) + (1 − beta) KL(q ‖ m),  m = beta p + (1 − beta) q

p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remend.maths.losses.loss import LOSSES, described, log_probabilities
from remend.maths.losses.reverse_kl import kl_of_student


def jsd_with_gradient(student_NV: Tensor, teacher_NV: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Values [N] and their gradient at the student's logits [N, V]."""
    log_q_NV, log_p_NV = log_probabilities(student_NV, teacher_NV)
    log_m_NV = _log_mean(log_p_NV, log_q_NV, beta)
    values_N = beta * (log_p_NV.exp() * (log_p_NV - log_m_NV)).sum(-1)
    total_N, grad_NV = kl_of_student(log_q_NV, log_m_NV, 1.0 - beta)
    return values_N + total_N, grad_NV


def near_an_end(*, beta: float) -> str | None:
    """Close to an end of its range the divergence all but vanishes."""
    for near, name in ((0.0, "forward KL"), (1.0, "reverse KL")):
        if abs(beta - near) < 0.05:
            return (
                f"beta {beta:g} is close to {near:g} but is no {name}: the generalised JSD shrinks there "
                f"(about {abs(beta - near):g} of the KL), so the same learning rate does less; "
                f"{near:g} is the {name} itself"
            )
    return None


@LOSSES.register("jsd", source="GKD, arXiv 2306.13649")
@described("generalised JSD", with_gradient=jsd_with_gradient, caution=near_an_end)
def jsd(student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """[N] nats. Raises ValueError unless 0 < beta < 1."""
    log_q_NV, log_p_NV = log_probabilities(student_NV, teacher_NV)
    log_m_NV = _log_mean(log_p_NV, log_q_NV, beta)
    to_teacher_N = (log_p_NV.exp() * (log_p_NV - log_m_NV)).sum(-1)
    to_student_N = (log_q_NV.exp() * (log_q_NV - log_m_NV)).sum(-1)
    return beta * to_teacher_N + (1.0 - beta) * to_student_N


def _log_mean(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; allowed is above 0 and below 1, where it would be forward_kl and reverse_kl")
    return torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
