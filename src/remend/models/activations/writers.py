"""Which layers of a block write into the residual stream, and by which way, found by running it on a few tokens.

A block adds to the stream what its writers give. In most models that is their output as it is, one after the other
(Llama) or side by side (Phi, GPT-NeoX); Granite multiplies it by a number, and Gemma 2 and 3, OLMo 2 and GLM-4 have a
norm behind it. Writers are trusted only when they explain all that the block adds.

Legend: N real tokens, D width of the residual stream, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remend.models.activations.experts import Given, Keywords
from remend.models.activations.passes import HiddenBatch, run_block
from remend.models.activations.walkable import is_stack, sees_some
from remend.models.matrices import Matrix

CLOSE = 1e-3
"""Of what a block adds, the share that may be left unexplained: rounding in float32 is far below it."""


@dataclass(frozen=True)
class Writer:
    """A layer that writes into the stream, by its name in the block.

    given: the module whose output is added: the layer itself, or a norm behind it.
    share: by which that is multiplied.
    offset: of a norm, whose gain is `offset` + its weight; None where there is none.
    """

    layer: str
    given: str
    share: float = 1.0
    offset: float | None = None


@dataclass(frozen=True)
class _Call:
    """One module's call: what it was given and what it gave, [N, D]."""

    module: nn.Module
    given_ND: Tensor | None
    gave_ND: Tensor


@dataclass(frozen=True)
class _Candidate:
    """A layer, and the module behind it (or itself) whose output may be what is added."""

    layer: _Call
    last: _Call


def writers_of(
    block: nn.Module, probe: HiddenBatch, index: int, kept: Mapping[nn.Module, list[Matrix]]
) -> list[Writer] | None:
    """The writers in order of execution; None where they do not explain what the block adds.

    Args:
        block, index: of a healthy model: what a layer of zeros writes can't be seen.
        probe: what enters the block, or anything like it: a sequence without padding.
        kept: the modules that hold matrices, with these.
    """
    names = {m: n for n, m in block.named_modules()}
    calls, added_ND = _watched(block, probe, index)
    layers = [c for c in calls if c.module in kept and not is_stack(kept[c.module]) and not sees_some(names[c.module])]
    plain = [_Candidate(call, call) for call in layers]
    behind = [_Candidate(call, last) for call in layers for last in _behind(call, calls, kept)]
    followed = {c.layer.module for c in behind}
    for candidates in (plain, [c for c in plain if c.layer.module not in followed] + behind):
        shares = _shares(added_ND, [c.last.gave_ND for c in candidates])
        if shares is None:
            continue
        chosen = [(c, share) for c, share in zip(candidates, shares, strict=True) if abs(share) > 0.01]
        found = [_writer(candidate, share, names) for candidate, share in chosen]
        order = {names[call.module]: at for at, call in enumerate(layers)}
        known = [writer for writer in found if writer is not None]
        return sorted(known, key=lambda w: order[w.layer]) if len(known) == len(found) else None
    return None


def gain_of(norm: nn.Module, offset: float) -> Tensor:
    """[D], float32: by which a norm multiplies what it has normalised."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight.detach().float() + offset


def sizes(norm: nn.Module, outputs_ND: Tensor) -> Tensor:
    """[N, 1]: by which an RMS norm divides."""
    eps = float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0)
    return (outputs_ND.square().mean(-1, keepdim=True) + eps).sqrt()


def _watched(block: nn.Module, probe: HiddenBatch, index: int) -> tuple[list[_Call], Tensor]:
    """The calls of modules that give as much as the block, and what the block adds [N, D]."""
    calls: list[_Call] = []
    width, size = probe.states_BTD.shape[-1], probe.states_BTD.numel()

    def rows(value: object) -> Tensor | None:
        if isinstance(value, Tensor) and value.numel() == size and value.shape[-1] == width:
            return value.detach().reshape(-1, width).clone()  # some blocks add to what a layer gave in place
        return None

    def note(module: nn.Module, args: Given, keywords: Keywords, output: object) -> None:
        gave_ND = rows(output)
        if gave_ND is not None:
            calls.append(_Call(module, rows(args[0] if args else next(iter(keywords.values()), None)), gave_ND))

    with ExitStack() as hooks:
        for module in block.modules():
            if module is not block:
                hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        added_BTD = run_block(block, probe, index) - probe.states_BTD
    return calls, added_BTD.reshape(-1, width)


def _behind(layer: _Call, calls: Sequence[_Call], kept: Mapping[nn.Module, list[Matrix]]) -> Iterator[_Call]:
    """The last of the modules without matrices that a layer's output goes through, if they change it."""
    last = layer
    for call in calls[calls.index(layer) + 1 :]:
        holds = any(m in kept for m in call.module.modules())
        if not holds and call.given_ND is not None and call.given_ND.equal(last.gave_ND):
            last = call if not call.gave_ND.equal(last.gave_ND) else last  # dropout does nothing
    if last is not layer:
        yield last


def _shares(added_ND: Tensor, outputs: Sequence[Tensor]) -> list[float] | None:
    """By which each output is multiplied so that they sum to what is added; None where that leaves a rest."""
    if not outputs:
        return None
    outputs_CN = torch.stack([output_ND.flatten() for output_ND in outputs]).double()
    added_N = added_ND.flatten().double()
    scale_C = outputs_CN.norm(dim=1).clamp_min(1e-30)
    unit_CN = outputs_CN / scale_C[:, None]
    share_C = torch.linalg.pinv(unit_CN @ unit_CN.T, hermitian=True, rtol=1e-10) @ (unit_CN @ added_N)
    if float((added_N - share_C @ unit_CN).norm()) > CLOSE * float(added_N.norm()):
        return None
    return [float(share) for share in share_C / scale_C]


def _writer(candidate: _Candidate, share: float, names: Mapping[nn.Module, str]) -> Writer | None:
    """None where what lies behind the layer is no norm that is known."""
    layer, last = candidate.layer, candidate.last
    share = 1.0 if abs(share - 1) < CLOSE else share
    if last is layer:
        return Writer(names[layer.module], names[layer.module], share)
    weight = getattr(last.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != last.gave_ND.shape[-1:]:
        return None
    normed_ND = layer.gave_ND.float() / sizes(last.module, layer.gave_ND.float())
    for offset in (0.0, 1.0):
        left = last.gave_ND - normed_ND * gain_of(last.module, offset)
        if float(left.norm()) <= CLOSE * float(last.gave_ND.norm()):
            return Writer(names[layer.module], names[last.module], share, offset)
    return None
