"""Choose channels of every MLP and heads of every attention, and remove the others.

Channels and heads are scored by their activations on the reference's own text, as in Minitron (arXiv 2407.14679,
section 2.2); each block keeps its own best ones, and all blocks the same number, since a standard configuration has one
number for all.

Legend: N tokens, C channels of an MLP, D width of the residual stream, G groups of heads that share keys and values,
H numbers (heads a group × head size) of one group in the attention's output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from remend.degrade.making.job import Changed, Damage, path_of, rebuild
from remend.errors import InputError
from remend.models.find import OWN_FOLDER
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout

WIDTH_FILE = "width.safetensors"
MULTIPLE = 32
"""Widths are rounded to it where that leaves something to drop: quantization groups then still divide them."""


class _Block(NamedTuple):
    """The parts of one decoder block before which something is dropped, with the prefix of their names."""

    prefix: str
    down: nn.Linear
    attention_out: nn.Linear


def _blocks(model: CausalLM) -> list[_Block]:
    layers = decoder_layers(model)
    root, blocks = path_of(model, layers), []
    for index, layer in enumerate(layers):
        named = dict(layer.named_modules())
        parts = [named.get(n) for n in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")]
        linear = [part for part in parts if isinstance(part, nn.Linear)]
        if len(linear) < len(parts):
            raise InputError(
                f"block {index} of {type(model).__name__} is not made of mlp.gate_proj, up_proj, down_proj and "
                "self_attn.o_proj, so its width can't be cut; depth and mask pruning need no such names"
            )
        blocks.append(_Block(f"{root}.{index}.", *linear[2:]))
    return blocks


@torch.no_grad()
def scores(model: CausalLM, rollouts: Sequence[Rollout]) -> tuple[list[Tensor], list[Tensor]]:
    """How much each block's channels and groups of heads do on calibration text.

    Args:
        model: its blocks have mlp.gate_proj, up_proj, down_proj and self_attn.o_proj.
        rollouts: calibration text; prompts and completions both count.

    Returns:
        A block each, float64: [C] mean |input of down_proj| · norm of its column there, and [G] mean norm of the
        group's part of the input of o_proj.
    """
    blocks, count = _blocks(model), model.config.get_text_config().num_key_value_heads
    channels = [torch.zeros(block.down.in_features, dtype=torch.float64) for block in blocks]
    groups = [torch.zeros(count, dtype=torch.float64) for _ in blocks]

    with ExitStack() as hooks:
        for block, sum_C, sum_G in zip(blocks, channels, groups, strict=True):
            for layer, total, heads in ((block.down, sum_C, None), (block.attention_out, sum_G, count)):
                hooks.callback(layer.register_forward_pre_hook(partial(_add, total, heads)).remove)
        for rollout in rollouts:  # one at a time: no padding among the tokens
            tokens_BT = torch.tensor([rollout.prompt + rollout.completion], device=model.device)
            model.base_model(input_ids=tokens_BT, use_cache=False)
    tokens = sum(len(rollout.prompt) + len(rollout.completion) for rollout in rollouts)
    norms_C = [torch.linalg.vector_norm(block.down.weight.double(), dim=0).cpu() for block in blocks]
    means_C = [sum_C / tokens * norm_C for sum_C, norm_C in zip(channels, norms_C, strict=True)]
    return means_C, [sum_G / tokens for sum_G in groups]


def _add(total: Tensor, groups: int | None, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Add to `total`, over tokens, the magnitude of each input of a layer, or the norm of each of `groups` of them."""
    x_NC = args[0].flatten(0, -2)
    sizes = x_NC.abs() if groups is None else torch.linalg.vector_norm(x_NC.reshape(len(x_NC), groups, -1), dim=-1)
    total.add_(sizes.double().sum(0).cpu())


def kept_width(width: int, drop: float) -> int:
    """What is left of `width` channels without a share `drop`, rounded to a multiple of 32 where possible."""
    exact = round(width * (1 - drop))
    rounded = round(width * (1 - drop) / MULTIPLE) * MULTIPLE
    return rounded if 0 < rounded < width else exact


def best(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores in rising order, int64; ties go to the earlier."""
    return torch.sort(score, descending=True, stable=True).indices[:count].sort().values


def narrowed(reference: CausalLM, channels: Sequence[Tensor] | None, groups: Sequence[Tensor] | None) -> CausalLM:
    """A model that keeps only some MLP channels and groups of heads.

    Args:
        reference: stays as it is.
        channels: for each block the kept channels, rising, the same number everywhere; None keeps all.
        groups: for each block the kept groups of heads (those that share one key-value head); None keeps all.

    Raises:
        InputError: the architecture can't have such a configuration.
    """
    config = reference.config.get_text_config()
    blocks, state = _blocks(reference), dict(reference.state_dict())
    changes: dict[str, int] = {}
    if channels is not None:
        changes["intermediate_size"] = len(channels[0])
        for block, kept_C in zip(blocks, channels, strict=True):
            for name in ("gate_proj", "up_proj"):
                _take(state, f"{block.prefix}mlp.{name}", kept_C, 0)
            _take(state, f"{block.prefix}mlp.down_proj", kept_C, 1)
    if groups is not None:
        old, ratio = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        size = blocks[0].attention_out.in_features // config.num_attention_heads
        count = len(groups[0])
        changes |= {"num_attention_heads": count * ratio, "num_key_value_heads": count, "head_dim": size}
        for block, kept_G in zip(blocks, groups, strict=True):
            shared_H = torch.arange(old * size).view(old, size)[kept_G].flatten()
            query_H = torch.arange(old * ratio * size).view(old, ratio * size)[kept_G].flatten()
            for name, kept_H in (("q_proj", query_H), ("k_proj", shared_H), ("v_proj", shared_H)):
                _take(state, f"{block.prefix}self_attn.{name}", kept_H, 0)
            _take(state, f"{block.prefix}self_attn.o_proj", query_H, 1)
    return rebuild(reference, changes, state)


def _take(state: dict[str, Tensor], layer: str, kept: Tensor, dim: int) -> None:
    """Keep some of a layer's outputs (dim 0, with their biases) or inputs (dim 1)."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in state and dim < state[name].ndim:
            state[name] = state[name].index_select(dim, kept.to(state[name].device))


def narrower(damage: Damage, ffn: float, heads: int) -> Changed:
    """The reference without a share `ffn` of every MLP's channels and `heads` groups of heads, the least active ones.

    Raises InputError for an architecture without these parts, and where none would stay.
    """
    config, blocks = damage.reference.config.get_text_config(), _blocks(damage.reference)
    width, groups = blocks[0].down.in_features, config.num_key_value_heads
    if not 0 <= heads < groups:
        raise InputError(f"can't drop {heads} of {groups} groups of heads a block; allowed is 0 to {groups - 1}")
    if len({b.down.in_features for b in blocks}) > 1:
        raise InputError("the MLPs of this model differ in width, which one standard configuration can't shrink")
    count = kept_width(width, ffn)
    if ffn and not 0 < count < width:
        raise InputError(f"ffn {ffn} of {width} channels leaves {count}; it must drop some and keep some")
    channel_scores, group_scores = scores(damage.reference, damage.calibration())
    kept_channels = [best(score_C, count) for score_C in channel_scores] if ffn else None
    kept_groups = [best(score_G, groups - heads) for score_G in group_scores] if heads else None
    student = narrowed(damage.reference, kept_channels, kept_groups)
    tensors = {
        f"{block.prefix}{name}": kept.to(torch.int32)
        for name, all_kept in (("mlp.channels", kept_channels), ("self_attn.groups", kept_groups))
        for block, kept in zip(blocks, all_kept or (), strict=False)
    }
    content: bytes = save(tensors, metadata={"remend_width": "1"})
    config = student.config.get_text_config()
    entry = {
        "kind": "pruning",
        "method": "width",
        "ffn": ffn,
        "heads": heads,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "kept_channels": hashlib.sha256(content).hexdigest(),
    }

    def write(target: Path) -> None:
        (target / OWN_FOLDER).mkdir(exist_ok=True)
        (target / OWN_FOLDER / WIDTH_FILE).write_bytes(content)

    return Changed(student, entry, write)
