"""Set weights to zero, unstructured or n of every m: how much, the methods, and what describes the result.

Legend: O rows (outputs), I columns (inputs) of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remend.compression import solvers
from remend.degrade.making.job import (
    DENSE_BITS,
    Changed,
    Damage,
    Methods,
    change_each,
    chosen_matrices,
    undivided,
)
from remend.degrade.making.shares import shares
from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.blocks.writing import PlannedFile
from remend.models.layers import count_parameters
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM

MASK_BITS = 1
"""As packed: a kept value takes as many bits as in a dense model; a mask says for each weight whether it is kept.
compressed-tensors' sparse-bitmask stores that one bit, and the hardware form of 2:4 two bits for each kept half."""

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Sparsity:
    """How much is set to zero: a share of the weights, or all but n of every m neighbours in a row."""

    name: str
    share: float
    pattern: tuple[int, int] | None = None

    @property
    def free(self) -> float | None:
        """The share where no pattern fixes it."""
        return None if self.pattern else self.share

    @staticmethod
    def parse(text: str) -> Sparsity:
        """Read '0.5' or '2:4' (2 of 4 are kept). Raises InputError that says what is allowed."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match:
            kept, of = int(match[1]), int(match[2])
            if 0 < kept < of:
                return Sparsity(f"{kept}:{of}", 1 - kept / of, (kept, of))
        else:
            try:
                share = float(text)
            except ValueError:
                share = 0.0
            if 0 < share < 1:
                return Sparsity(f"{share:g}", share)
        raise InputError(
            f'sparsity "{text}" can\'t be used; allowed is a share of zeros between 0 and 1, both excluded, e.g. 0.5, '
            "or n:m with 0 < n < m, which keeps n of every m neighbours in a row, e.g. 2:4"
        )


METHODS: Methods[Callable[[Tensor, Tensor | None, Sparsity], Tensor]] = Methods("pruning method")
"""(weight [O, I], Gram matrix of its inputs [I, I] or None, how much) -> the weight with zeros."""


@METHODS.register("magnitude", source="Han et al., arXiv 1506.02626")
def magnitude(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Keep the weights of largest magnitude, compared within the whole matrix (or each m)."""
    mask_OI = solvers.keep_mask(weight_OI.abs(), per="matrix", sparsity=sparsity.free, pattern=sparsity.pattern)
    return torch.where(mask_OI, weight_OI, 0.0)


@METHODS.register("wanda", source="arXiv 2306.11695, equation 1", calibrated=True)
def wanda(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Keep the weights of largest |weight| · norm of its input, compared within each output row (or each m)."""
    assert gram_II is not None
    scores_OI = solvers.wanda_scores(weight_OI, gram_II)
    mask_OI = solvers.keep_mask(scores_OI, per="row", sparsity=sparsity.free, pattern=sparsity.pattern)
    return torch.where(mask_OI, weight_OI, 0.0)


@METHODS.register("sparsegpt", source="arXiv 2301.00774, algorithm 1", calibrated=True)
def sparsegpt(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Choose the mask block of columns by block and move the kept weights to make good what is lost."""
    assert gram_II is not None
    return solvers.sparsegpt(weight_OI, gram_II, sparsity=sparsity.free, pattern=sparsity.pattern)


@torch.no_grad()
def zero_smallest(weights: Sequence[Tensor], share: float) -> None:
    """Set round(share · all) weights of smallest magnitude over all matrices to zero, in place.

    Exactly that many: among equal magnitudes the first in order go. Needs float32 space for all magnitudes at once.
    """
    magnitudes = torch.cat([w.detach().abs().float().cpu().flatten() for w in weights]).numpy()
    count = round(share * magnitudes.size)
    if count == 0:
        return
    magnitudes.partition(count - 1)
    threshold = float(magnitudes[count - 1])
    ties = count - int((magnitudes[:count] < threshold).sum())
    for weight_OI in weights:
        size = weight_OI.abs().float()
        equal = size == threshold
        gone = equal & (equal.flatten().cumsum(0).view_as(equal) <= ties)
        ties -= int(gone.sum())
        weight_OI[gone | (size < threshold)] = 0


def prune_in_place(
    damage: Damage, sparsity: Sparsity, method: str, scope: str, skip: Sequence[str]
) -> dict[str, Matrix]:
    """Set weights of the student's matrices to zero; returns those matrices.

    Experts that no calibration token came to are pruned by magnitude.

    Raises InputError where m of n:m does not divide the width of one.
    """
    layers, chosen = matrices_for(damage.student, sparsity, skip), METHODS.get(method)

    def zero(matrix: Matrix, gram_II: Tensor | None) -> None:
        apply = magnitude if chosen.calibrated and gram_II is None else chosen.apply
        matrix.weight_OI.copy_(apply(matrix.weight_OI, gram_II, sparsity))

    if scope == "global":
        zero_smallest([matrix.weight_OI for matrix in layers.values()], sparsity.share)
    else:
        change_each(damage.student, layers, zero, damage if chosen.calibrated else None, f"pruning ({method})")
    return layers


def check(sparsity: Sparsity, method: str, scope: str) -> None:
    """Raise InputError for an unknown method or scope, and for those that don't go together."""
    calibrated = METHODS.get(method).calibrated
    if scope not in SCOPES:
        raise InputError(f'unknown scope "{scope}"; allowed: {", ".join(SCOPES)}')
    if scope == "global" and sparsity.pattern:
        raise InputError(f"{sparsity.name} fixes the share of zeros in every layer, so scope global can't change it")
    if scope == "global" and calibrated:
        raise InputError(
            f"scope global is for magnitude; {method} scores weights by their layer's inputs, so its scores can't be "
            "compared between layers"
        )


def matrices_for(model: CausalLM, sparsity: Sparsity, skip: Sequence[str]) -> dict[str, Matrix]:
    """The matrices that are pruned, by name. Raises InputError where m of n:m does not divide the width of one."""
    layers = chosen_matrices(model, skip)
    if sparsity.pattern and (named := undivided(layers, sparsity.pattern[1])):
        raise InputError(
            f"{sparsity.name} needs input widths that {sparsity.pattern[1]} divides, which it does not in {named}; "
            "choose another pattern, or skip those layers"
        )
    return layers


@dataclass(frozen=True)
class SetToZero:
    """`prune_in_place` block by block, layer for layer and without calibration; see by_block.BlockWork."""

    sparsity: Sparsity
    method: str
    entry: JsonObject

    def chosen(self, model: CausalLM) -> dict[str, Matrix]:
        """See BlockWork."""
        return matrices_for(model, self.sparsity, self.entry["skip"])

    def beside(self, chosen: Mapping[str, Matrix], directory: Path) -> list[PlannedFile]:
        """Nothing: the zeros are the mask."""
        return []

    def change(self, matrix: Matrix) -> dict[str, Tensor]:
        """See BlockWork."""
        matrix.weight_OI.copy_(METHODS.get(self.method).apply(matrix.weight_OI, None, self.sparsity))
        return {}

    def changed(self, model: CausalLM, chosen: Mapping[str, Matrix], zeros: Mapping[str, int]) -> Changed:
        """See BlockWork."""
        return _described(model, chosen, self.entry, zeros)


def described(student: CausalLM, layers: Mapping[str, Matrix], entry: JsonObject) -> Changed:
    """A pruned model with its part of degradation.json: `entry`, and what is zero of `layers`.

    Raises InputError where matrices hold no zeros that no skip pattern names; over all layers at once that may be.
    """
    zeros = {matrix.key: int((matrix.weight_OI == 0).sum()) for matrix in matrices(student).values()}
    return _described(student, layers, entry, zeros)


def _described(student: CausalLM, layers: Mapping[str, Matrix], entry: JsonObject, zeros: Mapping[str, int]) -> Changed:
    """`zeros`: of each of the decoder's matrices, by its key."""
    sizes = {matrix.key: matrix.weight_OI.numel() for matrix in layers.values()}
    total = sum(sizes.values())
    share = sum(zeros[key] for key in sizes) / max(1, total)
    decoder = shares(student, "masked", {k for k in sizes if zeros[k]}, entry["skip"], refuse=entry["scope"] == "layer")
    every = sum(zeros.values()) / max(1, sum(m.weight_OI.numel() for m in matrices(student).values()))
    entry = {"kind": "pruning", **entry, "matrices": len(layers), "sparsity": every, "decoder": decoder}
    of_these = DENSE_BITS * (1 - share) + MASK_BITS
    packed = round(total * of_these / 8) + (count_parameters(student) - total) * DENSE_BITS // 8
    bits = (total * of_these + (decoder["weights"] - total) * DENSE_BITS) / decoder["weights"]
    return Changed(student, entry, bits_per_weight=bits, packed_bytes=packed)
