"""Which linear layers of a block read the same input, and which write into the residual stream: found by running it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remend.models.activations.passes import HiddenBatch, run_block


@dataclass(frozen=True)
class Anatomy:
    """A block's linear layers: `groups` share an input, in order of execution; `writers` add to the residual stream."""

    groups: list[list[nn.Linear]]
    writers: list[nn.Linear]


def anatomy_of(block: nn.Module, probe: HiddenBatch, index: int) -> Anatomy:
    """Find out by running the block on a few tokens. Writers are trusted only when they explain all that it adds."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, args[0], output))  # type: ignore[arg-type]

    with ExitStack() as hooks:
        for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
            hooks.callback(layer.register_forward_hook(note).remove)
        added_BTD = run_block(block, probe, index) - probe.states_BTD
    groups: dict[int, list[nn.Linear]] = {}
    for layer, given, _ in calls:  # calls keeps the tensors alive, so no address is used twice
        groups.setdefault(given.data_ptr(), []).append(layer)
    alone = {group[0] for group in groups.values() if len(group) == 1}
    parts = [(layer, out) for layer, _, out in calls if layer in alone and out.shape == added_BTD.shape]
    explained = sum((out for _, out in parts), torch.zeros_like(added_BTD))
    close = float((added_BTD - explained).norm()) <= 1e-3 * float(added_BTD.norm())
    return Anatomy(list(groups.values()), [layer for layer, _ in parts] if close else [])
