"""How far a student agrees with what a teacher says of given tokens, position by position.

Legend: N completion positions, V vocabulary entries that both models share, K tokens kept by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remend.maths.losses.chunked import HeadTarget, Target
from remend.maths.losses.loss import divergence


@dataclass(frozen=True)
class Agreement:
    """The comparison at each position.

    kl_N: forward KL(teacher ‖ student), nats; of a TopK a lower bound.
    first_N: int64, the teacher's most likely token.
    nll_N: the teacher's negative log-likelihood of the given tokens, nats; in a tail with the whole tail's mass.
    """

    kl_N: Tensor
    first_N: Tensor
    nll_N: Tensor


def agreement(target: Target, logits_NV: Tensor, tokens_N: Tensor) -> Agreement:
    """Compare a student's logits [N, V] with what the teacher says of the same positions, whose tokens are given."""
    if isinstance(target, HeadTarget):
        teacher_NV = target.head(target.states_NE).float()
        nll_N = -torch.log_softmax(teacher_NV, -1).gather(1, tokens_N.unsqueeze(1))[:, 0]
        return Agreement(divergence(logits_NV, teacher_NV), teacher_NV.argmax(-1), nll_N)
    hit_NK = target.ids_NK == tokens_N.unsqueeze(1)
    known_N = target.log_p_NK.masked_fill(~hit_NK, -torch.inf).amax(1)
    nll_N = -torch.where(hit_NK.any(1), known_N, target.log_tail_N)
    first_N = target.ids_NK.gather(1, target.log_p_NK.argmax(1, keepdim=True))[:, 0]
    return Agreement(divergence(logits_NV, target), first_N, nll_N)
