"""A decoder's blocks one at a time: whatever looks at a model layer by layer needs no more of it in memory.

A model that is in memory has its blocks at hand. One that was opened `from_disk` is the same model of transformers,
with everything but its blocks in memory; a block's weights are there while it runs, and while somebody holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM

__all__ = ["Blocks", "InMemory", "blocks_in", "by_block", "named_weights", "part_of", "parts_of", "register"]


class Blocks(Protocol):
    """The blocks of one model, wherever their weights are kept."""

    @property
    def count(self) -> int:
        """How many there are."""

    def at(self, index: int) -> AbstractContextManager[nn.Module]:
        """Inside, a block has its weights, on the model's device; they may be changed, and `write` keeps that."""

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """From now on a block has these weights, by their names in the block; others stay. It need not be held."""


@dataclass(frozen=True)
class InMemory:
    """Blocks of a model that is whole in memory: what is written into them is there at once."""

    model: CausalLM

    @property
    def count(self) -> int:
        """See Blocks."""
        return len(decoder_layers(self.model))

    @contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """See Blocks."""
        yield decoder_layers(self.model)[index]

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """See Blocks."""
        own = dict(decoder_layers(self.model)[index].named_parameters())
        for name, tensor in tensors.items():
            if tensor.data_ptr() != own[name].data_ptr():
                own[name].detach().copy_(tensor)


_ELSEWHERE: WeakKeyDictionary[CausalLM, Blocks] = WeakKeyDictionary()
"""Of models whose blocks are not in memory."""


def register(model: CausalLM, blocks: Blocks) -> None:
    """Say where a model's blocks are, if not in memory."""
    _ELSEWHERE[model] = blocks


def blocks_in(model: CausalLM) -> Blocks:
    """A model's blocks."""
    return _ELSEWHERE.get(model) or InMemory(model)


def by_block(model: CausalLM) -> bool:
    """Whether a model's blocks are kept elsewhere than in memory."""
    return model in _ELSEWHERE


def parts_of(model: CausalLM) -> range:
    """Numbers of the parts whose weights are in memory at once; a model in memory is one part."""
    return range(_ELSEWHERE[model].count + 1 if model in _ELSEWHERE else 1)


@contextmanager
def part_of(model: CausalLM, number: int) -> Iterator[Mapping[str, nn.Module]]:
    """Modules of a part by their full names, with their weights: of a block, or after the last one all others."""
    if model not in _ELSEWHERE:
        yield dict(model.named_modules())
        return
    blocks, items = _ELSEWHERE[model], decoder_layers(model)
    inside = [{id(module) for module in block.modules()} for block in items]
    if number < len(items):
        with blocks.at(number):
            yield {name: module for name, module in model.named_modules() if id(module) in inside[number]}
        return
    some = set().union(*inside)
    yield {name: module for name, module in model.named_modules() if id(module) not in some}


def named_weights(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name, shared ones once. Nothing may be kept of one once the next is asked for."""
    for number in parts_of(model):
        met: set[int] = set()  # of this part: blocks share nothing, and what is let go leaves its id to others
        with part_of(model, number) as modules:
            for name, module in modules.items():
                for own, parameter in module.named_parameters(recurse=False):
                    if id(parameter) not in met:
                        met.add(id(parameter))
                        yield f"{name}.{own}" if name else own, parameter.detach()
