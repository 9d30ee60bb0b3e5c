"""Choose blocks and remove them.

Legend: L blocks, P = L + 1 points between them (0 is what enters the first block), N tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from remend.degrade.making.job import Damage, path_of, rebuild
from remend.errors import InputError
from remend.models.activations import walk
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.registry import Registry

Choice = Callable[[Iterable[Tensor], int], list[int]]
METHODS: Registry[Choice] = Registry("way to choose blocks")

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Configuration entries of transformers that hold one value a block."""


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
    """Configuration of the blocks that stay: their number, and every list with one value a block."""
    changes: dict[str, object] = {"num_hidden_layers": len(kept)}
    for name, value in config.to_dict().items():
        if not isinstance(value, list | tuple) or "layer" not in name or not value:
            continue
        if name not in PER_LAYER or len(value) != depth:
            raise InputError(
                f"the configuration's {name} lists something about blocks that remend can't renumber, so blocks of "
                f"{config.model_type} models can't be removed"
            )
        changes[name] = [value[i] for i in kept]
    return changes


def without_blocks(reference: CausalLM, removed: Iterable[int]) -> tuple[CausalLM, list[int]]:
    """A model without some blocks, and the original indices of those that it keeps.

    Raises InputError for an architecture whose blocks are not where they should be, or can't be renumbered.
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
    return rebuild(reference, changes, state), kept


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
