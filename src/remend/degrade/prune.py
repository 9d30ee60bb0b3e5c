"""Set weights to zero, unstructured or n of every m, and save a plain transformers directory.

remend degrade prune smollm2 --method wanda --sparsity 2:4 --out student

The zeros themselves are the mask: nothing else is stored.

Legend: O rows (outputs), I columns (inputs) of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from remend.compression import solvers
from remend.degrade.job import DENSE_BITS, Changed, Job, Options, chosen_layers, run_job, share_of_zeros
from remend.errors import InputError
from remend.models.activations import walk
from remend.registry import Registry

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


def bits_per_weight(sparsity: float) -> float:
    """As packed, for a measured share of zeros: 16 · (1 − sparsity) + 1."""
    return DENSE_BITS * (1 - sparsity) + MASK_BITS


Method = Callable[[Tensor, Tensor | None, Sparsity], Tensor]
METHODS: Registry[Method] = Registry("pruning method")
CALIBRATED = frozenset({"wanda", "sparsegpt"})


@METHODS.register("magnitude", source="Han et al., arXiv 1506.02626")
def magnitude(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Keep the weights of largest magnitude, compared within the whole matrix (or each m)."""
    mask_OI = solvers.keep_mask(weight_OI.abs(), per="matrix", **_amount(sparsity))
    return torch.where(mask_OI, weight_OI, 0.0)


@METHODS.register("wanda", source="arXiv 2306.11695, equation 1")
def wanda(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Keep the weights of largest |weight| · norm of its input, compared within each output row (or each m)."""
    assert gram_II is not None
    mask_OI = solvers.keep_mask(solvers.wanda_scores(weight_OI, gram_II), per="row", **_amount(sparsity))
    return torch.where(mask_OI, weight_OI, 0.0)


@METHODS.register("sparsegpt", source="arXiv 2301.00774, algorithm 1")
def sparsegpt(weight_OI: Tensor, gram_II: Tensor | None, sparsity: Sparsity) -> Tensor:
    """Choose the mask block of columns by block and move the kept weights to make good what is lost."""
    assert gram_II is not None
    return solvers.sparsegpt(weight_OI, gram_II, **_amount(sparsity))


def _amount(sparsity: Sparsity) -> dict[str, Any]:
    return {"pattern": sparsity.pattern} if sparsity.pattern else {"sparsity": sparsity.share}


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


def _fitting(layers: Mapping[str, nn.Linear], sparsity: Sparsity) -> None:
    if sparsity.pattern is None:
        return
    bad = [f"{n} ({m.in_features})" for n, m in layers.items() if m.in_features % sparsity.pattern[1]]
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise InputError(
            f"{sparsity.name} needs input widths that {sparsity.pattern[1]} divides, which it does not in {named}; "
            "choose another pattern, or skip those layers"
        )


@torch.no_grad()
def prune_in_place(job: Job, layers: Mapping[str, nn.Linear], sparsity: Sparsity, method: str, scope: str) -> None:
    """Set weights of `layers` (of job.student) to zero. A calibrated method sees what the layers pruned before gave."""
    apply = METHODS.get(method)
    if method in CALIBRATED:

        def visit(sites: walk.Sites) -> None:
            for name, layer in zip(sites.names, sites.layers, strict=True):
                if name in layers:
                    layer.weight.copy_(apply(layer.weight, sites.gram_II, sparsity))

        text = job.calibration()
        walk.walk(job.student, text, visit, title=f"pruning ({method})")
    elif scope == "global":
        zero_smallest([layer.weight for layer in layers.values()], sparsity.share)
    else:
        for layer in layers.values():
            layer.weight.copy_(apply(layer.weight, None, sparsity))


def _check(sparsity: Sparsity, method: str, scope: str) -> None:
    METHODS.get(method)
    if scope not in SCOPES:
        raise InputError(f'unknown scope "{scope}"; allowed: {", ".join(SCOPES)}')
    if scope == "global" and sparsity.pattern:
        raise InputError(f"{sparsity.name} fixes the share of zeros in every layer, so scope global can't change it")
    if scope == "global" and method in CALIBRATED:
        raise InputError(
            f"scope global is for magnitude; {method} scores weights by their layer's inputs, so its scores can't be "
            "compared between layers"
        )


def prune(
    model: str,
    out: str | Path,
    *,
    method: str = "magnitude",
    sparsity: str = "0.5",
    scope: str = "layer",
    skip: Sequence[str] = (),
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Set weights of the decoder's linear layers to zero and save the model.

    Args:
        model: what to prune: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory.
        method: 'magnitude' (compared within each matrix), 'wanda' (within each output row, arXiv 2306.11695) or
            'sparsegpt' (with compensation, arXiv 2301.00774).
        sparsity: a share of zeros, '0.5', or how many of how many neighbours in a row are kept, '2:4'.
        scope: 'layer', the share holds in every matrix, or 'global', over all of them (magnitude only).
        skip: patterns of layer names that stay as they are, e.g. '*.down_proj'.
        **options: see job.Options.

    Returns:
        The content of degradation.json. `sparsity` is the measured share of zeros in the pruned matrices, and
        `bits_per_weight` theirs as packed: see `bits_per_weight`.

    Raises:
        InputError, FileError: sparsity out of range, a width that m does not divide (the layers are named), unknown
            method, unreadable model, occupied directory.
    """
    wanted = Sparsity.parse(sparsity)
    _check(wanted, method, scope)
    change = partial(_pruned, sparsity=wanted, method=method, scope=scope, skip=skip)
    title = f"pruning to {wanted.name} ({method})"
    return run_job(
        model,
        out,
        change,
        title=title,
        **options,
    )


def _pruned(job: Job, *, sparsity: Sparsity, method: str, scope: str, skip: Sequence[str]) -> Changed:
    layers = chosen_layers(job.student, skip)
    _fitting(layers, sparsity)
    prune_in_place(job, layers, sparsity, method, scope)
    weights = [layer.weight for layer in layers.values()]
    total, share = sum(w.numel() for w in weights), share_of_zeros(weights)
    entry = {
        "kind": "pruning",
        "method": method,
        "format": sparsity.name,
        "scope": scope,
        "skip": list(skip),
        "matrices": len(weights),
        "sparsity": share,
    }
    bits = bits_per_weight(share)
    others = sum(p.numel() for p in job.student.parameters()) - total
    packed = round(total * bits / 8) + others * DENSE_BITS // 8
    return Changed(job.student, entry, bits_per_weight=bits, packed_bytes=packed)
