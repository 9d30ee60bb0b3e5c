"""Blocks of a model whose weights stay in its safetensors files until they are needed.

The model is transformers' own, whole but for its blocks' parameters, which have shapes and no numbers (they are on the
meta device). While a block runs, its parameters are views of the files, or float32 copies where the files hold shorter
numbers; then they are let go. So sampling, scoring and the calibration walk work on such a model as on any other, and
compute the same, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from remend.errors import FileError
from remend.files.atomic import JsonObject, new_file
from remend.models.blocks.files import TensorFiles, digest_of
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM

_ABOUT = "remend_block"


class Elsewhere:
    """Blocks that get their weights while they run, or while somebody holds them; see Blocks.

    Args:
        model: its blocks' parameters are on the meta device.
    """

    def __init__(self, model: CausalLM) -> None:
        self.items = list(decoder_layers(model))
        self.empty = [dict(block.named_parameters()) for block in self.items]
        self._held = [0] * len(self.items)
        for index, block in enumerate(self.items):
            block.register_forward_pre_hook(_Enter(self, index))
            block.register_forward_hook(_Leave(self, index), always_call=True)

    @property
    def count(self) -> int:
        """See Blocks."""
        return len(self.items)

    @contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """See Blocks. What is written into the weights inside is gone afterwards, unless `write` gets them."""
        self.take(index, own=True)
        try:
            yield self.items[index]
        finally:
            self.let_go(index)

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """See Blocks."""
        raise NotImplementedError

    def take(self, index: int, *, own: bool = False) -> None:
        """Give a block its weights; `own`: as copies that may be changed."""
        if self._held[index] == 0:
            for name, weight in self.weights(index, own=own):
                put(self.items[index], name, nn.Parameter(weight, requires_grad=False))
        self._held[index] += 1

    def let_go(self, index: int) -> None:
        """Undo one `take`; with the last one the weights go. After a `take` that failed it does nothing."""
        self._held[index] = max(0, self._held[index] - 1)
        if self._held[index] == 0:
            for name, parameter in self.empty[index].items():
                put(self.items[index], name, parameter)

    def weights(self, index: int, *, own: bool) -> Iterator[tuple[str, Tensor]]:
        """A block's weights by their names in it, one after the other; see `take`."""
        raise NotImplementedError


class OnDisk(Elsewhere):
    """See Blocks; `opening.from_disk` makes it.

    Args:
        model: its blocks' parameters are on the meta device.
        files: hold every tensor of the model by its name there.
        device, dtype: where a block's weights come, and as what.
        what: the model's name, for messages.

    Attributes:
        again: opens the same model once more, with weights in float32.
    """

    def __init__(
        self, model: CausalLM, files: TensorFiles, device: torch.device, dtype: torch.dtype, what: str
    ) -> None:
        super().__init__(model)
        self._files, self._device, self.dtype, self._what = files, device, dtype, what
        self.again: Callable[[], CausalLM] | None = None
        names = {id(module): name for name, module in model.named_modules()}
        self._prefixes = [names[id(block)] for block in self.items]
        self._sound: set[int] = set()
        self._changed: dict[int, TensorFiles] = {}
        self._directory: Path | None = None

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """See Blocks; into the directory of `keep_changes`."""
        self.write_about(index, tensors, {}, {})

    def keep_changes(self, directory: Path | None) -> None:
        """From now on `write` puts blocks into a directory, and those that lie there count; None forgets them again.

        Raises FileError for one that is damaged.
        """
        self._directory, self._changed = directory, {}
        for index in range(self.count) if directory else ():
            path = self._path(index)
            if path.is_file():
                self._changed[index] = _verified(path)

    def write_about(
        self, index: int, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor], about: JsonObject
    ) -> None:
        """`write`, with tensors that are no weights (codes, say) and what else is known of the block."""
        path = self._path(index)
        content = {f"weight.{name}": _plain(tensor) for name, tensor in tensors.items()}
        content |= {f"beside.{name}": _plain(tensor) for name, tensor in beside.items()}
        told = {_ABOUT: json.dumps({**about, "sha256": digest_of(content)})}
        with new_file(path) as temporary:
            save_file(content, temporary, metadata=told)
        self._changed[index] = TensorFiles.of([path])

    def written(self, index: int) -> tuple[Mapping[str, Tensor], JsonObject] | None:
        """What `write_about` got beside a block's weights, and about it; None for one that was not written."""
        files = self._changed.get(index)
        if files is None:
            return None
        names = [name for name in files.places if name.startswith("beside.")]
        about = json.loads(files.metadata(self._path(index))[_ABOUT])
        return {name.removeprefix("beside."): files.read(name) for name in names}, about

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        """Inside, blocks have the weights of the model's own files."""
        kept, self._changed = self._changed, {}
        try:
            yield
        finally:
            self._changed = kept

    def weights(self, index: int, *, own: bool) -> Iterator[tuple[str, Tensor]]:
        """See Elsewhere. Raises FileError for numbers that are none."""
        for name in self.empty[index]:
            weight = self._stored(index, name).to(self._device, self.dtype, copy=own)
            if index not in self._sound:
                require_finite(f"{self._prefixes[index]}.{name}", weight, self._what)
            yield name, weight
        self._sound.add(index)

    def _stored(self, index: int, name: str) -> Tensor:
        changed = self._changed.get(index)
        if changed is not None and f"weight.{name}" in changed.places:
            return changed.read(f"weight.{name}")
        return self._files.read(f"{self._prefixes[index]}.{name}")

    def _path(self, index: int) -> Path:
        assert self._directory is not None, "keep_changes comes first"
        return self._directory / f"block-{index:05}.safetensors"


class _Enter:
    def __init__(self, blocks: Elsewhere, index: int) -> None:
        self.blocks, self.index = blocks, index

    def __call__(self, block: nn.Module, args: object) -> None:
        if "forward" not in vars(block):  # else something runs in the block's place, and asks for no weights
            self.blocks.take(self.index)


class _Leave(_Enter):
    def __call__(self, block: nn.Module, args: object, output: Any = None) -> None:
        if "forward" not in vars(block):
            self.blocks.let_go(self.index)


def put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let a block have another parameter of that name."""
    owner, _, own = name.rpartition(".")
    block.get_submodule(owner)._parameters[own] = parameter


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _verified(path: Path) -> TensorFiles:
    files = TensorFiles.of([path])
    try:
        told = json.loads(files.metadata(path).get(_ABOUT, "{}")).get("sha256")
    except ValueError:
        told = None
    if told != digest_of({name: files.read(name) for name in files.places}):
        raise FileError(
            f"{path} changed since it was written; remove it and those after it, and give the command again"
        )
    return files


def require_finite(name: str, weight: Tensor, what: str) -> None:
    """Raise FileError for a weight that holds NaN or infinity."""
    if weight.numel() and not all(edge.isfinite() for edge in weight.aminmax()):
        count = int((~weight.isfinite()).sum())
        raise FileError(
            f"the model of {what} is broken: {count} of {weight.numel()} numbers of {name} are NaN or infinite; give a "
            "version of it from before that happened"
        )
