"""Reverse KL, KL(q ‖ p) = Σ q (log q − log p): it seeks the teacher's modes.

p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

from torch import Tensor

from remend.maths.losses.loss import LOSSES, described, log_probabilities


def kl_of_student(log_q_NV: Tensor, log_m_NV: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """weight · KL(q ‖ m) [N] and, with g = weight · q (log q − log m), g − q Σ g [N, V]; overwrites `log_q_NV`.

    That is the gradient at the student's logits of its KL from a constant m, and that of the generalised JSD, in whose
    gradient the terms from ∂m cancel.
    """
    q_NV = log_q_NV.exp()
    inner_NV = log_q_NV.sub_(log_m_NV).mul_(q_NV).mul_(weight)
    total_N = inner_NV.sum(-1)
    return total_N, inner_NV.sub_(q_NV.mul_(total_N.unsqueeze(-1)))


def reverse_kl_with_gradient(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N] and their gradient at the student's logits [N, V]."""
    return kl_of_student(*log_probabilities(student_NV, teacher_NV))


@LOSSES.register("reverse_kl", source="MiniLLM, arXiv 2306.08543")
@described("reverse KL, student‖teacher", with_gradient=reverse_kl_with_gradient)
def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N] nats."""
    log_q_NV, log_p_NV = log_probabilities(student_NV, teacher_NV)
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
