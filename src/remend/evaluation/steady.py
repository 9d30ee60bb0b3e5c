"""Greedy choices that don't hang on which rows share a batch.

A row's logits differ in their last bits with the shape of the batch that it is computed in: sums run in another order.
Where two tokens are as good as equal, that decides, and the answers part ways. So a step whose two best logits are
closer than TIE (of the largest logit's size) is decided by computing that row alone, without padding and without a
cache, which is the same computation for every batch.

What this guarantees: in float32 greedy answers are the same tokens for any batch, as long as rounding moves a
difference of logits by less than that. Not in bfloat16, whose rounding is larger than most near ties: there the wrapper
changes nothing.

Legend: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remend.errors import InputError

TIE = 1e-4
"""Of the largest logit's size (or of 1, if that is less)."""


class Steady:
    """A model as `TransformersSampler` calls it, with near ties settled; everything else is the model's own.

    It follows the sampler's greedy steps: a new cache is a new batch, rows leave when they chose a token that ends.

    Args:
        model: a transformers causal language model.
        eos: ids that end an answer.
        tie: see TIE.
    """

    def __init__(self, model: Any, eos: Sequence[int], tie: float = TIE) -> None:
        self.model, self.eos, self.tie = model, set(eos), tie
        self.alone = 0
        """Steps that were decided by computing a row alone."""
        self._cache: weakref.ref[Any] | None = None  # weak: a cache that is done with must not outlive its batch
        self._rows: list[list[int]] = []
        self._chosen: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any, **rest: Any) -> Any:
        """The model's output; raises InputError when logits are not finite."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **rest)
        self._follow(input_ids, attention_mask, past_key_values)
        logits_BV = output.logits[:, -1]
        best_B2 = logits_BV.float().topk(2, dim=-1).values
        if not best_B2.isfinite().all():
            raise InputError("the model's logits are not finite: its weights are damaged beyond use")
        if logits_BV.dtype == torch.float32:
            close_B = best_B2[:, 0] - best_B2[:, 1] < self.tie * best_B2[:, 0].abs().clamp(min=1.0)
            for row in close_B.nonzero()[:, 0].tolist():
                logits_BV[row] = self._alone(row)
        self._chosen = logits_BV.argmax(-1).tolist()
        return output

    def _follow(self, tokens_BT: Tensor, mask_BT: Tensor, cache: Any) -> None:
        if self._cache is None or self._cache() is not cache:
            self._cache = weakref.ref(cache)
            pairs = zip(tokens_BT.tolist(), mask_BT.tolist(), strict=True)
            self._rows = [[t for t, real in zip(row, mask, strict=True) if real] for row, mask in pairs]
            return
        stay = [row for row, token in zip(self._rows, self._chosen, strict=True) if token not in self.eos]
        self._rows = [[*row, token] for row, token in zip(stay, tokens_BT[:, 0].tolist(), strict=True)]

    def _alone(self, row: int) -> Tensor:
        self.alone += 1
        tokens_1T = torch.tensor([self._rows[row]], device=self.model.device)
        logits_V: Tensor = self.model(input_ids=tokens_1T, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits_V
