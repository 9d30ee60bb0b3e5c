"""Layers of a decoder: its blocks, its linear layers, and which of a reference's they are, found by comparing weights.

Legend: O rows (outputs) of a student's matrix, P rows of the reference's, I columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.models.matrices import matrices
from remend.models.protocols import CausalLM


def kept_weights(model: CausalLM) -> dict[str, Tensor]:
    """For every matrix of the decoder that holds a zero a bool [O, I] by its key: True where it is not zero."""
    kept = {matrix.key: matrix.weight_OI != 0 for matrix in matrices(model).values()}
    return {key: kept_OI for key, kept_OI in kept.items() if not bool(kept_OI.all())}


def decoder_layers(model: CausalLM) -> nn.ModuleList:
    """The decoder's blocks. Raises InputError for a model that does not keep them in one list."""
    for path in ("layers", "h", "decoder.layers", "language_model.layers", "model.layers", "blocks"):
        blocks: object = model.base_model
        for part in path.split("."):
            blocks = getattr(blocks, part, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    raise InputError(
        f"{type(model).__name__} does not keep its blocks in a list that remend knows (layers, h, blocks), so "
        "methods that go through it block by block can't be used; rtn and magnitude need no such walk, and "
        "recover does without it by repair: false"
    )


@torch.no_grad()
def infer_layer_map(student: CausalLM, teacher: CausalLM) -> list[int]:
    """Which of the teacher's blocks each of the student's is: the rising assignment whose weights differ least.

    Raises InputError when the student has more blocks than the teacher.
    """
    from remend.models.blocks import blocks_in  # late: it looks for a decoder's blocks here

    ours, theirs = decoder_layers(student), decoder_layers(teacher)
    if len(ours) > len(theirs):
        raise InputError(
            f"the student has {len(ours)} layers and the teacher {len(theirs)}: it is no pruned copy of that one "
            "(to recover it all the same, set repair: false)"
        )
    if len(ours) == len(theirs):
        return list(range(len(ours)))
    spare = len(theirs) - len(ours)
    best = torch.full((len(ours) + 1, len(theirs) + 1), float("inf"))
    best[0, : spare + 1] = 0
    for s in range(len(ours)):
        for t in range(s, s + spare + 1):  # no other of the teacher's blocks leaves enough for the rest
            with blocks_in(student).at(s), blocks_in(teacher).at(t):
                cost = _difference(ours[s], theirs[t])
            best[s + 1, t + 1] = torch.minimum(best[s + 1, t], best[s, t] + cost)
    chosen, t = [], len(theirs)
    for s in range(len(ours), 0, -1):
        while best[s, t - 1] <= best[s, t]:
            t -= 1
        t -= 1
        chosen.append(t)
    return chosen[::-1]


def _difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Relative squared difference of the parameters that have one shape in both blocks."""
    healthy, total, size = dict(theirs.named_parameters()), 0.0, 0.0
    for name, parameter in ours.named_parameters():
        if name in healthy and healthy[name].shape == parameter.shape:
            total += float((parameter.float() - healthy[name].float()).square().sum())
            size += float(parameter.float().square().sum())
    return total / size if size else 0.0


@torch.no_grad()
def infer_rows(ours_OI: Tensor, theirs_PI: Tensor) -> Tensor | None:
    """Which of a wider layer's outputs each output of a narrower one is: int64 [O], the nearest row of weights.

    None where that is no choice of some of them (inputs of another width, more outputs, one row taken twice).
    """
    if ours_OI.shape[1] != theirs_PI.shape[1] or len(ours_OI) > len(theirs_PI):
        return None
    nearest_O = torch.cdist(ours_OI.float(), theirs_PI.float()).argmin(dim=1)
    return nearest_O if len(set(nearest_O.tolist())) == len(nearest_O) else None


def count_parameters(model: CausalLM) -> int:
    """Number of a model's parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
