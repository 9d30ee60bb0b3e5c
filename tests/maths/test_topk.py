"""Divergences folded to the top k and a tail: against plain Python floats, the full divergence and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remend.maths.losses import divergence, of_beta
from remend.maths.topk import TopK, entropy_lost, top_k

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
quick = settings(deadline=None, max_examples=40, database=None)


def logits(seed: int, n: int, v: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return student, teacher


def slow_probabilities(row: list[float], kept: list[int]) -> list[float]:
    """Of the kept tokens, then of all others together."""
    weights = [math.exp(x - max(row)) for x in row]
    total = math.fsum(weights)
    rest = math.fsum(w for i, w in enumerate(weights) if i not in kept)
    return [weights[i] / total for i in kept] + [rest / total]


def slow_kl(a: list[float], b: list[float]) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def slow_truncated(student: Tensor, teacher: Tensor, k: int, beta: float) -> list[float]:
    found = []
    for q_row, p_row in zip(student.tolist(), teacher.tolist(), strict=True):
        kept = sorted(range(len(p_row)), key=lambda i: -p_row[i])[:k]
        p, q = slow_probabilities(p_row, kept), slow_probabilities(q_row, kept)
        if beta == 0:
            found.append(slow_kl(p, q))
        elif beta == 1:
            found.append(slow_kl(q, p))
        else:
            m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
            found.append(beta * slow_kl(p, m) + (1 - beta) * slow_kl(q, m))
    return found


@quick
@given(
    seed=st.integers(0, 2**31 - 1),
    v=st.integers(2, 30),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    beta=st.one_of(st.sampled_from(BETAS), st.floats(0.001, 0.999)),
)
def test_equals_the_slow_reference(seed: int, v: int, share: float, spread: float, beta: float) -> None:
    student, teacher = logits(seed, 3, v, spread)
    k = max(1, round(share * (v - 1)))
    expected = torch.tensor(slow_truncated(student, teacher, k, beta), dtype=torch.float64)
    ours = divergence(student, top_k(teacher, k), beta)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    single = divergence(student.float(), top_k(teacher.float(), k), beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_with_k_the_whole_vocabulary_it_is_the_full_divergence(beta: float, spread: float) -> None:
    student, teacher = logits(0, 6, 25, spread)
    both = [student.clone().requires_grad_() for _ in range(2)]
    ours, full = divergence(both[0], top_k(teacher, 25), beta), divergence(both[1], teacher, beta)
    torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-13)
    ours.sum().backward()
    full.sum().backward()
    torch.testing.assert_close(both[0].grad, both[1].grad, rtol=1e-10, atol=1e-13)
    values, grad = of_beta(beta).with_gradient(student, top_k(teacher, 25))
    torch.testing.assert_close(values, full.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, both[1].grad, rtol=1e-10, atol=1e-13)


@quick
@given(seed=st.integers(0, 2**31 - 1), k=st.integers(1, 19), beta=st.floats(0, 1))
def test_never_above_the_full_divergence_and_growing_with_k(seed: int, k: int, beta: float) -> None:
    student, teacher = logits(seed, 4, 20, 3.0)
    less, more = (divergence(student, top_k(teacher, n), beta) for n in (k, k + 1))
    assert (less <= more + 1e-12).all()
    assert (more <= divergence(student, teacher, beta) + 1e-12).all()


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_top_k_keeps_the_largest_normalised_over_all(spread: float) -> None:
    _, teacher = logits(5, 40, 30, spread)
    exact = torch.log_softmax(teacher, -1).sort(-1, descending=True)
    single = top_k(teacher.float(), 7)
    assert (single.ids_NK.dtype, single.log_p_NK.dtype, single.log_tail_N.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )
    assert torch.equal(single.ids_NK, exact.indices[:, :7])
    torch.testing.assert_close(single.log_p_NK.double(), exact.values[:, :7], rtol=1e-6, atol=1e-6)
    # the tail keeps its relative precision where 1 − Σ p would be rounding noise: e^-60 and less at spread 20
    torch.testing.assert_close(single.log_tail_N.double(), exact.values[:, 7:].logsumexp(-1), rtol=1e-6, atol=1e-6)
    both = top_k(teacher, 30)
    assert torch.equal(both.log_tail_N, torch.full_like(both.log_tail_N, -math.inf))


def test_a_tail_that_the_teacher_hardly_has_costs_what_it_should() -> None:
    """Reverse KL: a student's mass on the tail meets log p(tail), which must not be lost to rounding."""
    teacher = torch.tensor([[50.0, 49.0, 0.0, 0.0]])
    student = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    ours = divergence(student, top_k(teacher, 2), 1.0)
    expected = slow_truncated(student, teacher, 2, 1.0)
    assert float(ours) == pytest.approx(expected[0], rel=1e-6)
    assert 10 < expected[0] < 50


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_entropy_lost(spread: float) -> None:
    _, teacher = logits(6, 12, 15, spread)
    for k in (1, 4, 14, 15):
        target, expected = top_k(teacher, k), []
        for row, kept in zip(teacher.tolist(), target.ids_NK.tolist(), strict=True):
            rest = [i for i in range(15) if i not in kept]
            *_, tail = slow_probabilities(row, kept)
            given = [p / tail for p in slow_probabilities(row, rest)[:-1]] if rest else []
            expected.append(-tail * math.fsum(p * math.log(p) for p in given if p > 0))
        torch.testing.assert_close(entropy_lost(teacher, target), torch.tensor(expected, dtype=torch.float64))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in logits(0, 5, 50, 3.0))
    target = top_k(teacher, 8)
    ours = divergence(student, target)
    assert ours.dtype == target.log_p_NK.dtype == torch.float32
    assert torch.equal(ours, divergence(student.float(), top_k(teacher.float(), 8)))


def test_slices_and_lengths() -> None:
    target = top_k(torch.randn(6, 9), 2)
    assert len(target) == 6
    part = target[2:5]
    assert isinstance(part, TopK)
    assert torch.equal(part.folded_NK1, target.folded_NK1[2:5])
    assert torch.equal(part.ids_NK, target.ids_NK[2:5])
    torch.testing.assert_close(target.folded_NK1.exp().sum(1), torch.ones(6))


def test_bad_arguments() -> None:
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}; allowed is 1 to the 5 shared token ids"):
            top_k(torch.zeros(2, 5), k)
