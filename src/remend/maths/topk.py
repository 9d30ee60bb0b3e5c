"""The teacher's most likely tokens and one bucket for all the others: the full vocabulary folded to k + 1 entries.

Legend for suffixes: N completion positions, V vocabulary entries that both models share, K of them kept by name, K1 the
K and the tail.

Folding adds up probabilities, so both distributions stay distributions: nothing is renormalised, and probability that
the student gives to tokens outside the teacher's top k is charged to the tail (top-k losses without a tail let it go
free). A divergence of folded distributions is never above the full one (the data-processing inequality), and with
k = V it is the full one. What folding hides of forward KL is p(tail) · KL(p given tail ‖ q given tail).

In logits folding is one step. With z the student's logits and c_j = z_j for a kept token, c_tail = log Σ_tail exp z,
the folded distribution is softmax(c). So a gradient G at c is G_j at a kept z_j, and G_tail · q_v / q(tail) at a tail
token's z_v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1e4
"""Below a row's largest logit. A −inf (a masked entry) becomes this: its probability is 0, and no NaN arises."""


@dataclass(frozen=True)
class TopK:
    """A teacher's folded distributions.

    ids_NK: int64, the kept tokens of each position, no id twice in a row.
    log_p_NK: float32, their log-probabilities over the full shared vocabulary, in nats.
    log_tail_N: float32, log-probability of all other tokens together; −inf where there is none. It is kept and not
        derived: 1 − Σ p of rounded values would be off by 1e-7, or by all of a tail that is smaller.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def __getitem__(self, part: slice) -> TopK:
        """The positions of a slice."""
        return TopK(self.ids_NK[part], self.log_p_NK[part], self.log_tail_N[part])

    def to(self, device: torch.device) -> TopK:
        """The same on another device."""
        return TopK(self.ids_NK.to(device), self.log_p_NK.to(device), self.log_tail_N.to(device))

    def check(self, positions: int, vocabulary: int) -> None:
        """Raise ValueError unless these are so many positions, and every id is below `vocabulary`."""
        if len(self) != positions:
            raise ValueError(f"the student has {positions} positions and the teacher's top k {len(self)}")
        if len(self) and not 0 <= int(self.ids_NK.min()) <= int(self.ids_NK.max()) < vocabulary:
            raise ValueError(f"the teacher's top k names id {int(self.ids_NK.max())}, ids go to {vocabulary - 1}")

    def reader(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Callable[[slice], TopK]:
        """A function from positions to their part of this on `device`; see losses.HeadTarget."""
        self.check(len(self), vocabulary)
        return lambda part: self[part].to(device)

    @property
    def folded_NK1(self) -> Tensor:
        """Log-probabilities with the tail last."""
        return torch.cat([self.log_p_NK, self.log_tail_N.unsqueeze(1)], dim=1)


def floored(logits_NV: Tensor) -> Tensor:
    """The logits with nothing further than FLOOR below a row's largest."""
    return torch.maximum(logits_NV, logits_NV.detach().amax(dim=-1, keepdim=True) + FLOOR)


def fold(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the folded distribution: (folded [N, K1], the logits with kept tokens at −inf [N, V]).

    The tail is summed from what is in it, never as 1 − Σ kept. Gradients flow.
    """
    logits_NV = floored(logits_NV)
    rest_NV = logits_NV.scatter(1, ids_NK, -math.inf)
    tail_N1 = torch.logsumexp(rest_NV, dim=-1, keepdim=True)
    return torch.cat([logits_NV.gather(1, ids_NK), tail_N1], dim=1), rest_NV


def unfold_gradient(grad_NK1: Tensor, folded_NK1: Tensor, rest_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The gradient at the logits [N, V] from that at the folded ones; overwrites `rest_NV` (see `fold`)."""
    # an empty tail has −inf on both sides of the difference; above −inf it gives probability 0 and no NaN
    tail_N1 = folded_NK1[:, -1:].clamp(min=torch.finfo(folded_NK1.dtype).min)
    return rest_NV.sub_(tail_N1).exp_().mul_(grad_NK1[:, -1:]).scatter_(1, ids_NK, grad_NK1[:, :-1])


@torch.no_grad()
def top_k(logits_NV: Tensor, k: int) -> TopK:
    """The k most likely tokens of each position, most likely first, and the tail.

    Args:
        logits_NV: the teacher's, any float dtype; computed in float32, or float64 if given so.
        k: 1 to V; at V the tail is empty.

    Raises:
        ValueError: k is outside 1 to V.
    """
    check_k(k, logits_NV.shape[1])
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    ids_NK = logits_NV.topk(k, dim=-1).indices
    log_NK1 = torch.log_softmax(fold(logits_NV, ids_NK)[0], dim=-1)
    return TopK(ids_NK, log_NK1[:, :-1], log_NK1[:, -1])


@torch.no_grad()
def entropy_lost(logits_NV: Tensor, target: TopK) -> Tensor:
    """H(p) − H(p folded) of each position [N], in nats: p(tail) · H(p given tail), what folding says no more of p.

    Args:
        logits_NV: the teacher's, any float dtype.
        target: their own `top_k`.
    """
    folded_NK1, rest_NV = fold(logits_NV.to(target.log_tail_N.dtype), target.ids_NK)
    tail_N1 = folded_NK1[:, -1:].clamp(min=torch.finfo(folded_NK1.dtype).min)
    given_tail_N: Tensor = torch.special.entr(rest_NV.sub_(tail_N1).exp_()).sum(-1)
    return target.log_tail_N.exp() * given_tail_N


def check_k(k: int, vocabulary: int) -> None:
    """Raise ValueError for a k outside 1 to V."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k is {k}; allowed is 1 to the {vocabulary} shared token ids")
