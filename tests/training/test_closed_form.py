"""Repair in closed form: better than what it starts from, and exactly under the student's constraint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.random_text import random_text
from helpers.tiny import build_model, build_tokenizer, put_on_grid
from remend.compression.grids import decode
from remend.compression.recognise import PLAIN, Recognised
from remend.compression.solvers import keep_mask
from remend.degrade.making.blocks import without_blocks
from remend.degrade.making.channels import narrowed
from remend.models.activations.walk import Sites, Walked
from remend.models.layers import infer_layer_map, kept_weights
from remend.models.matrices import Matrix
from remend.models.sampling.rollout import Rollout
from remend.training.constraints import Calibration, OnGrid, StudentFacts, fitting
from remend.training.constraints.free import FreeKind
from remend.training.constraints.grid import repair_grid
from remend.training.constraints.mask import repair_mask

NOTHING = Recognised("plain", None, False, PLAIN)


@pytest.fixture(scope="module")
def text() -> list[Rollout]:
    return random_text()


@pytest.fixture
def teacher() -> Any:
    return build_model(len(build_tokenizer()), layers=4).requires_grad_(False)


@torch.no_grad()
def distance(student: Any, teacher: Any, text: list[Rollout]) -> float:
    """Mean forward KL at every position, one sequence at a time."""
    total, count = 0.0, 0
    for row in text:
        tokens = torch.tensor([[*row.prompt, *row.completion]])
        ours, theirs = (m(input_ids=tokens).logits[0].double().log_softmax(-1) for m in (student, teacher))
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += tokens.shape[1]
    return total / count


def test_repair_on_the_grid_keeps_the_grid_and_lowers_the_divergence(teacher: Any, text: list[Rollout]) -> None:
    student = copy.deepcopy(teacher)
    stored = put_on_grid(student, "int3-g64")
    before = distance(student, teacher, text)
    start = repair_grid(student, stored, Calibration(teacher, text))
    assert distance(student, teacher, text) < 0.7 * before
    changed = 0
    for name, (codes, grid) in start.stored.matrices.items():
        assert student.get_parameter(name).equal(decode(codes, grid, start.stored.format))
        assert grid.scales.equal(stored.matrices[name][1].scales)
        changed += int((codes != stored.matrices[name][0]).sum())
    assert changed > 100
    # refuses masters that round to other codes
    assert OnGrid(student.requires_grad_(True), start.stored, masters=start.masters).masters()


class Spoiled(Calibration):
    """A calibration after whose visits one matrix is worse than before."""

    def walk(self, student: Any, visit: Any, title: str, layer_map: Any = None) -> Walked:
        def spoiling(sites: Sites) -> None:
            visit(sites)
            for matrix in sites.matrices:
                if matrix.name == "model.layers.1.mlp.down_proj":
                    matrix.weight_OI.neg_()

        return super().walk(student, spoiling, title, layer_map)


def test_where_repair_holds_back_the_students_codes_stay(teacher: Any, text: list[Rollout]) -> None:
    student = copy.deepcopy(teacher)
    stored = put_on_grid(student, "int3-g64")
    start = repair_grid(student, stored, Spoiled(teacher, text))
    assert start.walked.held_back == (1,)
    assert len(start.walked.unchanged) == 7
    left = start.walked.unchanged & stored.matrices.keys()
    assert left
    for key in left:
        assert start.stored.matrices[key][0].equal(stored.matrices[key][0])
        assert key not in start.masters
    start.stored.check(student)
    assert OnGrid(student.requires_grad_(True), start.stored, masters=start.masters).masters()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_repair_under_the_mask_keeps_every_zero(teacher: Any, text: list[Rollout], pattern: Any) -> None:
    student = copy.deepcopy(teacher)
    for name, module in student.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            how = {"pattern": pattern} if pattern else {"sparsity": 0.5}
            module.weight.mul_(keep_mask(module.weight.abs(), **how))
    zeros, before = kept_weights(student), distance(student, teacher, text)
    repair_mask(student, Calibration(teacher, text))
    assert distance(student, teacher, text) < 0.7 * before
    after = kept_weights(student)
    assert set(zeros) == set(after)
    assert all(after[name].equal(kept) for name, kept in zeros.items())


def test_repair_patches_a_cut_through_the_map_of_layers(teacher: Any, text: list[Rollout]) -> None:
    cut, kept = without_blocks(teacher, [1])
    before = distance(cut, teacher, text)
    assert infer_layer_map(cut, teacher) == kept == [0, 2, 3]
    after = {}
    for name, layer_map in (("recorded", kept), ("found by weights", None), ("wrong", [0, 1, 2])):
        student = copy.deepcopy(cut)
        FreeKind().repair(student, StudentFacts(NOTHING, layer_map=layer_map), Calibration(teacher, text))
        after[name] = distance(student, teacher, text)
    assert after["recorded"] == after["found by weights"] < 0.7 * before
    assert after["recorded"] < after["wrong"]


def test_only_a_student_that_was_cut_from_the_teacher_is_repaired_without_a_constraint(teacher: Any) -> None:
    smaller = without_blocks(teacher, [1])[0], narrowed(teacher, [torch.arange(64)] * 4, None)
    assert all(FreeKind().repairs(student, StudentFacts(NOTHING), teacher) for student in smaller)
    padded = build_model(len(build_tokenizer()) + 8, layers=4)
    other = build_model(len(build_tokenizer()), width=32)
    assert not any(
        FreeKind().repairs(student, StudentFacts(NOTHING), teacher)
        for student in (copy.deepcopy(teacher), padded, other)
    )


@torch.no_grad()
@pytest.mark.parametrize(("prior_tokens", "pull"), [(20, 0.4), (1, fitting.LEAST_PULL), (10_000, fitting.MOST_PULL)])
def test_the_target_stays_near_the_prior_by_each_inputs_energy(
    monkeypatch: pytest.MonkeyPatch, prior_tokens: int, pull: float
) -> None:
    """Against ridge regression as it is taught: one row more for every weight that is held."""
    generator = torch.Generator().manual_seed(3)
    x_NI = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 1, 1, 3, 0.1, 1])
    y_NO, prior_OI = (torch.randn(n, m, generator=generator, dtype=torch.float64) for n, m in ((50, 4), (4, 6)))
    gram_II, layer = (x_NI.T @ x_NI).float(), Matrix("layer", torch.nn.Linear(6, 4, bias=False), "layer.weight")
    sites = Sites(0, (layer,), gram_II, ((y_NO.T @ x_NI).float(),), 50)
    monkeypatch.setattr(fitting, "PRIOR_TOKENS", prior_tokens)
    anchored_II = fitting.anchored_gram(sites)
    result = fitting.target(sites, 0, prior_OI.float(), anchored_II)

    energy_I = pull * x_NI.square().sum(0)
    held_I = energy_I + 0.01 * anchored_II.diagonal().mean().double()  # and the solver's own damping
    rows, wanted = torch.cat([x_NI, held_I.sqrt().diag()]), torch.cat([y_NO, (prior_OI * held_I.sqrt()).T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(result.double(), expected, atol=1e-5)
    assert torch.allclose(anchored_II.double(), x_NI.T @ x_NI + energy_I.diag(), rtol=1e-5)
    assert not torch.allclose(result.double(), prior_OI, atol=0.1)
