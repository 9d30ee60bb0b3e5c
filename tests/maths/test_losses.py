"""Losses against a slow reference in plain Python floats, closed forms against autograd, chunked sums against plain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from helpers.losses import DISTANCE
from helpers.registering import restored
from remend.errors import InputError
from remend.maths.losses import (
    LOSSES,
    Head,
    HeadTarget,
    Loss,
    choose,
    chunked_cross_entropy_sum,
    chunked_loss_sum,
    described,
    divergence,
    of_beta,
)
from remend.maths.topk import TopK, top_k

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
ALL = [*map(of_beta, BETAS), choose(DISTANCE), choose(DISTANCE, {"power": 3})]
FORMS = ["full", "folded", "stored"]
"""Of a teacher: its states and head, the same folded to its top k chunk by chunk, and its stored top k."""

quick = settings(deadline=None, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)


def slow_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - log_sum for x in row]


def slow_kl(log_a: list[float], log_b: list[float]) -> float:
    """KL(a ‖ b); an entry with no probability in a adds nothing."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True) if math.exp(a) > 0)


def slow_log_mean(a: float, b: float, beta: float) -> float:
    x, y = math.log(beta) + a, math.log(1 - beta) + b
    top = max(x, y)
    return top if top == -math.inf else top + math.log(math.exp(x - top) + math.exp(y - top))


def slow_divergence(student: Tensor, teacher: Tensor, beta: float) -> list[float]:
    """GKD's definition, row by row: p the teacher's distribution, q the student's."""
    found = []
    for q_row, p_row in zip(student.tolist(), teacher.tolist(), strict=True):
        log_q, log_p = slow_log_softmax(q_row), slow_log_softmax(p_row)
        if beta == 0:
            found.append(slow_kl(log_p, log_q))
        elif beta == 1:
            found.append(slow_kl(log_q, log_p))
        else:
            log_m = [slow_log_mean(a, b, beta) for a, b in zip(log_p, log_q, strict=True)]
            found.append(beta * slow_kl(log_p, log_m) + (1 - beta) * slow_kl(log_q, log_m))
    return found


def logits(seed: int, n: int, v: int, spread: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


@quick
@given(
    seed=seeds,
    n=st.integers(1, 4),
    v=st.integers(1, 30),
    spread=st.sampled_from([0.0, 0.01, 1.0, 20.0, 1000.0]),  # 1000: differences of thousands between logits
    beta=st.one_of(st.sampled_from(BETAS), st.floats(0.001, 0.999)),
)
def test_divergence_equals_the_slow_reference(seed: int, n: int, v: int, spread: float, beta: float) -> None:
    student, teacher = logits(seed, n, v, spread)
    expected = torch.tensor(slow_divergence(student, teacher, beta), dtype=torch.float64)
    ours = divergence(student_NV=student, teacher_NV=teacher, beta=beta)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    single = divergence(student.float(), teacher.float(), beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_is_computed_in_float32(beta: float) -> None:
    student, teacher = logits(0, 5, 50, 3.0, torch.bfloat16)
    ours = divergence(student, teacher, beta)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, divergence(student.float(), teacher.float(), beta))


@quick
@given(seed=seeds, v=st.integers(1, 40), spread=st.floats(0, 500), beta=st.floats(0, 1))
def test_zero_on_equal_and_never_negative(seed: int, v: int, spread: float, beta: float) -> None:
    student, teacher = logits(seed, 3, v, spread)
    assert divergence(teacher, teacher, beta).abs().max() < 1e-12
    assert divergence(student, teacher, beta).min() > -1e-12


@quick
@given(seed=seeds, beta=st.floats(0, 1), student_shift=st.floats(-3e4, 3e4), teacher_shift=st.floats(-3e4, 3e4))
def test_adding_a_constant_to_the_logits_changes_nothing(
    seed: int, beta: float, student_shift: float, teacher_shift: float
) -> None:
    student, teacher = logits(seed, 3, 11, 3.0)
    shifted = divergence(student + student_shift, teacher + teacher_shift, beta)
    torch.testing.assert_close(shifted, divergence(student, teacher, beta), rtol=1e-7, atol=1e-9)


def test_reverse_is_forward_with_the_roles_exchanged() -> None:
    student, teacher = logits(1, 6, 20, 2.0)
    torch.testing.assert_close(divergence(student, teacher, 1.0), divergence(teacher, student, 0.0))
    assert not torch.allclose(divergence(student, teacher, 0.0), divergence(student, teacher, 1.0), rtol=0.01)


def test_both_limits_of_the_generalised_jsd() -> None:
    student, teacher = logits(2, 6, 20, 1.0)
    eps = 1e-6
    torch.testing.assert_close(
        divergence(student, teacher, eps) / eps, divergence(student, teacher, 0.0), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence(student, teacher, 1 - eps) / eps, divergence(student, teacher, 1.0), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_of_minus_infinity_has_no_part(beta: float, dtype: torch.dtype) -> None:
    student, teacher = logits(3, 4, 12, 2.0, dtype)
    pad = torch.full((4, 3), -math.inf, dtype=dtype)
    padded = torch.cat([student, pad], 1).requires_grad_()
    ours = divergence(padded, torch.cat([teacher, pad], 1), beta)
    plain = student.clone().requires_grad_()
    expected = divergence(plain, teacher, beta)
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(padded.grad[:, :12], plain.grad)
    assert torch.equal(padded.grad[:, 12:], torch.zeros_like(pad))


@pytest.mark.parametrize("beta", BETAS)
def test_an_entry_masked_on_one_side_gives_finite_numbers(beta: float) -> None:
    student, teacher = logits(4, 4, 12, 2.0, torch.float32)
    student[0, 3], teacher[1, 5] = -math.inf, -math.inf
    student.requires_grad_()
    ours = divergence(student, teacher, beta)
    ours.sum().backward()
    assert torch.isfinite(ours).all()
    assert torch.isfinite(student.grad).all()
    assert (ours > 0).all()


def test_no_gradient_flows_to_the_teacher() -> None:
    student, teacher = (x.requires_grad_() for x in logits(6, 2, 5, 1.0))
    divergence(student, teacher, 0.5).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.words)
@pytest.mark.parametrize("k", [None, 1, 4, 7])
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_gradients_by_finite_differences(loss: Loss, k: int | None, spread: float) -> None:
    """Of the value by autograd, and of `with_gradient`: closed form or autograd again."""
    student, teacher = logits(5, 3, 7, spread)
    said = teacher if k is None else top_k(teacher, k)
    assert torch.autograd.gradcheck(lambda s: loss(s, said), student.requires_grad_())
    values = loss(student, said)
    values.sum().backward()
    ours, gradient = loss.with_gradient(student.detach(), said)
    torch.testing.assert_close(ours, values.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("k", [None, 1, 4, 8, 9])
def test_closed_form_gradient_with_extreme_logits(beta: float, k: int | None) -> None:
    student, teacher = logits(3, 6, 9, 30.0)
    student[0, 3], teacher[0, 3], teacher[1, 2] = -math.inf, -math.inf, -math.inf
    student.requires_grad_()
    said = teacher if k is None else top_k(teacher, k)
    values, gradient = of_beta(beta).with_gradient(student.detach(), said)
    expected = divergence(student, said, beta)
    expected.sum().backward()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-8, atol=1e-12)


def target_of(form: str, states_NE: Tensor, head: Head, k: int = 5) -> HeadTarget | TopK:
    if form == "stored":
        return top_k(head(states_NE), k)
    return HeadTarget(states_NE, head, k if form == "folded" else None)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (2.0, 5.0)])
@pytest.mark.parametrize("loss", [of_beta(0.0), of_beta(0.3), of_beta(1.0), choose(DISTANCE)], ids=lambda x: x.words)
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("form", FORMS)
def test_chunked_sum_equals_the_plain_sum(
    form: str, loss: Loss, rows: int, scale: float, softcap: float | None
) -> None:
    """Value, and gradients for states, weight and bias, under a scaled sum."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight, bias, teacher, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(11, 6), (20, 6), (20,), (11, 4), (20, 4)]
    )
    target, results = target_of(form, teacher, Head(teacher_weight)), []
    plain = teacher @ teacher_weight.T if form == "full" else top_k(teacher @ teacher_weight.T, 5)
    for in_chunks in (True, False):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        head = Head(w, b, scale, softcap)
        total = chunked_loss_sum(h, head, target, loss, rows=rows) if in_chunks else loss(head(h), plain).sum()
        (total * 0.37).backward()
        results.append((total.detach(), h.grad, w.grad, b.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", [*FORMS, "tokens"])
def test_no_full_logits_tensor_is_ever_made(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def total(positions: int) -> Tensor:
        hidden, target = torch.randn(positions, 4, requires_grad=True), torch.randn(positions, 4)
        if form == "tokens":
            return chunked_cross_entropy_sum(hidden, head, torch.arange(positions) % 7, rows=4)
        said = target_of(form, target, head, 3)
        seen.clear()
        return chunked_loss_sum(hidden, head, said, of_beta(0.0), rows=4)

    seen: list[int] = []
    plain = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda self, x: (seen.append(x.shape[0]), plain(self, x))[1])
    head = Head(torch.randn(7, 4))
    total(10).backward()
    assert seen == ([4, 4, 2] if form in ("stored", "tokens") else [4, 4, 4, 4, 2, 2])
    nothing = total(0)
    nothing.backward()
    assert nothing == 0


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, target = torch.randn(5, 4), torch.randn(8, 4), HeadTarget(torch.randn(5, 8), Head(torch.eye(8)))
    frozen = chunked_loss_sum(hidden, Head(weight), target, of_beta(0.0), rows=2)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, divergence(hidden @ weight.T, target.states_NE).sum())
    chunked_loss_sum(hidden.requires_grad_(), Head(weight), target, of_beta(0.0), rows=2).backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_a_loss_from_outside_is_chosen_with_its_parameters() -> None:
    student, teacher = logits(9, 4, 6, 2.0, torch.bfloat16)
    loss = choose(DISTANCE, {"power": 3})
    assert (loss, loss.words) == (Loss(DISTANCE, {"power": 3.0}), "distance, power 3")
    assert choose(DISTANCE, {"power": None}) == choose(DISTANCE) == Loss(DISTANCE, {"power": 2.0})
    expected = (student.float().softmax(-1) - teacher.float().softmax(-1)).abs().pow(3).sum(-1)
    ours = loss(student, teacher)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    masked = student.index_fill(1, torch.tensor([2]), -math.inf)
    assert all(torch.isfinite(x).all() for x in loss.with_gradient(masked, teacher))


def test_losses_say_what_they_are() -> None:
    assert of_beta(0.0).words == choose("forward_kl").words == "forward KL, teacher‖student"
    assert of_beta(1.0).words == choose("reverse_kl").words == "reverse KL, student‖teacher"
    assert of_beta(0.25) == choose("jsd", {"beta": 0.25})
    assert of_beta(0.25).words == "generalised JSD, beta 0.25"
    assert {"forward_kl", "jsd", "reverse_kl"} <= set(LOSSES.names())


@LOSSES.register("mean", source="made for the tests")
def mean(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return divergence(student_NV, teacher_NV).mean()


@LOSSES.register("flat", source="made for the tests")
def flat(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return teacher_NV.sum(-1)


@pytest.mark.parametrize(
    ("name", "parameters", "part"),
    [
        ("jds", {}, r'unknown loss "jds"; known: .*forward_kl, jsd, .*Did you mean "jsd"\?'),
        ("jsd", {"bta": 0.5}, r'loss "jsd" has no parameter "bta"; it has: beta\. Did you mean "beta"\?'),
        ("forward_kl", {"beta": 0.5}, 'loss "forward_kl" has no parameter "beta"; it has: none'),
        ("jsd", {"beta": "half"}, "beta of loss \"jsd\" is 'half'; its default is 0.5"),
        ("jsd", {"beta": True}, "is True"),
        (
            "jsd",
            {"beta": 1},
            "beta is 1.0; allowed is above 0 and below 1",
        ),
        ("jsd", {"beta": math.nan}, "beta is nan"),
        ("mean", {}, "gives shape \\(\\) for 2 positions"),
        ("flat", {}, "does not require grad"),
    ],
)
def test_a_choice_that_cannot_be_used(name: str, parameters: dict[str, object], part: str) -> None:
    with pytest.raises(InputError, match=part):
        choose(name, parameters)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\) differ"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"beta is .* allowed is 0"):
            divergence(torch.zeros(2, 3), torch.zeros(2, 3), beta)
    head, hidden, loss = Head(torch.zeros(5, 3)), torch.zeros(2, 3), of_beta(0.0)
    with pytest.raises(ValueError, match="the student has 2 positions and the teacher 3"):
        chunked_loss_sum(hidden, head, HeadTarget(torch.zeros(3, 3), head), loss, rows=4)
    with pytest.raises(ValueError, match="the student has 2 positions and the teacher 3"):
        chunked_loss_sum(hidden, head, top_k(torch.zeros(3, 5), 2), loss, rows=4)
    with pytest.raises(ValueError, match="the student's head scores 5 ids and the teacher's 4"):
        chunked_loss_sum(hidden, head, HeadTarget(hidden, Head(torch.zeros(4, 3))), loss, rows=4)
    with pytest.raises(ValueError, match="k is 9; allowed is 1 to the 5"):
        chunked_loss_sum(hidden, head, HeadTarget(hidden, head, 9), loss, rows=4)
    with pytest.raises(ValueError, match="names id 8, ids go to 4"):
        chunked_loss_sum(hidden, head, top_k(torch.arange(9.0).expand(2, 9), 2), loss, rows=4)
    with pytest.raises(ValueError, match="names id 8, ids go to 4"):
        divergence(torch.zeros(2, 5), top_k(torch.arange(9.0).expand(2, 9), 2))
    with pytest.raises(ValueError, match="the student has 2 positions and the teacher's top k 3"):
        divergence(torch.zeros(2, 5), top_k(torch.zeros(3, 5), 2))
    with pytest.raises(ValueError, match=r"3 hidden states and targets \(2,\) differ"):
        chunked_cross_entropy_sum(torch.zeros(3, 3), head, torch.tensor([1, 2]), rows=4)
    with pytest.raises(ValueError, match="targets reach from 1 to 5, ids from 0 to 4"):
        chunked_cross_entropy_sum(hidden, head, torch.tensor([1, 5]), rows=4)


@pytest.mark.parametrize("rows", [2, 50])
def test_chunked_sum_with_a_weight_that_is_embedding_and_head(rows: int) -> None:
    generator = torch.Generator().manual_seed(8)
    table, teacher_logits = (torch.randn(20, d, generator=generator) for d in (6, 20))
    tokens = torch.randint(20, (9,), generator=generator)
    identity, grads = Head(torch.eye(20)), []
    for in_chunks in (True, False):
        w = table.clone().requires_grad_()
        h, target = torch.tanh(w[tokens]), teacher_logits[tokens]
        if in_chunks:
            total = chunked_loss_sum(h, Head(w), HeadTarget(target, identity), of_beta(0.0), rows=rows)
        else:
            total = divergence(h @ w.T, target).sum()
        total.backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_a_slice_of_the_weight() -> None:
    """A padded vocabulary: the head is the first rows of the parameter."""
    weight = torch.randn(12, 4, requires_grad=True)
    hidden, teacher = torch.randn(5, 4), torch.randn(5, 8)
    target = HeadTarget(teacher, Head(torch.eye(8)))
    chunked_loss_sum(hidden, Head(weight[:8]), target, of_beta(0.0), rows=2).backward()
    ours, weight.grad = weight.grad, None
    divergence(hidden @ weight[:8].T, teacher).sum().backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-5)
    assert not ours[8:].any()


def test_under_autocast_products_are_bfloat16_and_the_divergence_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight, teacher, teacher_weight = (
        torch.randn(*shape, generator=generator) for shape in [(9, 16), (30, 16), (9, 16), (30, 16)]
    )
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = chunked_loss_sum(h, Head(w), HeadTarget(teacher, Head(teacher_weight)), of_beta(0.0), rows=4)
    total.backward()
    assert total.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    logits, target = ((a.bfloat16() @ b.bfloat16().T).float() for a, b in ((hidden, weight), (teacher, teacher_weight)))
    expected = divergence(logits, target).sum()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    exact = torch.softmax(logits, -1) - torch.softmax(target, -1)
    torch.testing.assert_close(w.grad, exact.T @ hidden, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_cross_entropy_and_gradients_match_torchs_own(rows: int, scale: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(8)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(9, 6), (30, 6), (30,)])
    targets = torch.randint(30, (9,), generator=generator)
    inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    total = chunked_cross_entropy_sum(inputs[0], Head(inputs[1], inputs[2], scale, softcap), targets, rows=rows)
    (2 * total).backward()
    slow = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = scale * (slow[0] @ slow[1].T + slow[2])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (2 * expected).backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(inputs, slow, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_cross_entropy_in_float32_and_bfloat16_products() -> None:
    generator = torch.Generator().manual_seed(9)
    hidden, weight = (torch.randn(*s, generator=generator) for s in [(40, 16), (300, 16)])
    targets = torch.randint(300, (40,), generator=generator)
    exact = functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    ours = chunked_cross_entropy_sum(hidden, Head(weight), targets, rows=16)
    assert float(ours) == pytest.approx(float(exact), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        total = chunked_cross_entropy_sum(hidden, Head(weight), targets, rows=16)
    rounded = functional.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).double(), targets, reduction="sum")
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(rounded), rel=1e-5)


def test_a_loss_says_what_a_user_should_know_of_its_parameters() -> None:
    assert [of_beta(beta).caution for beta in (0.0, 0.5, 1.0)] == [None] * 3
    assert "close to 1 but is no reverse KL" in str(of_beta(0.97).caution)
    with restored(LOSSES):
        mine = described("mine", caution=lambda *, heat: f"heat {heat:g} is odd")(lambda s, t, *, heat=2.0: s.sum(-1))
        LOSSES.register("mine", source="this test")(mine)
        assert choose("mine").caution == "heat 2 is odd"
