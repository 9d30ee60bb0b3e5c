"""Forward KL, KL(p ‖ q) = Σ p (log p − log q): every published SDFT result used it.

p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

from torch import Tensor

from remend.maths.losses.loss import LOSSES, described, log_probabilities


def forward_kl_with_gradient(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N] and their gradient at the student's logits [N, V], q − p."""
    log_q_NV, log_p_NV = log_probabilities(student_NV, teacher_NV)
    q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
    return log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1), q_NV.sub_(p_NV)


@LOSSES.register("forward_kl", source="SDFT, arXiv 2601.19897")
@described("forward KL, teacher‖student", with_gradient=forward_kl_with_gradient)
def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N] nats."""
    log_q_NV, log_p_NV = log_probabilities(student_NV, teacher_NV)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
