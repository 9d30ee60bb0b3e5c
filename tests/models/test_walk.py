"""The walk through a decoder: what each layer sees and ought to give; which blocks and rows a smaller student kept."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from helpers.random_text import random_text
from helpers.tiny import build_model, build_tokenizer
from remend.degrade.making.blocks import without_blocks
from remend.degrade.making.channels import narrowed
from remend.errors import InputError
from remend.models.activations import passes
from remend.models.activations.apart import divided
from remend.models.activations.passes import ROWS, gram, products
from remend.models.activations.targets import Linear, Wanted, crossed
from remend.models.activations.walk import Sites, walk
from remend.models.activations.walkable import blocks_of, modules_of_matrices
from remend.models.device import mixed_precision
from remend.models.layers import infer_layer_map, infer_rows
from remend.models.sampling.rollout import Rollout


@pytest.fixture(scope="module")
def text() -> list[Rollout]:
    return random_text()


@pytest.fixture
def teacher() -> Any:
    return build_model(len(build_tokenizer()), layers=4).requires_grad_(False)


def missed(student: Any, teacher: Any, text: list[Rollout]) -> dict[str, float]:
    """For each layer how far what it gives is from what it ought to give, Σ y xᵀ: a relative norm."""
    seen: dict[str, float] = {}
    rows = sum(len(r.prompt) + len(r.completion) for r in divided(text)[0])

    def visit(sites: Sites) -> None:
        assert sites.rows == rows
        for matrix, cross in zip(sites.matrices, sites.cross_OI or (), strict=True):
            assert cross is not None, matrix.name
            seen[matrix.name] = float((cross - matrix.weight_OI @ sites.gram_II).norm() / cross.norm())

    walk(student, text, visit, teacher=teacher)
    return seen


@torch.no_grad()
def test_walk_gives_each_layers_gram_and_target(teacher: Any, text: list[Rollout]) -> None:
    """With the teacher as its own student, what a layer should give is what it gives: Σ y xᵀ = W Σ x xᵀ."""
    seen = missed(copy.deepcopy(teacher), teacher, text)
    linear = [n for n, m in teacher.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert sorted(seen) == sorted(linear)
    assert max(seen.values()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("taught", [False, True])
def test_a_common_opening_counts_once_a_pass_where_a_teacher_asks(teacher: Any, taught: bool) -> None:
    opening, rows = tuple(range(10, 19)), []

    def visit(sites: Sites) -> None:
        rows.append(sites.rows)

    text = [Rollout(str(i), (*opening, 30 + i), (opening * 2)[: 3 + i], False) for i in range(4)]
    text.append(Rollout("4", opening, opening, False))  # the shortest prompt ends the opening; completions always count
    walk(copy.deepcopy(teacher), text, visit, teacher=teacher if taught else None)
    everything = sum(len(r.prompt) + len(r.completion) for r in text)
    assert set(rows) == {everything - 4 * 9 * taught}


@torch.no_grad()
def test_narrower_layers_are_asked_for_the_outputs_that_they_kept(teacher: Any, text: list[Rollout]) -> None:
    """Nothing is lost before the first block's MLP but channels, so those that are left ought to give what they do."""
    channels = [torch.arange(i % 2, 128, 2) for i in range(4)]
    seen = missed(narrowed(teacher, channels, None), teacher, text)
    first = {n.rpartition(".")[2]: v for n, v in seen.items() if "layers.0." in n}
    assert max(first["gate_proj"], first["up_proj"]) < 1e-4
    assert first["down_proj"] > 0.01  # channels are missing
    assert seen["model.layers.1.mlp.gate_proj"] > 1e-3  # its input has changed


@torch.no_grad()
def test_walk_sees_real_tokens_only(teacher: Any, text: list[Rollout]) -> None:
    """The gram of the first layer equals a slow one, sequence by sequence without padding."""
    grams: dict[str, torch.Tensor] = {}

    def visit(sites: Sites) -> None:
        grams[sites.matrices[0].name] = sites.gram_II

    walk(copy.deepcopy(teacher), text, visit)
    block = teacher.model.layers[0]
    slow = torch.zeros(64, 64, dtype=torch.float64)
    for row in text:
        x = block.input_layernorm(teacher.model.embed_tokens(torch.tensor([*row.prompt, *row.completion]))).double()
        slow += x.T @ x
    assert torch.allclose(grams["model.layers.0.self_attn.q_proj"].double(), slow, rtol=1e-4, atol=1e-2)


def test_what_is_settled_in_a_block_runs_once_more_and_is_then_replayed(teacher: Any, text: list[Rollout]) -> None:
    student, calls, seen = copy.deepcopy(teacher), [], []
    student.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    walk(student, text[:2], lambda s: seen.append(s.matrices[0].name), teacher=teacher)  # one batch
    assert len([name for name in seen if "layers.1." in name]) == 4
    # four short passes of the trial, then two probes, and up to the output matrix's input: from there on what attention
    # gives is known, for the MLP's two groups and for the block's end
    assert len(calls) == 4 + 3


@torch.no_grad()
def test_what_is_computed_again_is_what_was_kept(
    teacher: Any, text: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    def visit(sites: Sites) -> None:
        for matrix in sites.matrices:
            matrix.weight_OI.mul_(0.9)

    kept, again = copy.deepcopy(teacher), copy.deepcopy(teacher)
    calls: list[str] = []
    for student, most in ((kept, passes.MOST_KEPT), (again, 0)):
        monkeypatch.setattr(passes, "MOST_KEPT", most)
        up_proj, name = student.model.layers[1].mlp.up_proj, "kept" if most else "again"
        up_proj.register_forward_hook(lambda *_, name=name: calls.append(name))
        walk(student, text[:7], visit, teacher=teacher)  # too few to judge by
    assert calls.count("kept") < calls.count("again")
    assert all(a.equal(b) for a, b in zip(kept.parameters(), again.parameters(), strict=True))


def test_a_child_ends_in_a_layer_where_it_gives_what_the_layer_gives(teacher: Any, text: list[Rollout]) -> None:
    blocks, kept = blocks_of(teacher, [[*r.prompt, *r.completion] for r in text]), modules_of_matrices(teacher)
    probe = passes.start(blocks, text[:1], contextlib.nullcontext())
    block = blocks.items[0]
    ends = {end.child: end for end in passes.ends_of(block, probe, 0, kept)}
    assert ends[block.mlp].layer is block.mlp.down_proj
    assert ends[block.mlp].beside is None
    assert ends[block.self_attn].layer is block.self_attn.o_proj
    assert ends[block.self_attn].beside == 1
    with torch.no_grad():
        block.mlp.register_forward_hook(lambda _m, _a, output: output * 2)
    assert block.mlp not in {end.child for end in passes.ends_of(block, probe, 0, kept)}


def test_more_layers_than_the_teacher_are_refused(teacher: Any) -> None:
    student, _ = without_blocks(teacher, [3])
    with pytest.raises(InputError, match=r"4 layers and the teacher 3.*repair: false"):
        infer_layer_map(teacher, student)


def test_rows_are_found_among_a_wider_layers() -> None:
    wide = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    chosen = torch.tensor([1, 4, 6, 11])
    assert chosen.equal(infer_rows(wide[chosen] + 0.01, wide))
    assert infer_rows(wide[[3, 3]], wide) is None
    assert infer_rows(wide[:, :4], wide) is None
    assert infer_rows(wide, wide[:8]) is None


@pytest.mark.parametrize("tokens", [1, ROWS, 2 * ROWS + 3])
def test_sums_of_products_match_float64(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x_NI = torch.randn(tokens, 12, generator=generator)
    x_NI[0] *= 300  # as the first token of a sequence does in some channels
    y_NO = x_NI @ torch.randn(12, 5, generator=generator) + torch.randn(tokens, 5, generator=generator)
    exact_OI = y_NO.double().T @ x_NI.double()
    size_OI = y_NO.double().abs().T @ x_NI.double().abs()
    exactly, roughly = (mixed_precision(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16))
    for precision, share in ((None, 1e-5), (exactly, 1e-5), (roughly, 2**-7)):
        sums_OI = products(y_NO, x_NI, precision)
        assert sums_OI.dtype == torch.float32
        assert bool(((sums_OI - exact_OI).abs() <= share * size_OI).all())


@pytest.mark.parametrize("width", [1, 3, 12, 13])
def test_a_gram_is_symmetric_and_the_sum_of_products(width: int) -> None:
    x_NI = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    gram_II = gram(x_NI)
    assert gram_II.equal(gram_II.T)
    torch.testing.assert_close(gram_II.double(), x_NI.double().T @ x_NI.double(), rtol=1e-5, atol=1e-5)


def test_sums_of_what_a_linear_layer_gives_are_those_of_its_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI, t_NP = (torch.randn(30, width, generator=generator) for width in (5, 7))
    weight_OP, bias_O = torch.randn(4, 7, generator=generator), torch.randn(4, generator=generator)
    like, same = Linear(t_NP, weight_OP, bias_O), Linear(t_NP, 2 * weight_OP, None)
    first, nothing, second = crossed([Wanted(like), None, Wanted(same)], x_NI, None)
    assert nothing is None
    torch.testing.assert_close(first, (t_NP @ weight_OP.T + bias_O).T @ x_NI)
    torch.testing.assert_close(second, (2 * t_NP @ weight_OP.T).T @ x_NI)


def test_a_bfloat16_gram_can_be_factored_with_the_pull_of_repair() -> None:
    x_NI = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).repeat(60, 1)  # of low rank
    gram_II = gram(x_NI, mixed_precision(torch.bfloat16, torch.device("cpu")))
    _, failed = torch.linalg.cholesky_ex(gram_II + torch.diag(0.1 * gram_II.diagonal()))
    assert not failed
