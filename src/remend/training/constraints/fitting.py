"""Which weights a layer ought to have: least squares to what the teacher gives, with given weights as prior.

The student's calibration inputs and the teacher's outputs say what every layer ought to give (`activations.walk`).
The answer to that, with the teacher's weight as prior, is then put under the student's constraint:

    grid        GPTQ onto the very grid that the student came on (arXiv 2210.17323)
    mask        least squares over the weights that the student's zeros leave; SparseGPT's sweep (arXiv 2301.00774)
                solves the same problem approximately
    smaller     the answer itself, in the layers that write into the residual stream: a cut is patched by the layer
                before it, a narrowed layer by its own output matrix

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from remend.compression.solvers import least_squares
from remend.models.activations.walk import Sites
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM

PRIOR_TOKENS = 7_500
"""Pull of every weight to the teacher's: that of a text of this many tokens, each input with its own mean energy (what
dropout of the inputs would do, Wager et al., arXiv 1307.1493). Without it, a few thousand tokens would be fitted at the
cost of all other text. The prior of a smaller student is its own weights."""

LEAST_PULL, MOST_PULL = 0.3, 3.0
"""Bounds of the prior's tokens, as multiples of those that are there: with much text a weaker prior served a grid of 3
bits worse (docs/measurements/degradations.md), and a handful of answers still says something."""


def anchored_gram(sites: Sites) -> Tensor:
    """[I, I], of Σ‖y − W x‖² + Σ_i a_i‖W_i − P_i‖², P the prior and a its strength for each input.

    What rounding and masks lose is weighed by the prior's strength too, so that target and constraint are one problem.
    """
    gram_II = sites.gram_II.clone()
    gram_II.diagonal().add_(_strength(sites))
    return gram_II


def target(sites: Sites, at: int, prior_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The weights [O, I] that solve `anchored_gram`'s problem where nothing constrains them.

    Args:
        sites: layers that read one input, with what each should give.
        at: the layer's number among them.
        prior_OI: P, in float32.
        gram_II: what `anchored_gram` gave.
    """
    cross_OI = sites.cross_OI[at] if sites.cross_OI else None
    if cross_OI is None:
        return prior_OI
    return least_squares(gram_II, (cross_OI + prior_OI * _strength(sites)).T, prior_OI=prior_OI)


def _strength(sites: Sites) -> Tensor:
    return min(max(PRIOR_TOKENS / max(sites.rows, 1), LEAST_PULL), MOST_PULL) * sites.gram_II.diagonal()


class Priors(Mapping[str, Tensor]):
    """The teacher's matrices [O, I] by key, in float32, each read when it is asked for: its block must be held."""

    def __init__(self, teacher: CausalLM) -> None:
        self._matrices = {matrix.key: matrix for matrix in matrices(teacher).values()}

    def __getitem__(self, key: str) -> Tensor:
        return self._matrices[key].weight_OI.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def targets(
    sites: Sites, healthy: Mapping[str, Tensor], gram_II: Tensor, keys: Container[str]
) -> list[tuple[Matrix, Tensor]]:
    """The matrices whose prior there is in the same shape, each with its `target` [O, I]; one factor serves all.

    Of `sites` only those of these keys are asked for.
    """
    found = [
        (at, matrix, prior_OI)
        for at, matrix in enumerate(sites.matrices)
        if matrix.key in keys
        and matrix.key in healthy
        and (prior_OI := healthy[matrix.key]).shape == matrix.weight_OI.shape
    ]
    crosses = {at: sites.cross_OI[at] for at, _, _ in found} if sites.cross_OI else {}
    asked = [(at, prior_OI, cross) for at, _, prior_OI in found if (cross := crosses.get(at)) is not None]
    solved: dict[int, Tensor] = {}
    if asked:
        strength_I = _strength(sites)
        cross_OI = torch.cat([cross_OI + prior_OI * strength_I for _, prior_OI, cross_OI in asked])
        whole_OI = least_squares(gram_II, cross_OI.T, prior_OI=torch.cat([prior_OI for _, prior_OI, _ in asked]))
        parts = torch.split(whole_OI, [len(prior_OI) for _, prior_OI, _ in asked])
        solved = {at: part for (at, _, _), part in zip(asked, parts, strict=True)}
    return [(matrix, solved.get(at, prior_OI)) for at, matrix, prior_OI in found]


def shapes(model: CausalLM) -> dict[str, torch.Size]:
    """Shapes [O, I] of the decoder's matrices, by name."""
    return {name: matrix.weight_OI.shape for name, matrix in matrices(model).items()}
