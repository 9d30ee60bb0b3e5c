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
from remend.models.matrices import Matrix, matrices
from remend.training.constraints import Calibration, StudentFacts
from remend.training.constraints.free import FreeKind
from remend.training.constraints.grid import repair_grid
from remend.training.constraints.mask import repair_mask

TEXT, HELD_OUT = random_text()[:20], random_text()[20:]
DENSE = ["gptj", "opt", "opt-proj", "falcon", "falcon-alibi", "bloom", "gpt2", "deepseek-dense"]
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v2", "deepseek-v3"]
INT3 = GridFormat.parse("int3-g32")


@torch.no_grad()
def distance(student: Any, teacher: Any) -> float:
    """Mean forward KL at every position of held-out text."""
    parts = []
    for row in HELD_OUT:
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


@pytest.mark.parametrize("name", ["falcon", "mixtral"])
def test_a_model_without_one_of_its_blocks_comes_nearer(name: str) -> None:
    teacher = architecture(name)
    student, _ = without_blocks(teacher, [1])
    before = distance(student, teacher)
    facts = StudentFacts(Recognised("plain", None, False, PLAIN), layer_map=[0, 2])
    FreeKind().repair(student, facts, Calibration(teacher, TEXT))
    assert distance(student, teacher) < 0.9 * before


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
