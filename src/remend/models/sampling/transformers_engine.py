"""Sample completions with transformers.

Legend: B active rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remend.data.order import batches_by_length
from remend.data.templates import Encoded
from remend.models.protocols import CausalLM
from remend.models.sampling.decoding import decoding
from remend.models.sampling.prepacked import packed_linears
from remend.models.sampling.rollout import Rollout

ROWS = 64
"""That are sampled at once where nobody says."""


@dataclass
class TransformersSampler:
    """Batched decoding with transformers' cache, or without it where it can't be trusted.

    Every row draws from its own uniform numbers by inverting the cumulative distribution, so that a row's tokens don't
    depend on which rows share its batch but for the rounding of products, and finished rows can leave the batch. top-p
    is 1: a truncated distribution would not be the policy whose divergence is taken.

    Args:
        shared: only ids below it are sampled (both models must know them).
        eos: ids that end a completion; the ending token belongs to it.
        max_rows: of a batch. Products of another number of rows may be summed in another order, which can turn one
            token into another: hardly ever in float32, often in bfloat16.
        shown: answer the teacher's prompts instead, where there are any.
    """

    model: CausalLM
    shared: int
    eos: tuple[int, ...]
    max_rows: int = ROWS
    on_rows: Callable[[int], None] | None = None
    shown: bool = False

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        uniform = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )
        asked = [p.shown if self.shown and p.shown else p.tokens for p in prompts]
        results: dict[int, Rollout] = {}
        with packed_linears(self.model):
            for rows in batches_by_length([len(tokens) for tokens in asked], rows=self.max_rows):
                completions = self._decode([asked[i] for i in rows], uniform[rows], temperature)
                for i, tokens in zip(rows, completions, strict=True):
                    clipped = not tokens or tokens[-1] not in self.eos
                    results[i] = Rollout(prompts[i].id, prompts[i].tokens, tuple(tokens), clipped, prompts[i].shown)
                if self.on_rows:
                    self.on_rows(len(rows))
        return [results[i] for i in range(len(prompts))]

    def _decode(self, prompts: list[tuple[int, ...]], uniform: Tensor, temperature: float) -> list[list[int]]:
        device = self.model.device
        uniform = uniform.to(device)
        active = torch.arange(len(prompts), device=device)
        ends = torch.tensor(self.eos, device=device)
        rows = decoding(self.model, prompts, uniform.shape[1])
        completions: list[list[int]] = [[] for _ in prompts]
        for t in range(uniform.shape[1]):
            tokens_B = choose(rows.logits()[:, : self.shared], uniform[active, t], temperature)
            for row, token in zip(active.tolist(), tokens_B.tolist(), strict=True):
                completions[row].append(token)
            open_B = ~torch.isin(tokens_B, ends)
            if not open_B.any():
                break
            keep = None if open_B.all() else open_B.nonzero()[:, 0]
            active = active if keep is None else active[keep]
            rows.extend(tokens_B, keep)
        return completions


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """One token a row: the most likely one at temperature 0, else the quantile `uniform_B` of softmax(logits / T).

    Args:
        logits_BV: any float dtype.
        uniform_B: float64 in [0, 1).
        temperature: 0 or more.

    Returns:
        [B] int64.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).cumsum(-1, dtype=torch.float64)
    draw_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    # right=True: the first entry above the draw, so an entry of probability 0 is never chosen
    return torch.searchsorted(cumulative_BV, draw_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
