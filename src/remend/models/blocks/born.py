"""Blocks with the weights that an architecture is born with, drawn anew whenever one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.data.order import derive_seed
from remend.models.blocks.disk import Elsewhere, put
from remend.models.protocols import CausalLM


class Born(Elsewhere):
    """See Blocks. Each block has its own draws, so they are others than those of a model that is made in one go.

    Args:
        model: its blocks' parameters are on the meta device.
        seed: of the draws.
        device, dtype: of the weights.
    """

    def __init__(self, model: CausalLM, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(model)
        self._model, self._seed, self._device, self._dtype = model, seed, device, dtype

    def weights(self, index: int, *, own: bool) -> Iterator[tuple[str, Tensor]]:
        """See Elsewhere."""
        yield from self._drawn(self.items[index], index)

    def outside(self, module: nn.Module, number: int) -> None:
        """Give a module outside of the blocks its own weights, for good."""
        for name, weight in self._drawn(module, self.count + number):
            put(module, name, nn.Parameter(weight, requires_grad=False))

    @torch.no_grad()
    def _drawn(self, module: nn.Module, number: int) -> Iterator[tuple[str, Tensor]]:
        empty = dict(module.named_parameters())
        for name, parameter in empty.items():
            put(module, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._seed, "born", number) % 2**31)
            for part in module.modules():
                cast(PreTrainedModel, self._model)._init_weights(part)
        for name, weight in module.named_parameters():
            yield name, weight.detach().to(self._device, self._dtype)
