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

from remend.console import warn
from remend.errors import InputError
from remend.models.causal import exact_arithmetic, require_causal
from remend.models.protocols import CausalLM
from remend.models.sizes import window

NEAR = 1e-2
"""Relative to the largest logit: how far float32 logits may differ."""

MOST_KL, NEAR_TIE = 0.05, 0.25
"""In less exact arithmetic: nats per token, and by how many nats the first choice may lead one that is taken for it."""

NOISE = 3.0
"""In less exact arithmetic a cache may be off by so many times what plain passes of a batch are (experts switch)."""

_PROBE = (7, 3)
"""Tokens of two prompts: the second is padded, and goes on alone."""

_BEYOND = (3, -1)
"""The same, counted from a window: the first prompt leaves it, the second one's answer does."""

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
        from remend.models.sampling.kv_cache import decoding_cache  # late: it waits for transformers

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
        from transformers.cache_utils import LinearAttentionCacheLayerMixin

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


_TRUSTED: WeakKeyDictionary[CausalLM, dict[tuple[int, ...], bool]] = WeakKeyDictionary()
"""By the lengths of the prompts that a model was tried on."""


@torch.no_grad()
def decoding(model: CausalLM, prompts: Sequence[Sequence[int]], new: int) -> Decoding:
    """Rows of prompts to decode from, in the way that gives the model's own logits.

    A model is tried out once: seven forward passes of at most nine tokens, and as many beyond the window that its
    configuration names, once rows may leave it.

    Args:
        model: any.
        prompts: token ids.
        new: the most tokens that will be added to one.

    Raises:
        InputError: not even plain passes give a row the same logits alone and beside others.
    """
    require_causal(model)
    longest, edge = max(map(len, prompts)) + new, window(model.config.get_text_config())
    trusted = _tried(model, _PROBE)
    if trusted and edge and longest > edge:
        trusted = _tried(model, tuple(max(1, edge + more) for more in _BEYOND))
    return (Cached if trusted else Whole)(model, prompts)


def _tried(model: CausalLM, lengths: tuple[int, ...]) -> bool:
    known = _TRUSTED.setdefault(model, {})
    if lengths not in known:
        known[lengths] = _trusts_cache(model, lengths)
    return known[lengths]


def _trusts_cache(model: CausalLM, lengths: tuple[int, ...]) -> bool:
    rows = model.get_input_embeddings().weight.shape[0]
    prompts = [[(1 + i + 8 * at) % rows for i in range(length)] for at, length in enumerate(lengths)]
    first, second = ([*prompt, *more] for prompt, more in zip(prompts, _NEXT, strict=True))
    own_BV = torch.cat([_alone(model, first[:-1])[-1:], _alone(model, second)[-2:]])
    if not own_BV.isfinite().all():
        return True  # nothing to compare; who scores the model says that it is damaged
    exact, cached = exact_arithmetic(model, own_BV), None
    where = f" in rows of {max(lengths)} tokens" if lengths != _PROBE else ""
    try:
        cached = _difference(own_BV, _probed(Cached(model, prompts)), exact)
        why = f"its cache gives other logits than a plain pass{where} (by {cached.largest:.3g})"
    except InputError:
        raise
    # of the model's own code nothing is known: XLM states by an assertion that it takes no mask of a cache's length
    except Exception as error:
        why = f"its cache can't be used{where} ({type(error).__name__})"
    if cached and cached.close:
        return True
    if cached and not exact and cached.kl <= NOISE * _difference(own_BV, _probed(Whole(model, prompts)), exact).kl:
        return True
    warn(f"{type(model).__name__}: {why}, so its answers are decoded without one, which takes longer")
    return False


def _alone(model: CausalLM, tokens: Sequence[int]) -> Tensor:
    """[T, V]."""
    return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]


def _probed(rows: Decoding) -> Tensor:
    """[3, V]: both rows' logits after one token, and the second one's after two, when it is alone."""
    device = rows.logits().device
    first, second = torch.tensor(_NEXT, device=device).T
    rows.extend(first, None)
    early_BV = rows.logits()
    rows.extend(second, torch.tensor([1], device=device))
    return torch.cat([early_BV, rows.logits()])


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
