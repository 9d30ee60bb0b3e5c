"""How a model is asked for its next tokens, and whether its cache can be trusted with it.

Most models keep what they have read in a key-value cache; some take their state under another name, keep it in a cache
that no one else can fill, or have none. What a cache gives is compared with plain passes once per model. A model whose
cache does something else is read anew for every token: slow, but right.

Legend: B active rows, V vocabulary, T tokens so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from remend.console import warn
from remend.errors import InputError
from remend.models.protocols import CausalLM
from remend.models.sampling.kv_cache import decoding_cache

NEAR = 1e-2
"""Relative to the largest logit: how far float32 logits may differ."""

MOST_KL, NEAR_TIE = 0.05, 0.25
"""In less exact arithmetic: nats per token, and by how many nats the first choice may lead one that is taken for it."""

NOISE = 3.0
"""In less exact arithmetic a cache may be off by so many times what plain passes of a batch are (experts switch)."""

_PROBE = ((1, 2, 3, 4, 5, 6, 7), (9, 8, 7))
"""Two prompts: the second is padded, and goes on alone."""

_NEXT = ((5, 6), (2, 4))
"""The tokens that follow them."""


class Decoding(Protocol):
    """Rows that grow by a token at a time."""

    def logits(self) -> Tensor:
        """[B, V] of the next tokens."""

    def extend(self, tokens_B: Tensor, keep: Tensor | None) -> None:
        """Add a token to every row, then keep only the rows `keep` (indices, rising); None keeps all."""


class Cached:
    """Decoding with the model's cache; rows are padded on the left."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        self._model = model
        self._tokens_BT = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        self._mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        self._position_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)
        self._cache = decoding_cache(model.config)
        # a model of states alone names its cache so, and takes a mask as long as what it reads
        self._states_alone = not takes(model, "past_key_values") and takes(model, "cache_params")

    def logits(self) -> Tensor:
        """See Decoding."""
        mask_BT = self._mask_BT
        if self._states_alone and self._tokens_BT.shape != mask_BT.shape:
            mask_BT = mask_BT[:, -self._tokens_BT.shape[1] :]
        output = self._model(
            input_ids=self._tokens_BT,
            attention_mask=mask_BT,
            position_ids=self._position_BT,
            use_cache=True,
            logits_to_keep=1,
            **{"cache_params" if self._states_alone else "past_key_values": self._cache},
        )
        return output.logits[:, -1]

    def extend(self, tokens_B: Tensor, keep: Tensor | None) -> None:
        """See Decoding."""
        self._tokens_BT = tokens_B.unsqueeze(1)
        if keep is not None:
            self._tokens_BT = self._tokens_BT[keep]
            self._mask_BT, self._position_BT = self._mask_BT[keep], self._position_BT[keep]
            for layer in self._cache.layers:
                # layers with states can't select rows by that name, or select those of their keys alone
                states = isinstance(layer, LinearAttentionCacheLayerMixin)
                layer.reorder_cache(keep) if states else layer.batch_select_indices(keep)
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(self._tokens_BT), 1)], dim=1)
        self._position_BT = self._position_BT[:, -1:] + 1


class Whole:
    """Decoding by plain passes over all tokens so far, as the scorer does them: rows are padded on the right."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._rows = [list(p) for p in prompts]

    def logits(self) -> Tensor:
        """See Decoding."""
        width, device = max(map(len, self._rows)), self._model.device
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in self._rows], device=device)
        last_B = torch.tensor([len(row) - 1 for row in self._rows], device=device)
        logits_BTV = self._model(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV[torch.arange(len(last_B), device=device), last_B]

    def extend(self, tokens_B: Tensor, keep: Tensor | None) -> None:
        """See Decoding."""
        rows = [[*row, token] for row, token in zip(self._rows, tokens_B.tolist(), strict=True)]
        self._rows = rows if keep is None else [rows[i] for i in keep.tolist()]


def takes(model: CausalLM, name: str) -> bool:
    """Whether the model's forward pass has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


_TRUSTED: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()


@torch.no_grad()
def decoding(model: CausalLM, prompts: Sequence[Sequence[int]]) -> Decoding:
    """Rows of prompts to decode from, in the way that gives the model's own logits.

    A model is tried out once: five forward passes of at most nine tokens.

    Raises InputError where not even plain passes give a row the same logits alone and beside others.
    """
    if model not in _TRUSTED:
        _TRUSTED[model] = _trusts_cache(model)
    return (Cached if _TRUSTED[model] else Whole)(model, prompts)


def _trusts_cache(model: CausalLM) -> bool:
    own_BV = torch.cat([_alone(model, [*_PROBE[0], *_NEXT[0][:1]]), _alone(model, [*_PROBE[1], *_NEXT[1]])])
    if not own_BV.isfinite().all():
        return True  # nothing to compare; who scores the model says that it is damaged
    dtypes = {own_BV.dtype, *(p.dtype for p in model.parameters())}
    exact = dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(own_BV.device.type)
    cached, why = None, ""
    try:
        cached = _difference(own_BV, _probed(Cached(model, _PROBE)), exact)
        why = f"its cache gives other logits than a plain pass (by {cached.largest:.3g})"
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = f"its cache can't be used ({type(error).__name__})"
    if cached and cached.close:
        return True
    whole = _difference(own_BV, _probed(Whole(model, _PROBE)), exact)
    if cached and not exact and cached.kl <= NOISE * whole.kl:
        return True
    if exact and not whole.close:
        raise InputError(
            f"{type(model).__name__} gives a row other logits beside other rows than alone (by {whole.largest:.3g} on "
            "a probe), so it can't be sampled from or scored in batches"
        )
    warn(f"{type(model).__name__}: {why}, so its answers are decoded without one, which takes longer")
    return False


def _alone(model: CausalLM, tokens: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[:, -1]


def _probed(rows: Decoding) -> Tensor:
    """[2, V]: the first row's logits after one token, the second one's after two, when it is alone."""
    device = rows.logits().device
    first, second = torch.tensor(_NEXT, device=device).T
    rows.extend(first, None)
    early_BV = rows.logits()
    rows.extend(second, torch.tensor([1], device=device))
    return torch.cat([early_BV[:1], rows.logits()])


@dataclass(frozen=True)
class _Difference:
    """Of logits from those of plain passes; `close` is the verdict."""

    largest: float
    kl: float
    close: bool


def _difference(own_BV: Tensor, other_BV: Tensor, exact: bool) -> _Difference:
    own_BV, other_BV = own_BV.float(), other_BV.float()
    largest = float((own_BV - other_BV).abs().max())
    own, other = own_BV.log_softmax(-1), other_BV.log_softmax(-1)
    kl = float((own.exp() * (own - other)).sum(-1).max())
    lead = float((own.amax(-1, keepdim=True) - own.gather(1, other.argmax(-1, keepdim=True))).max())
    close = largest <= NEAR * float(own_BV.abs().max()) if exact else kl <= MOST_KL and lead <= NEAR_TIE
    return _Difference(largest, kl, close)
