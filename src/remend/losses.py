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
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""

CHUNK_BYTES = 32 * 2**20
"""Size of one [chunk, V] float32 tensor: small enough to leave no mark on peak memory, large enough for a good GEMM."""

_FLOOR = (
    -1e4
)  # a logit of −inf (a masked or padded entry) becomes this: its probability is exactly 0, and no NaN arises


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
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; allowed is 0 (forward KL) to 1 (reverse KL)")
    dtype = torch.float64 if student_NV.dtype == torch.float64 else torch.float32
    log_q, log_p = _log_probabilities(student_NV.to(dtype)), _log_probabilities(teacher_NV.detach().to(dtype))
    if beta == 0.0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    to_student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * to_teacher + (1.0 - beta) * to_student


def _log_probabilities(logits_NV: Tensor) -> Tensor:
    floor_N1 = logits_NV.detach().amax(dim=-1, keepdim=True) + _FLOOR
    return torch.log_softmax(torch.maximum(logits_NV, floor_N1), dim=-1)


def chunk_rows(vocabulary: int) -> int:
    """Positions a chunk, so that one float32 [chunk, V] tensor takes CHUNK_BYTES."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _ChunkedSum(torch.autograd.Function):
    """Sum of divergences over positions; the gradient is made chunk by chunk in the forward pass.

    Recomputing the logits in the backward pass would cost one more product with the head, and keeping them would
    cost 4·N·V bytes. Instead each chunk's logits are made, differentiated and dropped at once (the scheme of
    Liger-Kernel's fused linear losses, arXiv 2410.10989), and only the gradients for the hidden states [N, D] and
    the head's parameters stay.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        teacher_NE: Tensor,
        heads: tuple[Head, Head],
        beta: float,
        rows: int,
        *params: Tensor,
    ) -> Tensor:
        student_head, teacher_head = heads
        wants = [student_ND, *params]
        needed = [i for i, need in enumerate([ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]) if need]
        grads: list[Tensor | None] = [torch.zeros_like(t) if i in needed else None for i, t in enumerate(wants)]
        total = torch.zeros((), dtype=torch.float32, device=student_ND.device)
        for start in range(0, student_ND.shape[0], rows):
            part = slice(start, start + rows)
            with torch.no_grad():
                teacher_logits = teacher_head(teacher_NE[part])
            with torch.enable_grad():
                hidden = student_ND[part].detach().requires_grad_()
                loss = divergence(student_head(hidden), teacher_logits, beta).sum()
                inputs = [hidden if i == 0 else wants[i] for i in needed]
                parts = torch.autograd.grad(loss, inputs) if needed else ()
            total += loss.detach().to(total.dtype)
            for i, grad in zip(needed, parts, strict=True):
                target = cast(Tensor, grads[i])
                (target[part] if i == 0 else target).add_(grad)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(grad_outputs[0]) for g in ctx.grads]
        ctx.grads = None
        return (scaled[0], None, None, None, None, *scaled[1:])


def chunked_divergence_sum(
    student_ND: Tensor,
    teacher_NE: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    beta: float = 0.0,
    head_parameters: Sequence[Tensor] = (),
    rows: int | None = None,
) -> Tensor:
    """Sum over positions of `divergence`, from hidden states, with no [N, V] tensor alive at any time.

    Args:
        student_ND: student's hidden states before its head, at completion positions only.
        teacher_NE: teacher's hidden states at the same positions.
        student_head: maps [n, D] to [n, V] logits; gradients reach `head_parameters` through it.
        teacher_head: maps [n, E] to [n, V] logits.
        beta: see `divergence`.
        head_parameters: the tensors inside `student_head` that may need a gradient.
        rows: positions a chunk; by default one chunk of logits takes CHUNK_BYTES.

    Returns:
        Scalar in nats, float32. Call backward on it once.
    """
    if student_ND.shape[0] != teacher_NE.shape[0]:
        raise ValueError(f"{student_ND.shape[0]} student positions and {teacher_NE.shape[0]} teacher positions differ")
    if rows is None:
        with torch.no_grad():
            rows = chunk_rows(student_head(student_ND[:1]).shape[-1])
    result = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
        student_ND, teacher_NE, (student_head, teacher_head), beta, rows, *head_parameters
    )
    return cast(Tensor, result)
