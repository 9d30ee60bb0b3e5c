"""Sums of a divergence over many positions, chunk by chunk, from hidden states: no tensor of all positions by the whole
vocabulary is ever alive.

Legend: N completion positions, V vocabulary entries that both models share, D width of the student, E width of the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from remend.maths.losses.divergences import (
    _accurate,
    _check_beta,
    _check_target,
    _log_probabilities,
    _truncated_with_gradient,
    _with_gradient,
)
from remend.maths.topk import TopK, check_k
from remend.maths.topk import top_k as largest
from remend.models.device import free_bytes


@dataclass(frozen=True)
class Head:
    """Hidden states [N, D] to logits [N, V]: softcap · tanh(scale · (h Wᵀ + b) / softcap), unset parts left out."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        logits_NV = functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def pull_back(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient at h Wᵀ + b from that at the logits."""
        if self.softcap is not None:
            grad_NV = grad_NV * (1.0 - (logits_NV.to(grad_NV.dtype) / self.softcap).square())
        return grad_NV if self.scale == 1.0 else grad_NV * self.scale

    def detach(self) -> Head:
        """The same head without gradients, on the tensors that it has now."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with its tensors in `dtype`."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return replace(self, weight_VD=self.weight_VD.to(dtype), bias_V=bias_V)


CHUNK_BYTES, CHUNK_LIMIT = 16 * 2**20, 512 * 2**20
"""Least and largest size of one [chunk, V] float32 tensor. The least leaves no mark on a CPU's peak memory and is large
enough for its GEMM; at a vocabulary of 152k it is 27 positions, too few to fill a GPU."""


CHUNK_SHARE = 0.02
"""Of a GPU's free memory that one such tensor takes: about six of them are alive at once."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Positions a chunk, so that one float32 [chunk, V] tensor takes CHUNK_BYTES, on a GPU more where more is free.

    Sums over chunks of other sizes differ by rounding, so a CPU's size is constant: its runs repeat to the byte.
    """
    share = int(CHUNK_SHARE * free_bytes(device)) if device.type == "cuda" else 0
    return max(16, min(CHUNK_LIMIT, max(CHUNK_BYTES, share)) // (4 * vocabulary))


_Loss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Positions and their logits [N, V] to the loss of each [N] and its gradient at the logits [N, V]."""


class _ChunkedSum(torch.autograd.Function):
    """Sum of a loss over positions; the gradient is made chunk by chunk in the forward pass.

    Recomputing the logits in the backward pass would cost one more product with the head, and keeping them would
    cost 4·N·V bytes. Instead each chunk's logits are made, differentiated in closed form and dropped at once (the
    scheme of Liger-Kernel's fused linear losses, arXiv 2410.10989), and only the gradients for the hidden states
    [N, D] and the head [V, D] stay.
    """

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rest: tuple[Head, int, _Loss]
    ) -> Tensor:
        """Value, and the gradients of all inputs kept for backward."""
        student_head, rows, loss = rest
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(t) if t is not None and need else None
            for t, need in zip((student_ND, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        )
        kind, dtype = student_ND.device.type, _product_dtype(student_ND)
        total = torch.zeros((), dtype=_accurate(student_ND.dtype), device=student_ND.device)
        with torch.autocast(kind, enabled=False):
            student_head = student_head.to(dtype)
            for start in range(0, student_ND.shape[0], rows):
                part = slice(start, start + rows)
                hidden_ND = student_ND[part].to(dtype)
                logits_NV = student_head(hidden_ND)
                values_N, grad_NV = loss(part, logits_NV)
                total += values_N.sum()
                grad_NV = student_head.pull_back(grad_NV, logits_NV).to(dtype)
                if to_hidden is not None:
                    to_hidden[part] = grad_NV @ student_head.weight_VD
                if to_weight is not None and to_weight.dtype == dtype:
                    # in place: a [V, D] temporary for each chunk would cost more than the product
                    to_weight.addmm_(grad_NV.T, hidden_ND)
                elif to_weight is not None:
                    to_weight += grad_NV.T @ hidden_ND
                if to_bias is not None:
                    to_bias += grad_NV.sum(0)
        ctx.grads = to_hidden, to_weight, to_bias
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients, scaled."""
        scaled = [None if g is None else g.mul_(grad_outputs[0]) for g in ctx.grads]
        ctx.grads = None
        return (*scaled, None)


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype


def _chunked_sum(student_ND: Tensor, head: Head, rows: int | None, loss: _Loss) -> Tensor:
    rest = (head, rows or chunk_rows(head.weight_VD.shape[0], student_ND.device), loss)
    total = _ChunkedSum.apply(student_ND, head.weight_VD, head.bias_V, rest)  # type: ignore[no-untyped-call]
    return cast(Tensor, total)


def chunked_divergence_sum(
    student_ND: Tensor,
    teacher_NE: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    beta: float = 0.0,
    top_k: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Sum over positions of `divergence`, from hidden states, with no [N, V] tensor alive at any time.

    Under autocast the products with the heads are computed in its dtype, the divergence in float32.

    Args:
        student_ND: student's hidden states before its head, at completion positions only.
        teacher_NE: teacher's hidden states at the same positions.
        student_head, teacher_head: from hidden states to logits over the same V ids. Gradients reach the student's
            hidden states, weight and bias, where they need one.
        beta: see `divergence`.
        top_k: fold both distributions to the teacher's k most likely tokens and a tail; None keeps all.
        rows: positions a chunk; by default see `chunk_rows`.

    Returns:
        Scalar in nats, float32 (float64 for float64 input). Call backward on it once.

    Raises:
        ValueError: positions or vocabularies differ, or beta or top_k is out of range.
    """
    sizes = [
        (hidden.shape[0], head.weight_VD.shape[0])
        for hidden, head in ((student_ND, student_head), (teacher_NE, teacher_head))
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher differ in (positions, vocabulary): {sizes[0]} and {sizes[1]}")
    _check_beta(beta)
    if top_k is not None:
        check_k(top_k, sizes[0][1])
    dtype = _product_dtype(student_ND)
    with torch.no_grad():
        teacher_head = teacher_head.to(dtype)

    def loss(part: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_NV = teacher_head(teacher_NE[part].to(dtype))
        if top_k is None:
            return _with_gradient(logits_NV, teacher_NV, beta)
        return _truncated_with_gradient(logits_NV, largest(teacher_NV, top_k), beta)

    return _chunked_sum(student_ND, student_head, rows, loss)


def chunked_truncated_sum(
    student_ND: Tensor,
    student_head: Head,
    target: TopK,
    *,
    beta: float = 0.0,
    rows: int | None = None,
) -> Tensor:
    """Sum over positions of `truncated_divergence` from stored teacher distributions; see `chunked_divergence_sum`.

    Args:
        target: the teacher's folded distributions at the same positions, on any device.

    Raises:
        ValueError: positions differ in number, an id is outside the head, or beta is outside 0 to 1.
    """
    _check_beta(beta)
    _check_target(target, student_ND.shape[0], student_head.weight_VD.shape[0])

    def loss(part: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        return _truncated_with_gradient(logits_NV, target[part].to(logits_NV.device), beta)

    return _chunked_sum(student_ND, student_head, rows, loss)


def chunked_cross_entropy_sum(student_ND: Tensor, head: Head, targets_N: Tensor, *, rows: int | None = None) -> Tensor:
    """Sum over positions of the cross-entropy −log q(target), from hidden states, with no [N, V] tensor alive.

    Under autocast the products with the head are computed in its dtype, the cross-entropy in float32.

    Args:
        student_ND: hidden states before the head, at completion positions only.
        head: from hidden states to logits. Gradients reach hidden states, weight and bias, where they need one.
        targets_N: int64, the ids to predict, 0 to V − 1.
        rows: positions a chunk; by default see `chunk_rows`.

    Returns:
        Scalar in nats, float32 (float64 for float64 input). Call backward on it once.

    Raises:
        ValueError: hidden states and targets differ in number, or a target is no id of the head.
    """
    vocabulary = head.weight_VD.shape[0]
    if targets_N.shape != student_ND.shape[:1]:
        raise ValueError(f"{student_ND.shape[0]} hidden states and targets {tuple(targets_N.shape)} differ in number")
    if len(targets_N) and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < vocabulary:
        raise ValueError(
            f"targets reach from {int(targets_N.min())} to {int(targets_N.max())}, ids from 0 to {vocabulary - 1}"
        )

    def loss(part: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        log_q_NV = _log_probabilities(logits_NV.to(_accurate(logits_NV.dtype)))
        target_N1 = targets_N[part].unsqueeze(1)
        values_N = -log_q_NV.gather(1, target_N1)[:, 0]
        # the gradient is q − 1 at the target
        return values_N, log_q_NV.exp_().scatter_add_(1, target_N1, log_q_NV.new_full(target_N1.shape, -1.0))

    return _chunked_sum(student_ND, head, rows, loss)
