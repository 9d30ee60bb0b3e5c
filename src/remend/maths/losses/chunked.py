"""Sums of a loss over many positions, chunk by chunk, from hidden states: no tensor of all positions by the whole
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

from remend.maths.losses.loss import Loss, accurate
from remend.maths.topk import TopK, check_k, floored
from remend.maths.topk import top_k as largest


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


@dataclass(frozen=True)
class HeadTarget:
    """A teacher's hidden states and its head, from which its logits are made chunk by chunk.

    states_NE: before the head.
    top_k: fold the distributions to the k most likely tokens and a tail; None keeps all.
    """

    states_NE: Tensor
    head: Head
    top_k: int | None = None

    def __len__(self) -> int:
        return self.states_NE.shape[0]

    def __getitem__(self, part: slice) -> HeadTarget:
        """The positions of a slice."""
        return replace(self, states_NE=self.states_NE[part])

    def to(self, device: torch.device) -> HeadTarget:
        """The same with the states in another device's memory; the head stays where its model is."""
        return replace(self, states_NE=self.states_NE.to(device))

    @torch.no_grad()
    def reader(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Callable[[slice], Tensor | TopK]:
        """A function from positions to the teacher's logits [n, V] there, or to its folded distributions.

        Args:
            vocabulary: ids that the student's head scores.
            dtype: of products with a head.
            device: where the student's logits are.

        Raises ValueError when the two vocabularies don't fit together.
        """
        head = self.head.to(dtype)
        if vocabulary != (theirs := head.weight_VD.shape[0]):
            raise ValueError(f"the student's head scores {vocabulary} ids and the teacher's {theirs}")
        if self.top_k is not None:
            check_k(self.top_k, vocabulary)

        @torch.no_grad()
        def said(part: slice) -> Tensor | TopK:
            logits_NV = head(self.states_NE[part].to(device, dtype))
            return logits_NV if self.top_k is None else largest(logits_NV, self.top_k)

        return said


Target = HeadTarget | TopK
"""What a teacher said at N positions: its states with a head, or stored distributions."""


_Loss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Positions and their logits [N, V] to the loss of each [N] and its gradient at the logits [N, V]."""


class _ChunkedSum(torch.autograd.Function):
    """Sum of a loss over positions; the gradient is made chunk by chunk in the forward pass.

    Recomputing the logits in the backward pass would cost one more product with the head, and keeping them would
    cost 4·N·V bytes. Instead each chunk's logits are made, differentiated and dropped at once (the
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
        total = torch.zeros((), dtype=accurate(student_ND.dtype), device=student_ND.device)
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


def _chunked_sum(student_ND: Tensor, head: Head, rows: int, loss: _Loss) -> Tensor:
    total = _ChunkedSum.apply(student_ND, head.weight_VD, head.bias_V, (head, rows, loss))  # type: ignore[no-untyped-call]
    return cast(Tensor, total)


def chunked_loss_sum(student_ND: Tensor, head: Head, target: Target, loss: Loss, *, rows: int) -> Tensor:
    """Sum of a loss over positions, from hidden states, with no tensor of all positions by the vocabulary.

    Under autocast the products with the heads are computed in its dtype, the loss in float32.

    Args:
        student_ND: student's hidden states before its head, at completion positions only.
        head: from the student's hidden states to logits. Gradients reach hidden states, weight and bias, where they
            need one.
        target: what the teacher said at the same positions.
        loss: between the teacher's distribution and the student's.
        rows: positions a chunk. Sums over chunks of other sizes differ by rounding.

    Returns:
        Scalar in nats, float32 (float64 for float64 input). Call backward on it once.

    Raises:
        ValueError: positions differ in number, or vocabularies or top k don't fit together.
    """
    if len(target) != student_ND.shape[0]:
        raise ValueError(f"the student has {student_ND.shape[0]} positions and the teacher {len(target)}")
    said = target.reader(head.weight_VD.shape[0], _product_dtype(student_ND), student_ND.device)
    return _chunked_sum(student_ND, head, rows, lambda part, logits_NV: loss.with_gradient(logits_NV, said(part)))


def chunked_cross_entropy_sum(student_ND: Tensor, head: Head, targets_N: Tensor, *, rows: int) -> Tensor:
    """Sum over positions of the cross-entropy −log q(target), from hidden states, with no [N, V] tensor alive.

    Under autocast the products with the head are computed in its dtype, the cross-entropy in float32.

    Args:
        student_ND: hidden states before the head, at completion positions only.
        head: from hidden states to logits. Gradients reach hidden states, weight and bias, where they need one.
        targets_N: int64, the ids to predict, 0 to V − 1.
        rows: positions a chunk.

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
        log_q_NV = torch.log_softmax(floored(logits_NV.to(accurate(logits_NV.dtype))), dim=-1)
        target_N1 = targets_N[part].unsqueeze(1)
        values_N = -log_q_NV.gather(1, target_N1)[:, 0]
        # the gradient is q − 1 at the target
        return values_N, log_q_NV.exp_().scatter_add_(1, target_N1, log_q_NV.new_full(target_N1.shape, -1.0))

    return _chunked_sum(student_ND, head, rows, loss)
