"""Repair in closed form on architectures as they differ: better than what it starts from, and under the constraint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.random_text import random_text
from helpers.watching import architecture
from remend.compression.grids import GridFormat, decode, quantize
from remend.compression.recognise import PLAIN, Recognised
from remend.compression.solvers import keep_mask
from remend.compression.stored_grid import StoredGrid
from remend.degrade.making.blocks import without_blocks
from remend.models.activations.walk import Sites
from remend.models.layers import decoder_layers
from remend.models.matrices import Matrix, matrices
from remend.models.sampling.rollout import Rollout
from remend.training.constraints import Calibration, StudentFacts
from remend.training.constraints.fitting import anchored_gram, target
from remend.training.constraints.free import FreeKind
from remend.training.constraints.grid import repair_grid
from remend.training.constraints.mask import repair_mask

TEXT, HELD_OUT = random_text()[:20], random_text()[20:]
DENSE = ["gptj", "opt", "opt-proj", "falcon", "falcon-alibi", "bloom", "gpt2", "deepseek-dense"]
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v2", "deepseek-v3"]
WRITING = ["gemma2", "gemma3-text", "olmo2", "glm4", "granite", "phi", "gpt-neox", "cohere"]
"""Models that write into the residual stream in one way or another."""
INT3 = GridFormat.parse("int3-g32")


@torch.no_grad()
def distance(student: Any, teacher: Any, text: list[Rollout] = HELD_OUT) -> float:
    """Mean forward KL at every position, by default of held-out text."""
    parts = []
    for row in text:
        tokens = torch.tensor([[*row.prompt, *row.completion]])
        ours, theirs = (m(input_ids=tokens).logits[0].double().log_softmax(-1) for m in (student, teacher))
        parts.append((theirs.exp() * (theirs - ours)).sum(-1))
    return float(torch.cat(parts).mean())


def rounded(student: Any) -> StoredGrid:
    """All matrices rounded to nearest, in place."""
    stored = {}
    for matrix in matrices(student).values():
        codes, grid = quantize(matrix.weight_OI, INT3)
        matrix.weight_OI.copy_(decode(codes, grid, INT3))
        stored[matrix.key] = (codes, grid)
    return StoredGrid(INT3, stored)


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_a_rounded_model_comes_nearer_and_stays_on_its_grid(name: str) -> None:
    teacher = architecture(name)
    student = copy.deepcopy(teacher)
    stored = rounded(student)
    before = distance(student, teacher)
    start = repair_grid(student, stored, Calibration(teacher, TEXT))
    assert distance(student, teacher) < 0.8 * before
    assert start.stored is not None
    start.stored.check(student)
    assert start.masters is not None
    assert start.masters.keys() == stored.matrices.keys()
    for key, (_, grid) in stored.matrices.items():
        assert grid.scales.equal(start.stored.matrices[key][1].scales)


@pytest.mark.parametrize("name", ["opt", "bloom", "gpt2", "mixtral", "gpt-oss", "deepseek-v3"])
def test_a_pruned_model_comes_nearer_and_keeps_its_zeros(name: str) -> None:
    teacher = architecture(name)
    student = copy.deepcopy(teacher)
    for matrix in matrices(student).values():
        matrix.weight_OI.mul_(keep_mask(matrix.weight_OI.abs(), pattern=(2, 4)))
    zeros = {key: matrix.weight_OI == 0 for key, matrix in matrices(student).items()}
    before = distance(student, teacher)
    repair_mask(student, Calibration(teacher, TEXT))
    assert distance(student, teacher) < 0.85 * before
    assert not any(matrix.weight_OI[zeros[key]].any() for key, matrix in matrices(student).items())


@pytest.mark.parametrize("name", ["falcon", "mixtral", *WRITING])
def test_a_model_without_one_of_its_blocks_comes_nearer(name: str) -> None:
    teacher = architecture(name)
    student, kept = without_blocks(teacher, [1])
    before = distance(student, teacher), distance(student, teacher, TEXT)
    facts = StudentFacts(Recognised("plain", None, False, PLAIN), layer_map=kept)
    start = FreeKind().repair(student, facts, Calibration(teacher, TEXT))
    assert not start.walked.unexplained
    assert distance(student, teacher) < 0.9 * before[0]
    assert distance(student, teacher, TEXT) < 0.8 * before[1]


@pytest.mark.parametrize("name", WRITING)
def test_nothing_is_changed_where_nothing_is_missing(name: str) -> None:
    teacher = architecture(name)
    student = copy.deepcopy(teacher)
    facts = StudentFacts(Recognised("plain", None, False, PLAIN), layer_map=[*range(len(decoder_layers(teacher)))])
    FreeKind().repair(student, facts, Calibration(teacher, TEXT))
    assert distance(student, teacher) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3-text", "olmo2", "granite", "cohere"])
def test_layers_behind_a_damaged_one_make_good_what_it_lost(name: str) -> None:
    """The damaged layer is left as it is."""
    teacher = architecture(name)
    student = copy.deepcopy(teacher)
    damaged = matrices(student)["model.layers.0.mlp.down_proj"].weight_OI
    damaged *= 0.5
    before = distance(student, teacher), damaged.clone()
    healthy = {m.key: m.weight_OI.float() for m in matrices(teacher).values()}

    def visit(sites: Sites) -> None:
        for at, matrix in enumerate(sites.matrices):
            if sites.index:
                matrix.weight_OI.copy_(target(sites, at, healthy[matrix.key], anchored_gram(sites)))

    Calibration(teacher, TEXT).walk(student, visit, "repairing")
    assert damaged.equal(before[1])
    assert distance(student, teacher) < 0.9 * before[0]


def test_where_blocks_are_gone_one_that_is_not_explained_is_named_and_not_fitted() -> None:
    teacher = architecture("qwen2-moe")
    student, kept = without_blocks(teacher, [1])
    before = {key: matrix.weight_OI.clone() for key, matrix in matrices(student).items() if matrix.expert is None}
    facts = StudentFacts(Recognised("plain", None, False, PLAIN), layer_map=kept)
    start = FreeKind().repair(student, facts, Calibration(teacher, TEXT))
    assert start.walked.unexplained == (0, 1)
    assert all(before[key].equal(m.weight_OI) for key, m in matrices(student).items() if m.expert is None)


def test_an_expert_that_no_token_reaches_is_the_teachers_rounded_to_the_grid() -> None:
    teacher = architecture("gpt-oss")
    for layer in teacher.model.layers:
        layer.mlp.router.bias[1] = -1e4
    student = copy.deepcopy(teacher)
    stored = rounded(student)

    def unreached(model: Any) -> list[Matrix]:
        return [m for m in matrices(model).values() if m.expert == 1]

    nearest = [matrix.weight_OI.clone() for matrix in unreached(student)]
    start = repair_grid(student, stored, Calibration(teacher, TEXT))
    assert start.stored is not None
    start.stored.check(student)
    assert len(nearest) == 2 * len(teacher.model.layers)
    assert all(a.equal(b.weight_OI) for a, b in zip(nearest, unreached(student), strict=True))
