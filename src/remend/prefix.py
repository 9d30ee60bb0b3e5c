"""Weights for tokens that an older student sampled, when a batch of rollouts is used for several updates.

The divergence at a position sums over the whole vocabulary, so the sampled token's own ratio corrects nothing there.
What the older student decided is how often the position's prefix comes up. So position t of a completion y is weighted

    w_t = clip(exp Σ_{s<t} (log q_new(y_s) − log q_old(y_s)), 1/c, c),    w_1 = 1,

without a gradient of its own: the per-decision importance weight of the prefix (Precup et al. 2000), clipped since a
product of many ratios has a variance that grows with t.

Legend: N completion positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from remend.maths.topk import floored


@dataclass(frozen=True)
class PrefixWeights:
    """What the weights are made of.

    targets_N: int64, the sampled tokens.
    rows_N: int, the sequence of each position. The positions of a sequence stand together and in order.
    log_q_old_N: log-probability, in nats, of each sampled token under the student that sampled it.
    clip: c, 1 or more; at 1 every weight is 1.
    skip_first: positions at the start of each sequence that get weight 0, which leaves them out of the loss, while
        their ratios count for all that follow. Hand in the hidden states of these positions too.

    Raises:
        ValueError: lengths differ, or clip or skip_first is out of range.
    """

    targets_N: Tensor
    rows_N: Tensor
    log_q_old_N: Tensor
    clip: float
    skip_first: int = 0

    def __post_init__(self) -> None:
        sizes = {name: tuple(getattr(self, name).shape) for name in ("targets_N", "rows_N", "log_q_old_N")}
        if len(set(sizes.values())) != 1 or self.targets_N.dim() != 1:
            raise ValueError(f"targets, rows and old log-probabilities differ in number: {sizes}")
        if not self.clip >= 1.0:
            raise ValueError(f"clip is {self.clip}; allowed is 1 (no weighting) or more")
        if self.skip_first < 0:
            raise ValueError(f"skip_first is {self.skip_first}; allowed is 0 or more")

    def __len__(self) -> int:
        return len(self.targets_N)

    def start(self) -> Callable[[slice, Tensor], Tensor]:
        """A function from positions and the student's logits [n, V] there to their weights [n].

        Call it once for each chunk, in order: a sequence's sum of ratios is carried from chunk to chunk.
        """
        rows_N = (self.rows_N[1:] != self.rows_N[:-1]).cumsum(0)
        rows_N = torch.cat([rows_N.new_zeros(1), rows_N])[: len(self)]  # 0, 1, …: sorted, whatever the numbers were
        skipped_N = torch.arange(len(self), device=rows_N.device) - _first(rows_N) < self.skip_first
        bound = math.log(self.clip)
        carried = torch.zeros((), dtype=torch.float64, device=rows_N.device)
        last = rows_N.new_full((), -1)

        @torch.no_grad()
        def weights(part: slice, logits_NV: Tensor) -> Tensor:
            nonlocal carried, last
            log_q_N, rows = token_log_probabilities(logits_NV, self.targets_N[part]), rows_N[part]
            ratio_N = log_q_N.double() - self.log_q_old_N[part].double()
            before_N = ratio_N.cumsum(0) - ratio_N
            before_N = before_N - before_N[_first(rows)] + torch.where(rows == last, carried, 0.0)
            carried, last = before_N[-1] + ratio_N[-1], rows[-1]
            weight_N = before_N.clamp(-bound, bound).exp().masked_fill(skipped_N[part], 0.0)
            return weight_N.to(log_q_N.dtype)

        return weights


def _first(rows_N: Tensor) -> Tensor:
    """Index of the first position of each position's row; rows_N is sorted."""
    return torch.searchsorted(rows_N, rows_N)


def token_log_probabilities(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log q(target) at each position [N], in nats: float32, float64 for float64 logits."""
    logits_NV = floored(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)))
    return logits_NV.gather(1, targets_N.unsqueeze(1))[:, 0] - torch.logsumexp(logits_NV, dim=-1)
