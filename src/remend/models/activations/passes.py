"""Forward passes of one block over calibration text that show what its layers were given and what they gave.

Legend: B batch, T time, D width of the residual stream, N real tokens (no padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.models.activations.settled import Settled
from remend.models.layers import decoder_layers
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack

BATCH_TOKENS = 2048
"""Tokens a forward pass of one block: large enough for good products, small enough for a laptop."""


@dataclass
class _Batch:
    """Hidden states of some sequences at one point of the model, and which of their positions are real."""

    states_BTD: Tensor
    real_BT: Tensor
    keywords: list[dict[str, Any]]  # what each block gets beside the hidden states
    precision: AbstractContextManager[Any]  # of forward passes


@torch.no_grad()
def _batches(
    model: Any, rollouts: Sequence[Rollout], precision: AbstractContextManager[Any], once: bool = False
) -> list[_Batch]:
    blocks, result = decoder_layers(model), []
    order = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.completion))
    rows: list[Rollout] = []
    for rollout in order:
        if rows and (len(rows) + 1) * (len(rollout.prompt) + len(rollout.completion)) > BATCH_TOKENS:
            result.append(_start(model, blocks, rows, precision, once))
            rows = []
        rows.append(rollout)
    return [*result, _start(model, blocks, rows, precision, once)]


def _start(
    model: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Rollout],
    precision: AbstractContextManager[Any],
    once: bool = False,
) -> _Batch:
    """What enters the first block, and each block's keywords: the model runs with its blocks passing states through.

    `once`: what all prompts open with (a system prompt) is real in the first row only.
    """
    pairs = [(r.prompt, r.completion) for r in rows]
    tokens_BT = pack(pairs, device=model.device).tokens_BT
    lengths = torch.tensor([len(p) + len(c) for p, c in pairs], device=model.device)
    real_BT = torch.arange(tokens_BT.shape[1], device=model.device) < lengths[:, None]
    if once:
        same_T = (tokens_BT == tokens_BT[:1]).all(dim=0).long().cumprod(0)
        real_BT[1:, : min(int(same_T.sum()), *(len(p) for p, _ in pairs))] = False
    first: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def record(states_BTD: Tensor, **given: Any) -> Tensor:
        first.append(states_BTD)
        keywords.append(given)
        return states_BTD

    with _replaced(blocks, record):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return _Batch(first[0], real_BT, keywords, precision)


@contextmanager
def _replaced(blocks: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Stop(Exception):
    """Raised from a hook: what lies behind it need not be computed."""


def _run(block: nn.Module, batch: _Batch, index: int) -> Tensor:
    with batch.precision:
        output = block(batch.states_BTD, **batch.keywords[index])
    states_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return states_BTD


@dataclass
class _Seen:
    """What one pass through a block showed: inputs and outputs by layer [N, …] in the pass's dtype, what it gives."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    states: list[Tensor]


def _look(
    block: nn.Module,
    batches: Sequence[_Batch],
    index: int,
    *,
    into: Sequence[nn.Module] = (),
    out_of: Sequence[nn.Module] = (),
    stop_at: nn.Module | None = None,
    settled: Settled | None = None,
) -> _Seen:
    """Run the block and keep inputs of `into` and outputs of `out_of`; nothing behind `stop_at`'s input is computed."""
    inputs: dict[nn.Module, list[Tensor]] = {m: [] for m in into}
    outputs: dict[nn.Module, list[Tensor]] = {m: [] for m in out_of}
    states = []
    for number, batch in enumerate(batches):
        real_BT = batch.real_BT

        def on_input(layer: nn.Module, args: tuple[Tensor, ...], real_BT: Tensor = real_BT) -> None:
            inputs[layer].append(args[0][real_BT])
            if layer is stop_at:
                raise _Stop

        def on_output(layer: nn.Module, args: Any, output: Tensor, real_BT: Tensor = real_BT) -> None:
            outputs[layer].append(output[real_BT])

        with ExitStack() as hooks:
            for layer in into:
                hooks.callback(layer.register_forward_pre_hook(on_input).remove)
            for layer in out_of:
                hooks.callback(layer.register_forward_hook(on_output).remove)
            with suppress(_Stop), settled.at(number) if settled else nullcontext():
                states.append(_run(block, batch, index))
    found = {**inputs, **outputs}
    if any(len(parts) != len(batches) for parts in found.values()):
        raise InputError(
            "calibration did not reach a layer once a pass: layers that see some tokens only (experts) "
            "can't be calibrated; use a method without calibration"
        )
    joined = [{m: torch.cat(kind.pop(m)) for m in list(kind)} for kind in (inputs, outputs)]  # parts go one by one
    return _Seen(joined[0], joined[1], states)


def _real(batches: Sequence[_Batch]) -> Tensor:
    return torch.cat([b.states_BTD[b.real_BT].float() for b in batches])
