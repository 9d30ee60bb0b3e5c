"""Whether a model's rows stand by themselves: no token sees a later one, and no row another.

Sequences are padded on the right and scored without a mask, which is right for such models alone. XLNet, or BERT
without `is_decoder`, would be distilled on what they read ahead.

Legend: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor

from remend.errors import InputError
from remend.models.protocols import CausalLM

LENGTH, OPENING = 8, 5
"""Tokens of the row that is tried, and of the row beside it, which is the first one's opening and padding."""

NEAR = 1e-3
"""Relative to the largest logit: how far float32 logits of one opening may differ by what follows it."""

NEAR_ALONE = 1e-2
"""Likewise for a row in a batch and alone, whose products are taken in other orders."""

FAR = 0.05
"""In less exact arithmetic every position must differ by this much: a token may go to another expert now and then."""

SWITCHES = ("is_decoder", "causal")
"""How configurations name that tokens see earlier ones alone."""

_SOUND: WeakSet[CausalLM] = WeakSet()


@torch.no_grad()
def require_causal(model: CausalLM) -> None:
    """Compare a short row alone with the same row beside its padded opening, once a model.

    Raises InputError where logits depend on later tokens, or on other rows.
    """
    if model in _SOUND:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    row_T = torch.arange(1, LENGTH + 1, device=model.device).remainder(rows)
    opening_T = torch.where(torch.arange(LENGTH, device=model.device) < OPENING, row_T, 0)
    alone_TV = _logits(model, row_T[None])[0]
    both_BTV = _logits(model, torch.stack([row_T, opening_T]))
    if not (alone_TV.isfinite().all() and both_BTV.isfinite().all()):
        return  # nothing to compare; who scores the model says that it is damaged
    exact = exact_arithmetic(model, alone_TV)
    alone_T = _differ(alone_TV.float(), both_BTV[0].float())
    ahead_T = _differ(*both_BTV[:, :OPENING].float())
    if float(ahead_T.max()) > NEAR if exact else float(ahead_T.min()) > FAR:
        raise InputError(_reads_ahead(model, float(ahead_T.max())))
    if exact and float(alone_T.max()) > NEAR_ALONE:
        raise InputError(
            f"{type(model).__name__} gives a row other logits beside other rows than alone (by "
            f"{float(alone_T.max()):.2g} of the largest one, on a probe), so it can't be sampled from or scored in "
            "batches"
        )
    _SOUND.add(model)


def exact_arithmetic(model: CausalLM, logits: Tensor) -> bool:
    """Whether the model computes its logits in float32 or better throughout."""
    dtypes = {logits.dtype, *(p.dtype for p in model.parameters())}
    return dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(logits.device.type)


def _logits(model: CausalLM, tokens_BT: Tensor) -> Tensor:
    return model(input_ids=tokens_BT, use_cache=False).logits


def _differ(one_TV: Tensor, other_TV: Tensor) -> Tensor:
    """[T], relative to the largest logit."""
    return (one_TV - other_TV).abs().amax(-1) / one_TV.abs().max()


def _reads_ahead(model: CausalLM, most: float) -> str:
    config = model.config.get_text_config()
    switch = next((name for name in SWITCHES if getattr(config, name, None) is False), None)
    way = f'set "{switch}": true in its config.json if it was trained so, or give' if switch else "give"
    return (
        f"{type(model).__name__} reads ahead: its logits change with later tokens (by {most:.2g} of the largest one, "
        f"on a probe). remend works with causal language models; {way} a model whose tokens see earlier ones alone"
    )
