"""A causal language model as two parts: a body that makes hidden states and a head that makes logits.

Scoring only some positions, in chunks, needs the two apart. Transformers models agree on the body
(`base_model`) and on the output embedding; a few scale or cap their logits afterwards, which the head repeats.
Whether the two parts give the model's own logits is checked once on a probe, so that a model that does something else
is refused instead of being distilled wrongly.

Legend: B batch, T time, D width, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.maths.losses import Head
from remend.models import adapters
from remend.models.causal import require_causal
from remend.models.protocols import CausalLM
from remend.models.sizes import window

FULL = "full_attention"
"""transformers' name of layers that attend to every earlier token."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the number c where logits are c · tanh(logits / c)."""

NEAR_FLOAT32, NEAR = 1e-3, 1e-2
"""How far logits made of the two parts may be from the model's own, relative to the largest one."""

LEAST_OPENING = 8
"""Tokens that rows must have in common before they are run apart: below, the second pass costs what it saves."""


@dataclass(frozen=True)
class Scorer:
    """A model seen as body and head. Build it with `scorer`; `shared` vocabulary ids, from 0, are scored.

    prefixes: what all rows of a batch open with can be run once, and its keys and values shared.
    transformed: the model changes the body's states once more before its head multiplies them.
    dropout: of an adapter, on in passes that keep gradients; this seeds its draws, with the global generator's state.
    """

    model: CausalLM
    shared: int
    scale: float = 1.0
    softcap: float | None = None
    checkpointing: bool = False
    prefixes: bool = False
    transformed: bool = False
    dropout: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        body, whole = self.model.base_model, cast(nn.Module, self.model)
        return body if body is not whole else whole.get_submodule("model")

    @property
    def head(self) -> Head:
        """The head over the shared ids, on the model's present weights; gradients reach them."""
        embedding = self.model.get_output_embeddings()
        weight_VD, bias_V = embedding.weight, getattr(embedding, "bias", None)
        if self.shared < weight_VD.shape[0]:
            weight_VD, bias_V = weight_VD[: self.shared], None if bias_V is None else bias_V[: self.shared]
        return Head(weight_VD, bias_V, self.scale, self.softcap)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] before the head. Sequences are padded on the right: a causal model's states at real
        positions don't see what follows, so no attention mask is needed and attention keeps its fast causal path."""
        with self._recomputed():
            if self.transformed:
                return self._entering(tokens_BT)
            output = self.body(input_ids=tokens_BT, use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _entering(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D]: what the model gives its output embedding, whose product is left out."""
        met: list[Tensor] = []

        def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            met.append(given[0])
            raise _Stop

        handle = self.model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with suppress(_Stop):
                self.model(input_ids=tokens_BT, use_cache=False)
        finally:
            handle.remove()
        return met[0]

    def states(self, batch: Packed) -> Tensor:
        """[N, D]: the states that predict a batch's completion tokens. What all prompts open with is run once.

        A chat template's system prompt is such an opening: SmolLM2's is 24 of some 44 prompt tokens.
        """
        with self._dropped():
            return self._states(batch)

    def _states(self, batch: Packed) -> Tensor:
        length = self.opening(batch)
        if not length:
            return batch.gather(self.hidden(batch.tokens_BT))
        from transformers import DynamicCache

        body, rows = self.body, len(batch.tokens_BT)
        cache = DynamicCache(config=self.model.config)
        body(input_ids=batch.tokens_BT[:1, :length], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(rows)  # gradients of all rows meet in the one that was computed
        rest = body(input_ids=batch.tokens_BT[:, length:], past_key_values=cache, use_cache=True)
        states_ND: Tensor = rest.last_hidden_state[batch.rows_N, batch.columns_N - length]
        return states_ND

    def opening(self, batch: Packed) -> int:
        """How many tokens all rows open with, before the first position that is asked for; 0 where it doesn't pay."""
        recomputes = self.checkpointing and torch.is_grad_enabled()
        if not self.prefixes or recomputes or len(batch.tokens_BT) < 2 or not len(batch.columns_N):
            return 0
        same_T = (batch.tokens_BT == batch.tokens_BT[:1]).all(dim=0)
        length = min(int(same_T.long().cumprod(0).sum()), int(batch.columns_N.min()))
        return length if length >= LEAST_OPENING else 0

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        if self.dropout is None or not torch.is_grad_enabled():
            yield
            return
        drawn = int(torch.randint(2**62, ()))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), adapters.dropping(self.model):
            torch.manual_seed((self.dropout + drawn) % 2**63)
            yield

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        from transformers.modeling_layers import GradientCheckpointingLayer  # late: it takes seconds to import

        # transformers' layers recompute only in training mode. The mode is set on these layers alone, and for this pass
        # alone: dropout stays off, and sampling keeps its cache.
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        layers = layers if self.checkpointing and torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


class _Stop(Exception):
    """Raised from a hook: the logits of all positions need not be computed."""


def scorer(
    model: CausalLM, shared: int | None = None, *, checkpointing: bool = False, dropout: int | None = None
) -> Scorer:
    """Split `model` into body and head.

    Args:
        model: a transformers causal language model.
        shared: how many vocabulary ids, from 0, the head keeps; None is all.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations (arXiv 1604.06174).
        dropout: switches an adapter's dropout on in passes that keep gradients, and seeds it.

    Raises:
        InputError: the parts don't reproduce the model's own logits, or these depend on later tokens or other rows.
    """
    config = model.config.get_text_config()
    embedding = model.get_output_embeddings()
    if embedding is None:
        raise InputError(f"{type(model).__name__} has no output embedding; remend works with causal language models")
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    vocabulary = embedding.weight.shape[0]
    if checkpointing:
        # a layer that is computed again draws what it drew before: torch keeps the generator's state for it
        again = {} if dropout is None else {"context_fn": lambda: (nullcontext(), adapters.dropping(model))}
        # until transformers 5.22 it had only the name that 6 will take away
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, **again})
    result = Scorer(model, min(shared or vocabulary, vocabulary), scale, softcap, checkpointing, dropout=dropout)
    result = _verified(result)
    return replace(result, prefixes=not result.transformed and _shares_prefixes(result))


@torch.no_grad()
def _verified(parts: Scorer) -> Scorer:
    """The parts, whose logits on a probe are the model's own; with another scale where that alone is missing."""
    probe_BT = torch.arange(1, 9, device=parts.device).remainder(parts.shared).unsqueeze(0)
    own = parts.model(input_ids=probe_BT, use_cache=False).logits[0, :, : parts.shared]
    require_causal(parts.model)
    output = parts.body(input_ids=probe_BT, use_cache=False)
    states_BTD, head = getattr(output, "last_hidden_state", None), parts.head
    if states_BTD is None or states_BTD.shape[-1] != head.weight_VD.shape[1] or own.shape[-1] != len(head.weight_VD):
        width = "no states" if states_BTD is None else f"states of width {states_BTD.shape[-1]}"
        raise _unlike(
            parts.model,
            f"its body gives {width}, and its head, which gives {own.shape[-1]} logits, is a matrix of "
            f"{' x '.join(map(str, head.weight_VD.shape))}",
        )
    hidden_TD = states_BTD[0]
    ours = head(hidden_TD).float()
    exact = own.dtype == hidden_TD.dtype == torch.float32 and not torch.is_autocast_enabled(own.device.type)
    own, near = own.float(), NEAR_FLOAT32 if exact else NEAR
    if not own.isfinite().all():
        raise InputError(
            f"the logits of {parts.model.name_or_path} are not finite on a probe: its weights are damaged beyond use"
        )
    if _same(own, ours, near):
        return parts
    # models name such a factor in many ways (lm_head_multiplier, output_multiplier, …), so it is measured
    plain = replace(parts, scale=1.0, softcap=None).head(hidden_TD).double()
    uncapped = own.double()
    if parts.softcap:
        uncapped = parts.softcap * torch.atanh(uncapped / parts.softcap)
    scaled = replace(parts, scale=float((plain * uncapped).sum() / plain.square().sum()))
    if _same(own, scaled.head(hidden_TD).float(), near):
        return scaled
    through = replace(parts, transformed=True)  # some change the states once more in front of their head
    entering_BTD = through.hidden(probe_BT)
    if entering_BTD.shape == states_BTD.shape and _same(own, parts.head(entering_BTD[0]).float(), near):
        return through
    raise _unlike(parts.model, f"largest difference {float((own - ours).abs().max()):.3g} on a probe")


def _unlike(model: CausalLM, why: str) -> InputError:
    return InputError(
        f"{type(model).__name__} computes its logits in a way that remend does not know ({why}), so it can't be scored "
        "in chunks. Give a model whose logits are its last hidden states times its output embedding"
    )


def _same(own: Tensor, ours: Tensor, near: float) -> bool:
    return torch.allclose(own, ours, atol=near * float(own.abs().max()), rtol=0)


@torch.no_grad()
def _shares_prefixes(parts: Scorer) -> bool:
    """Whether states after a shared opening are those of whole rows; not so where a layer sees a window only."""
    config = parts.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding" if window(config) else FULL]
    if any(kind != FULL for kind in kinds):
        return False
    tokens_BT = torch.arange(1, 41, device=parts.device).reshape(2, 20).remainder(parts.shared)
    tokens_BT[1, :12] = tokens_BT[0, :12]
    pairs = [(row[:14], row[14:]) for row in tokens_BT.tolist()]
    batch = pack(pairs, device=parts.device)
    whole_ND = batch.gather(parts.hidden(batch.tokens_BT)).float()
    try:
        apart_ND = replace(parts, prefixes=True, checkpointing=False).states(batch).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    return torch.allclose(whole_ND, apart_ND, atol=1e-2 * float(whole_ND.abs().max()), rtol=0)


@dataclass(frozen=True)
class Packed:
    """Prompts with completions, padded on the right, and where their completion tokens are predicted.

    tokens_BT: int64, prompt then completion then padding.
    rows_N, columns_N: the position that predicts each completion token, row after row.
    targets_N: those completion tokens.
    """

    tokens_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor

    def gather(self, states_BTD: Tensor) -> Tensor:
        """[N, D]: the states that predict the completion tokens."""
        return states_BTD[self.rows_N, self.columns_N]


def pack(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, device: torch.device, skip_first: int = 0) -> Packed:
    """Lay (prompt, completion) pairs out as a batch, padded on the right with id 0, which is never read.

    The state at position len(prompt) − 1 + t predicts completion token t. Packing the same completions after prompts
    of other lengths therefore gives the same N tokens in the same order: that is how a teacher with another prompt is
    aligned with the student.

    Args:
        pairs: token ids; every prompt has at least one token.
        device: where the tensors go.
        skip_first: completion tokens at the start that are left out.
    """
    width = max(len(p) + len(c) for p, c in pairs)
    tokens_BT = torch.zeros((len(pairs), width), dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, (prompt, completion) in enumerate(pairs):
        if not prompt:
            raise InputError("a prompt has no tokens: there is no position that predicts its first completion token")
        sequence = [*prompt, *completion]
        tokens_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        for t in range(skip_first, len(completion)):
            rows.append(row)
            columns.append(len(prompt) - 1 + t)
            targets.append(completion[t])
    index = [torch.tensor(x, dtype=torch.long, device=device) for x in (rows, columns, targets)]
    return Packed(tokens_BT.to(device), *index)
