"""Prefix weights against a slow loop in float64, with autograd for the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from remend.maths.losses.chunked import Head, chunked_divergence_sum, chunked_truncated_sum
from remend.maths.losses.divergences import divergence, truncated_divergence
from remend.maths.topk import top_k
from remend.prefix import PrefixWeights, token_log_probabilities

LENGTHS = [5, 1, 9, 2, 6]
NUMBERS = [3, 0, 1, 7, 4]  # of the rows; they need not rise


def slow_weights(log_q_NV: Tensor, prefix: PrefixWeights) -> list[float]:
    """w_t, sequence by sequence, token by token."""
    found, total, steps, before = [], 0.0, 0, None
    for t, row in enumerate(prefix.rows_N.tolist()):
        if row != before:
            total, steps = 0.0, 0
        weight = min(max(math.exp(total), 1 / prefix.clip), prefix.clip)
        found.append(weight if steps >= prefix.skip_first else 0.0)
        total += float(log_q_NV[t, int(prefix.targets_N[t])]) - float(prefix.log_q_old_N[t])
        before, steps = row, steps + 1
    return found


class Case:
    """Hidden states, heads and an old student's log-probabilities of sampled tokens."""

    def __init__(self, *, clip: float, skip_first: int = 0, apart: float = 0.6, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(11)
        n = sum(LENGTHS)
        shapes = [(n, 6), (20, 6), (n, 4), (20, 4), (n,)]
        hidden, weight, teacher, teacher_weight, change_N = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )
        self.hidden, self.weight, self.teacher, self.teacher_weight = hidden, weight, teacher, teacher_weight
        rows_N = torch.tensor(NUMBERS).repeat_interleave(torch.tensor(LENGTHS))
        targets_N = torch.randint(20, (n,), generator=generator)
        old = token_log_probabilities(hidden @ weight.T, targets_N) - apart * change_N
        self.prefix = PrefixWeights(targets_N, rows_N, old, clip, skip_first)

    def expected(self, plain: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum and its gradients, by autograd over everything at once."""
        h, w = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        student_NV = h @ w.T
        weights = slow_weights(torch.log_softmax(student_NV, -1).detach(), self.prefix)
        total = (plain(student_NV, self.teacher @ self.teacher_weight.T) * torch.tensor(weights, dtype=h.dtype)).sum()
        total.backward()
        return total.detach(), h.grad, w.grad

    def ours(self, chunked: Callable[[Tensor, Head], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        h, w = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        total = chunked(h, Head(w))
        total.backward()
        return total.detach(), h.grad, w.grad


@pytest.mark.parametrize("rows", [1, 3, 4, 100, None])  # 3 and 4 cut sequences in two and three
@pytest.mark.parametrize(("clip", "skip_first"), [(2.0, 0), (10.0, 2), (math.inf, 0), (1.0, 1)])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weighted_sums_equal_the_slow_loop(beta: float, clip: float, skip_first: int, rows: int | None) -> None:
    case = Case(clip=clip, skip_first=skip_first)
    teacher_head = Head(case.teacher_weight)
    target = top_k(case.teacher @ case.teacher_weight.T, 4)
    rest = {"beta": beta, "prefix": case.prefix, "rows": rows}
    full = case.ours(lambda h, head: chunked_divergence_sum(h, case.teacher, head, teacher_head, **rest))
    live = case.ours(lambda h, head: chunked_divergence_sum(h, case.teacher, head, teacher_head, top_k=4, **rest))
    stored = case.ours(lambda h, head: chunked_truncated_sum(h, head, target, **rest))
    expected = case.expected(lambda q, p: divergence(q, p, beta))
    for a, b in zip(full, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    expected = case.expected(lambda q, p: truncated_divergence(q, top_k(p, 4), beta))
    for a, b, c in zip(live, stored, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-12)


def test_the_weights_move_and_meet_both_bounds() -> None:
    """The case above is no test of nothing."""
    case = Case(clip=2.0)
    weights = slow_weights(torch.log_softmax(case.hidden @ case.weight.T, -1), case.prefix)
    assert {0.5, 2.0} < set(weights)
    assert len({w for w in weights if 0.5 < w < 2.0 and w != 1.0}) > 3
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    assert [weights[s] for s in starts] == [1.0] * 5


def test_float32_stays_close_to_float64() -> None:
    single, double = Case(clip=5.0, dtype=torch.float32), Case(clip=5.0)
    ours = single.ours(
        lambda h, head: chunked_divergence_sum(
            h, single.teacher, head, Head(single.teacher_weight), prefix=single.prefix, rows=4
        )
    )
    for a, b in zip(ours, double.expected(divergence), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 100])
def test_an_unchanged_student_has_weights_of_one(rows: int) -> None:
    """The first update after sampling: the unweighted sum exactly, as the old figures come from the same products."""
    case = Case(clip=3.0, dtype=torch.float32)
    n = len(case.hidden)
    old = torch.cat(
        [
            token_log_probabilities(case.hidden[i : i + rows] @ case.weight.T, case.prefix.targets_N[i : i + rows])
            for i in range(0, n, rows)
        ]
    )
    prefix = PrefixWeights(case.prefix.targets_N, case.prefix.rows_N, old, 3.0)
    teacher_head = Head(case.teacher_weight)
    weighted = case.ours(
        lambda h, head: chunked_divergence_sum(h, case.teacher, head, teacher_head, prefix=prefix, rows=rows)
    )
    plain = case.ours(lambda h, head: chunked_divergence_sum(h, case.teacher, head, teacher_head, rows=rows))
    for a, b in zip(weighted, plain, strict=True):
        assert torch.equal(a, b)


def test_token_log_probabilities() -> None:
    case = Case(clip=1.0)
    expected = torch.log_softmax(case.hidden @ case.weight.T, -1).gather(1, case.prefix.targets_N[:, None])[:, 0]
    ours = token_log_probabilities(case.hidden @ case.weight.T, case.prefix.targets_N)
    torch.testing.assert_close(ours, expected)
    masked = token_log_probabilities(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    assert masked.tolist() == [-1e4]


def test_a_token_that_became_impossible_gives_finite_weights() -> None:
    logits_NV = torch.tensor([[0.0, -math.inf], [0.0, 0.0], [0.0, -math.inf], [0.0, 0.0]])
    ones, zeros = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    weigh = PrefixWeights(ones, zeros, torch.full((4,), -0.7), 4.0).start()
    assert weigh(slice(0, 4), logits_NV).tolist() == [1.0, 0.25, 0.25, 0.25]


def test_bad_arguments() -> None:
    ids, old = torch.zeros(3, dtype=torch.long), torch.zeros(3)
    with pytest.raises(ValueError, match="differ in number"):
        PrefixWeights(ids, ids[:2], old, 2.0)
    for clip in (0.5, math.nan):
        with pytest.raises(ValueError, match=r"clip is .*; allowed is 1"):
            PrefixWeights(ids, ids, old, clip)
    with pytest.raises(ValueError, match="skip_first is -1"):
        PrefixWeights(ids, ids, old, 2.0, -1)
    head, hidden = Head(torch.zeros(5, 3)), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="2 hidden states and 3 prefix weights differ in number"):
        chunked_divergence_sum(hidden, hidden, head, head, prefix=PrefixWeights(ids, ids, old, 2.0))
