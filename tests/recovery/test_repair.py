"""One-shot repair: better than what it starts from, and exactly under the student's constraint."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from helpers.tiny import build_model, build_tokenizer, put_on_grid
from remend.compression.grids import decode
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.degrade.depth import without_blocks
from remend.degrade.width import narrowed
from remend.errors import InputError
from remend.models.activations import walk
from remend.models.layers import infer_layer_map, infer_rows, kept_weights
from remend.models.sampling.rollout import Rollout
from remend.recovery import repair
from remend.recovery.repair import Questions
from remend.training.constraints import Calibration, OnGrid, fitting
from remend.training.constraints.free import repair_smaller
from remend.training.constraints.grid import repair_grid
from remend.training.constraints.mask import repair_mask


@pytest.fixture(scope="module")
def text() -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 300, (24, 40), generator=generator).tolist()
    return [Rollout(str(i), tuple(row[:10]), tuple(row[10 : 40 - i % 7]), False) for i, row in enumerate(rows)]


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
    OnGrid(
        student.requires_grad_(True), start.stored, masters=start.masters
    )  # refuses masters that round to other codes


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_repair_under_the_mask_keeps_every_zero(teacher: Any, text: list[Rollout], pattern: Any) -> None:
    from remend.compression.solvers import keep_mask

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


def test_repair_patches_a_cut(teacher: Any, text: list[Rollout]) -> None:
    student, kept = without_blocks(teacher, [1])
    before = distance(student, teacher, text)
    assert infer_layer_map(student, teacher) == kept == [0, 2, 3]
    repair_smaller(student, Calibration(teacher, text), kept)
    assert distance(student, teacher, text) < 0.7 * before


def test_more_layers_than_the_teacher_are_refused(teacher: Any) -> None:
    student, _ = without_blocks(teacher, [3])
    with pytest.raises(InputError, match=r"4 layers and the teacher 3.*repair: false"):
        infer_layer_map(teacher, student)


@torch.no_grad()
def test_walk_gives_each_layers_gram_and_target(teacher: Any, text: list[Rollout]) -> None:
    """With the teacher as its own student, what a layer should give is what it gives: Σ y xᵀ = W Σ x xᵀ."""
    seen: dict[str, float] = {}
    rows = sum(len(r.prompt) + len(r.completion) for r in text)

    def visit(sites: walk.Sites) -> None:
        assert sites.rows == rows
        for name, layer, cross in zip(sites.names, sites.layers, sites.cross_OI or (), strict=True):
            assert cross is not None
            seen[name] = float((cross - layer.weight @ sites.gram_II).norm() / cross.norm())

    walk.walk(copy.deepcopy(teacher), text, visit, teacher=teacher)
    linear = [n for n, m in teacher.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert sorted(seen) == sorted(linear)
    assert max(seen.values()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("taught", [False, True])
def test_a_common_opening_counts_once_a_pass_where_a_teacher_asks(teacher: Any, taught: bool) -> None:
    opening, rows = tuple(range(10, 19)), []

    def visit(sites: walk.Sites) -> None:
        rows.append(sites.rows)

    text = [Rollout(str(i), (*opening, 30 + i), (opening * 2)[: 3 + i], False) for i in range(4)]
    text.append(Rollout("4", opening, opening, False))  # the shortest prompt ends the opening; completions always count
    walk.walk(copy.deepcopy(teacher), text, visit, teacher=teacher if taught else None)
    everything = sum(len(r.prompt) + len(r.completion) for r in text)
    assert set(rows) == {everything - 4 * 9 * taught}


@torch.no_grad()
@pytest.mark.parametrize(("prior_tokens", "pull"), [(20, 0.4), (1, fitting.LEAST_PULL), (10_000, fitting.MOST_PULL)])
def test_the_target_stays_near_the_prior_by_each_inputs_energy(
    monkeypatch: pytest.MonkeyPatch, prior_tokens: int, pull: float
) -> None:
    """Against ridge regression as it is taught: one row more for every weight that is held."""
    generator = torch.Generator().manual_seed(3)
    x_NI = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 1, 1, 3, 0.1, 1])
    y_NO, prior_OI = (torch.randn(n, m, generator=generator, dtype=torch.float64) for n, m in ((50, 4), (4, 6)))
    gram_II, layers = (x_NI.T @ x_NI).float(), (torch.nn.Linear(6, 4, bias=False),)
    sites = walk.Sites(0, ("layer",), layers, gram_II, ((y_NO.T @ x_NI).float(),), 50)
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


@torch.no_grad()
def test_narrower_layers_are_asked_for_the_outputs_that_they_kept(teacher: Any, text: list[Rollout]) -> None:
    """Nothing is lost before the first block's MLP but channels, so those that are left ought to give what they do."""
    channels = [torch.arange(i % 2, 128, 2) for i in range(4)]
    student = narrowed(teacher, channels, None)
    seen: dict[str, float] = {}

    def visit(sites: walk.Sites) -> None:
        for name, layer, cross in zip(sites.names, sites.layers, sites.cross_OI or (), strict=True):
            assert cross is not None, name
            seen[name] = float((cross - layer.weight @ sites.gram_II).norm() / cross.norm())

    walk.walk(student, text, visit, teacher=teacher)
    first = {n.rpartition(".")[2]: v for n, v in seen.items() if "layers.0." in n}
    assert max(first["gate_proj"], first["up_proj"]) < 1e-4
    assert first["down_proj"] > 0.01  # channels are missing
    assert seen["model.layers.1.mlp.gate_proj"] > 1e-3  # its input has changed


def test_rows_are_found_among_a_wider_layers() -> None:
    wide = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    chosen = torch.tensor([1, 4, 6, 11])
    found = infer_rows(wide[chosen] + 0.01, wide)
    assert found is not None
    assert found.equal(chosen)
    assert infer_rows(wide[[3, 3]], wide) is None
    assert infer_rows(wide[:, :4], wide) is None
    assert infer_rows(wide, wide[:8]) is None


@torch.no_grad()
def test_walk_sees_real_tokens_only(teacher: Any, text: list[Rollout]) -> None:
    """The gram of the first layer equals a slow one, sequence by sequence without padding."""
    grams: dict[str, torch.Tensor] = {}

    def visit(sites: walk.Sites) -> None:
        grams[sites.names[0]] = sites.gram_II

    walk.walk(copy.deepcopy(teacher), text, visit)
    block = teacher.model.layers[0]
    slow = torch.zeros(64, 64, dtype=torch.float64)
    for row in text:
        x = block.input_layernorm(teacher.model.embed_tokens(torch.tensor([*row.prompt, *row.completion]))).double()
        slow += x.T @ x
    assert torch.allclose(grams["model.layers.0.self_attn.q_proj"].double(), slow, rtol=1e-4, atol=1e-2)


def test_what_is_settled_in_a_block_runs_once_more_and_is_then_replayed(teacher: Any, text: list[Rollout]) -> None:
    student, calls = copy.deepcopy(teacher), []
    student.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    walk.walk(student, text, lambda s: seen.append(s.names), teacher=teacher)
    groups = [names for names in seen if "layers.1." in names[0]]
    assert len(groups) == 4
    # the probe, up to the output matrix's input, and once whole: not for the MLP's two groups and the end again
    batches = len(walk._batches(student, text, 0, nullcontext()))
    assert len(calls) == 1 + 2 * batches


def test_calibration_prompts_are_as_many_as_asked_or_as_rows_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Encoded(str(i), tuple(range(10)), "") for i in range(5)]

    def chosen(samples: int) -> list[str]:
        return [p.id for p in Questions(build_tokenizer(), prompts, samples, 0).chosen()]

    assert len(set(chosen(4))) == 4
    assert chosen(12).count("3") >= 2  # answered again, with other draws
    first = {prompt.id for _, prompt in Order(prompts, 0).take(0, 2)}
    assert not first & set(chosen(3))  # training begins with what repair has not seen
    monkeypatch.setattr(repair, "MOST_ROWS", 3 * (10 + repair.TOKENS))
    assert len(chosen(5)) == 3
    monkeypatch.setattr(repair, "MOST_ROWS", 1)
    assert len(chosen(5)) == 1
