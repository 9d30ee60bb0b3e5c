"""One-shot repair: win back in closed form what needs no gradient, before the first step.

The student's calibration inputs and the teacher's outputs say what every layer ought to give (`calibration.walk`).
The dense least-squares answer to that, with the teacher's weight as prior, is then put under the student's constraint:

    grid        GPTQ onto the very grid that the student came on (arXiv 2210.17323)
    mask        least squares over the weights that the student's zeros leave; SparseGPT's sweep (arXiv 2301.00774)
                solves the same problem approximately
    smaller     the answer itself, in the layers that write into the residual stream: a cut is patched by the layer
                before it, a narrowed layer by its own output matrix

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remend.compression.grids import decode
from remend.compression.solvers import gptq, least_squares, refit_kept
from remend.compression.stored_grid import StoredGrid
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.models.activations.walk import Sites, completions, walk
from remend.models.layers import infer_layer_map, kept_weights, linear_layers
from remend.models.sampling.rollout import Rollout

TOKENS = 64
"""Of a calibration sample, the reference's own completion of a training prompt."""

MOST_ROWS = 65_536
"""Tokens of calibration text, prompts included: long prompts would else cost hours and tens of gigabytes."""

PRIOR_TOKENS = 7_500
"""Pull of every weight to the teacher's: as if so many tokens of text had asked for it, each input with its own mean
energy (what dropout of the inputs would do, Wager et al., arXiv 1307.1493). A few thousand tokens would else be fitted
at the cost of all other text. The prior of a smaller student is its own weights."""

LEAST_PULL, MOST_PULL = 0.3, 3.0
"""The prior counts as at least and at most so many times the tokens that are there: with much text a weaker one
served a grid of 3 bits worse (docs/degradations.md), and a handful of answers still says something."""


@dataclass
class Repaired:
    """What training starts from: the grid (with new codes) and its masters, and the teacher's answers that it was
    fitted to; `seconds` is 0 where nothing was done."""

    stored: StoredGrid | None
    masters: Mapping[str, Tensor] | None = None
    seconds: float = 0.0
    answers: Sequence[Rollout] = ()


def repair(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    *,
    stored: StoredGrid | None,
    masked: bool,
    layer_map: Sequence[int] | None,
    samples: int,
    seed: int,
    shared: int | None = None,
    precision: AbstractContextManager[Any] | None = None,
) -> Repaired:
    """Repair a compressed student in place. One that is not compressed, or not cut from the teacher, is left as it is.

    Args:
        student, teacher: the models; the teacher's weights are used, so it must be of the student's family.
        tokenizer, prompts: calibration is the teacher's answers to prompts.
        stored, masked: the student's constraint.
        layer_map: for each of its layers the teacher's; None finds it by the weights.
        samples: how many answers; more of them than prompts answer some prompts anew.
        seed: of the calibration text and its choice.
        shared: ids that both models know; a padded teacher writes no others.
        precision: context of the forward passes, and of sampling.
    """
    same = _shapes(student) == _shapes(teacher)
    smaller = not same and stored is None and not masked and _is_cut_from(student, teacher)
    if not smaller and not (same and (stored is not None or masked)):
        return Repaired(stored)
    began = time.perf_counter()
    chosen = _chosen(prompts, samples, seed)
    with precision or nullcontext():
        text = completions(teacher, tokenizer, chosen, max_new_tokens=TOKENS, seed=seed, shared=shared)
    if next(teacher.parameters()).dtype != torch.float32:
        # what a layer ought to add is a difference of large states, which bfloat16 (a GPU's teacher) would blur
        teacher = copy.deepcopy(teacher).float()
    masters = None
    if stored is not None:
        stored, masters = repair_grid(student, teacher, stored, text, precision)
    elif masked:
        repair_mask(student, teacher, text, precision)
    else:
        known = layer_map or infer_layer_map(student, teacher)
        repair_smaller(student, teacher, text, known, precision)
    return Repaired(stored, masters, time.perf_counter() - began, text)


def _chosen(prompts: Sequence[Encoded], samples: int, seed: int) -> list[Encoded]:
    """From the end of training's order, as far as MOST_ROWS reaches; one at least.

    The order is varied (files go by topic), and training begins at its other end: with what repair has not seen.
    """
    chosen: list[Encoded] = []
    rows = 0
    for _, prompt in reversed(Order(prompts, seed).take(0, max(samples, len(prompts)))):
        rows += len(prompt.tokens) + TOKENS
        if chosen and (rows > MOST_ROWS or len(chosen) == samples):
            break
        chosen.append(prompt)
    return chosen


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: layer.weight.shape for name, layer in linear_layers(model).items()}


def _is_cut_from(student: Any, teacher: Any) -> bool:
    """One architecture and one residual stream, but fewer or narrower layers."""
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    alike = ours.model_type == theirs.model_type and ours.hidden_size == theirs.hidden_size
    return alike and sum(s.numel() for s in _shapes(student).values()) < sum(
        s.numel() for s in _shapes(teacher).values()
    )


def _pull(sites: Sites) -> Tensor:
    """[I]: the strength a of the prior, for each input."""
    return min(max(PRIOR_TOKENS / sites.rows, LEAST_PULL), MOST_PULL) * sites.gram_II.diagonal()


def _gram(sites: Sites) -> Tensor:
    """Of Σ‖y − W x‖² + Σ_i a_i‖W_i − P_i‖²: what rounding and masks lose is weighed by the prior's strength too, so
    that target and constraint are one problem."""
    return sites.gram_II + torch.diag(_pull(sites))


def _target(sites: Sites, at: int, prior_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Where nothing constrains W, the answer to `_gram`'s problem, with P the prior."""
    cross_OI = sites.cross_OI[at] if sites.cross_OI else None
    if cross_OI is None:
        return prior_OI
    return least_squares(gram_II, (cross_OI + prior_OI * _pull(sites)).T, prior_OI=prior_OI)


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters()}


@torch.no_grad()
def repair_grid(
    student: Any,
    teacher: Any,
    stored: StoredGrid,
    rollouts: Sequence[Rollout],
    precision: AbstractContextManager[Any] | None = None,
) -> tuple[StoredGrid, dict[str, Tensor]]:
    """Round the teacher's weights anew onto the student's grid, each layer compensating for those before it.

    The student's weights are changed in place.

    Returns:
        The grid with its new codes, and for each matrix the compensated weights that were rounded: float32 masters.
    """
    healthy, masters, matrices = _weights(teacher), {}, dict(stored.matrices)

    def visit(sites: Sites) -> None:
        gram_II = _gram(sites)
        for at, (name, layer) in enumerate(zip(sites.names, sites.layers, strict=True)):
            key = f"{name}.weight"
            if key not in matrices or key not in healthy or healthy[key].shape != layer.weight.shape:
                continue
            grid = matrices[key][1].to(layer.weight.device)
            rounded = gptq(_target(sites, at, healthy[key], gram_II), gram_II, stored.format, grid)
            layer.weight.copy_(decode(rounded.codes, grid, stored.format))
            matrices[key], masters[key] = (rounded.codes, grid), rounded.weight

    title = "repairing on the grid"
    walk(student, rollouts, visit, teacher=teacher, precision=precision, title=title)
    return StoredGrid(stored.format, matrices), masters


@torch.no_grad()
def repair_mask(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    precision: AbstractContextManager[Any] | None = None,
) -> None:
    """Refit what the mask left, in place; the zeros stay where they are."""
    healthy, kept = _weights(teacher), kept_weights(student)

    def visit(sites: Sites) -> None:
        gram_II = _gram(sites)
        for at, (name, layer) in enumerate(zip(sites.names, sites.layers, strict=True)):
            key = f"{name}.weight"
            if key not in kept or key not in healthy or healthy[key].shape != layer.weight.shape:
                continue
            layer.weight.copy_(refit_kept(_target(sites, at, healthy[key], gram_II), gram_II, kept[key]))

    title = "repairing under the mask"
    walk(student, rollouts, visit, teacher=teacher, precision=precision, title=title)


@torch.no_grad()
def repair_smaller(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    layer_map: Sequence[int],
    precision: AbstractContextManager[Any] | None = None,
) -> None:
    """Refit the layers of a student with fewer or narrower layers to the teacher's streams, in place."""

    def visit(sites: Sites) -> None:
        gram_II = _gram(sites)
        for at, layer in enumerate(sites.layers):
            layer.weight.copy_(_target(sites, at, layer.weight.detach().float(), gram_II))

    how: dict[str, Any] = {"layer_map": layer_map, "precision": precision, "title": "repairing at the cut"}
    walk(student, rollouts, visit, teacher=teacher, **how)
