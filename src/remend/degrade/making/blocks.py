"""Choose blocks and remove them.

Legend: L blocks, P = L + 1 points between them (0 is what enters the first block), N tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from remend.degrade.making.job import Damage, path_of, rebuild
from remend.errors import InputError
from remend.models.activations import walk
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.registry import Registry

Choice = Callable[[Iterable[Tensor], int], list[int]]
METHODS: Registry[Choice] = Registry("way to choose blocks")

LEADING = "first_k_dense_replace"
"""How many blocks at the start have no experts, in models like DeepSeek's."""

NUMBERED = "per_layer_config"
"""What is another in some blocks, by their numbers (transformers' module integrations.heterogeneity)."""

PROBE_TOKENS = 48
NEAR = 1e-3
"""Relative to the largest logit: how far a float32 model without blocks may be from one that passes by them."""


def cosines(points: Iterable[Tensor], distance: int) -> Tensor:
    """How alike the residual stream is before and after every run of `distance` blocks, for every token.

    Args:
        points: the stream [N, D] at each of the P points in order, any float dtype; at most distance + 1 are held.
        distance: 1 … L.

    Returns:
        float32 [P − distance, N] in −1 … 1; 0 where the stream is 0.
    """
    recent: deque[Tensor] = deque(maxlen=distance)
    alike = []
    for point_ND in points:
        if len(recent) == distance:
            alike.append(torch.cosine_similarity(recent[0].float(), point_ND.float(), dim=-1).clamp(-1, 1))
        recent.append(point_ND)
    return torch.stack(alike)


@METHODS.register("block-influence", source="arXiv 2403.03853, equation 1")
def least_influence(points: Iterable[Tensor], count: int) -> list[int]:
    """The `count` blocks of lowest influence 1 − mean cos(block's input, block's output); ties go to the earlier."""
    influence_L = 1 - cosines(points, 1).mean(-1)
    return sorted(torch.sort(influence_L, stable=True).indices[:count].tolist())


@METHODS.register("angular", source="arXiv 2403.17887, equation 7")
def nearest_ends(points: Iterable[Tensor], count: int) -> list[int]:
    """The `count` neighbouring blocks whose ends are at the smallest mean angle arccos(cos) / π.

    The paper takes the angle at the last token of a text alone. A chat answer always ends with the same token, so here
    it is the mean over all tokens.
    """
    angle_S = cosines(points, count).arccos().mean(-1) / math.pi
    first = int(angle_S.argmin())
    return list(range(first, first + count))


def _given(layers: Sequence[int], depth: int) -> list[int]:
    """The given blocks, sorted."""
    outside = [i for i in layers if not 0 <= i < depth]
    if outside:
        raise InputError(f"no such block: {', '.join(map(str, outside))}; the model has blocks 0 to {depth - 1}")
    twice = sorted({i for i in layers if list(layers).count(i) > 1})
    if twice:
        raise InputError(f"blocks given twice: {', '.join(map(str, twice))}; name each once")
    if not layers or len(layers) == depth:
        raise InputError(f"can't remove {len(layers)} of {depth} blocks; allowed is 1 to {depth - 1}")
    return sorted(layers)


def _per_layer(config: PreTrainedConfig, kept: Sequence[int], depth: int) -> dict[str, object]:
    """Configuration of the blocks that stay: their number, and whatever has one value a block or is numbered so."""
    changes: dict[str, object] = {"num_hidden_layers": len(kept)}
    values = config.to_dict()
    if numbered := values.get(NUMBERED):
        of = {int(number): value for number, value in numbered.items()}
        changes[NUMBERED] = {new: of[old] for new, old in enumerate(kept) if old in of}
    for name, value in values.items():
        if not isinstance(value, list | tuple) or "layer" not in name or not value:
            continue
        if len(value) != depth:
            raise InputError(
                f"the configuration's {name} lists something about blocks that remend can't renumber, so blocks of "
                f"{config.model_type} models can't be removed"
            )
        changes[name] = [value[i] for i in kept]
    if leading := getattr(config, LEADING, None):
        changes[LEADING] = sum(i < leading for i in kept)
    return changes


def without_blocks(reference: CausalLM, removed: Iterable[int]) -> tuple[CausalLM, list[int]]:
    """A model without some blocks, and the original indices of those that it keeps.

    Raises InputError for an architecture whose blocks are not where they should be, can't be renumbered, or compute
    something else under another number.
    """
    blocks = decoder_layers(reference)
    gone = set(removed)
    kept = [i for i in range(len(blocks)) if i not in gone]
    changes = _per_layer(reference.config.get_text_config(), kept, len(blocks))
    prefix, place = f"{path_of(reference, blocks)}.", {old: new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in gone:
                continue
            name = f"{prefix}{place[int(number)]}.{rest}"
        state[name] = tensor
    shallower = rebuild(reference, changes, state)
    _require_same_function(reference, {i: blocks[i] for i in sorted(gone)}, shallower)
    return shallower, kept


@torch.no_grad()
def _require_same_function(reference: CausalLM, removed: Mapping[int, nn.Module], shallower: CausalLM) -> None:
    """Compare with the reference whose removed blocks pass their input through: the weights alone don't tell."""
    rows = reference.get_input_embeddings().weight.shape[0]
    tokens_1T = torch.arange(1, 1 + PROBE_TOKENS, device=reference.device).remainder(rows).unsqueeze(0)
    with ExitStack() as hooks:
        for block in removed.values():
            hooks.callback(block.register_forward_hook(_passed_by, with_kwargs=True).remove)
        wanted = reference(input_ids=tokens_1T, use_cache=False).logits
    got, gone = shallower(input_ids=tokens_1T, use_cache=False).logits, ", ".join(map(str, removed))
    if not torch.allclose(got, wanted, atol=NEAR * float(wanted.abs().max()), rtol=0, equal_nan=True):
        raise InputError(
            f"in a {type(reference).__name__} a block's number is part of what it computes: without blocks {gone} the "
            f"others give other logits (by {float((got - wanted).abs().max()):.3g}) than with those passed by. Name "
            "other blocks with --layers (in some models the last can go, in others all but the last), or prune weights "
            "instead"
        )


def _passed_by(_block: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    states = args[0] if args else given["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple | list) else states


def removed_blocks(damage: Damage, layers: int | Sequence[int], method: str) -> list[int]:
    """The numbers of the blocks to remove, rising: the given ones, or as many as asked, chosen by `method`.

    Raises InputError where a block is not there, and where none would stay.
    """
    depth = len(decoder_layers(damage.reference))
    if not isinstance(layers, int):
        return _given(layers, depth)
    if not 0 < layers < depth:
        raise InputError(f"can't remove {layers} of {depth} blocks; allowed is 1 to {depth - 1}")
    return METHODS.get(method)(_points(damage), layers)


def _points(damage: Damage) -> Iterator[Tensor]:
    """The reference's residual stream [N, D] on the calibration text, from before the first block to after the last."""
    text = damage.calibration()
    for index, before_ND, after_ND in walk.block_states(damage.reference, text):
        if index == 0:
            yield before_ND
        yield after_ND
