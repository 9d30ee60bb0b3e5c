"""Open a model whose blocks stay on the disk, and say why one can't be opened so."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from remend.errors import InputError
from remend.models.accounting import LEFT_OUT, patterns
from remend.models.blocks import blocks_in, register
from remend.models.blocks.born import Born
from remend.models.blocks.disk import OnDisk, require_finite
from remend.models.blocks.files import TensorFiles
from remend.models.find import ModelSource, fetch_model, weight_files
from remend.models.layers import decoder_layers
from remend.models.load import account_of_files, empty_model, empty_of, load_config
from remend.models.packed_weights import packing
from remend.models.protocols import CausalLM

if TYPE_CHECKING:
    from remend.models.accounting import Account


def not_on_disk(source: ModelSource) -> str | None:
    """Why the blocks of a local model can't be read one by one, or None, as far as its kind of files tells."""
    if source.kind == "gguf":
        return "it is a GGUF file, which is dequantized as a whole"
    if source.kind != "directory" or source.path is None:
        return "it is an adapter on a base" if source.base else "it is not fetched yet"
    method = packing(source.path).get("quant_method")
    if method:
        return f"its weights are packed by {method}, which are unpacked as a whole"
    return None


def from_disk(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    in_memory: bool = False,
    files: TensorFiles | None = None,
) -> CausalLM:
    """The model in evaluation mode, with its blocks on the disk (see `disk`) and the rest in memory; nothing trains.

    Args:
        source: a directory of plain safetensors.
        device, dtype: of the weights when they are in memory.
        attention: transformers' attn_implementation; None leaves it to transformers.
        files: hold the model's tensors by their names there; None takes the directory's own, which must be plain.
        in_memory: the files are read once, into the CPU's memory, and blocks come from there.

    Raises:
        InputError: the files can't be read block by block, with the reason and what to do.
        FileError: what `load_model` raises for names, shapes and numbers; of a block's when it is first read.
    """
    source = fetch_model(source, weights=True)
    if files is None and (reason := not_on_disk(source)):
        raise _refusal(source, reason)
    assert source.path is not None
    model = empty_model(source, copy.deepcopy(load_config(source)), attention)
    if files is None:
        account, files = account_of_files(source), TensorFiles.of(weight_files(source.path))
        _require_plain(model, account, files, source)
        if account.left_out:
            setattr(model.config, LEFT_OUT, patterns(account.left_out))
    _fill_outside(model, files, device, dtype, source.spec)
    if in_memory:
        files.keep(pinned=device.type == "cuda")
    model.eval().requires_grad_(False)
    blocks = OnDisk(model, files, device, dtype, source.spec)
    blocks.again = lambda: from_disk(source, device=device, attention=attention, in_memory=in_memory)
    register(model, blocks)
    return model


def as_float32(model: CausalLM) -> CausalLM:
    """A model whose blocks are on the disk, with weights in float32: itself, or opened once more."""
    blocks = blocks_in(model)
    assert isinstance(blocks, OnDisk)
    return model if blocks.dtype == torch.float32 or blocks.again is None else blocks.again()


def born(model: CausalLM, seed: int) -> CausalLM:
    """The architecture of a model whose blocks are on the disk, with the weights that it is born with (see `born`)."""
    blocks = blocks_in(model)
    assert isinstance(blocks, OnDisk)
    made = empty_of(model)
    drawn = Born(made, seed, model.device, blocks.dtype)
    inside = {id(module) for block in decoder_layers(made) for module in block.modules()}
    outer = [m for m in made.modules() if id(m) not in inside and dict(m.named_parameters(recurse=False))]
    for number, module in enumerate(outer):
        drawn.outside(module, number)
    made.tie_weights()
    register(made, drawn)
    return made.eval().requires_grad_(False)


def _refusal(source: ModelSource, reason: str) -> InputError:
    return InputError(
        f"{source.spec} can't be read block by block from the disk: {reason}. Write it as plain safetensors with "
        "remend export --format dense, or leave placement to auto"
    )


def _require_plain(model: CausalLM, account: Account, files: TensorFiles, source: ModelSource) -> None:
    """Every tensor of the model is one of the files, by its own name."""
    for target, names in account.sources.items():
        if names != [target] or files.shape(target) != tuple(model.state_dict()[target].shape):
            raise _refusal(source, f"transformers makes {target} of {', '.join(names[:2])} while it loads")
    blocks = set(map(id, decoder_layers(model)))
    for name, module in model.named_modules():
        if id(module) in blocks and any(f"{name}.{own}" not in files.places for own, _ in module.named_parameters()):
            raise _refusal(source, f"parameters of {name} are shared with other blocks")


@torch.no_grad()
def _fill_outside(model: CausalLM, files: TensorFiles, device: torch.device, dtype: torch.dtype, what: str) -> None:
    """Give what is no block its numbers. A tensor that several names share is read once."""
    inside = {id(module) for block in decoder_layers(model) for module in block.modules()}
    groups: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and id(module) not in inside:
                groups.setdefault(id(parameter), []).append((f"{name}.{own}", module, own))
    for sharers in groups.values():
        stored = next(name for name, _, _ in sharers if name in files.places)
        weight = files.read(stored).to(device, dtype)
        require_finite(stored, weight, what)
        parameter = nn.Parameter(weight, requires_grad=False)
        for _, module, own in sharers:
            module._parameters[own] = parameter
    for name, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{name}.{own}"
                kept = files.read(full).to(buffer.dtype) if full in files.places else buffer
                module._buffers[own] = kept.to(device)
