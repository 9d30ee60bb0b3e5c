"""Ways to hold AdamW's moments: exact on the host, near in 8 bits; each goes on from what a checkpoint holds."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from remend.recovery.settings import RecoverConfig
from remend.training.optimizers import OPTIMIZERS

RATE, DECAY = 0.01, 0.1
BITS = pytest.param(
    "adamw-8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
)


def masters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 64), (5, 3), (64,))]


def made(name: str, tensors: list[Tensor]) -> Any:
    groups = [{"params": tensors[:2], "weight_decay": DECAY}, {"params": tensors[2:], "weight_decay": 0.0}]
    return OPTIMIZERS.get(name).make(groups, RATE)


def move(optimizer: Any, tensors: list[Tensor], steps: range) -> None:
    """Steps whose gradients their number settles; the last tensor has one in every other step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for at, tensor in enumerate(tensors):
            gradient = torch.randn(tensor.shape, generator=generator) * 10.0**-step
            tensor.grad = gradient if at < 2 or step % 2 else None
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def by_definition(tensors: list[Tensor], steps: range) -> list[Tensor]:
    """Algorithm 2 of arXiv 1711.05101 in float64."""
    result = []
    for at, tensor in enumerate(tensors):
        w, m, v = tensor.detach().double(), 0.0, 0.0
        count = 0
        for step in steps:
            generator, rate = torch.Generator().manual_seed(step), RATE / (1 + step)
            gradients = [torch.randn(t.shape, generator=generator) * 10.0**-step for t in tensors]
            if at == 2 and not step % 2:
                continue
            count, g = count + 1, gradients[at].double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w * (1 - rate * (DECAY if at < 2 else 0.0))
            w = w - rate * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
        result.append(w)
    return result


def test_the_recipe_names_what_is_registered() -> None:
    assert sorted(get_args(RecoverConfig.model_fields["optimizer"].annotation)) == OPTIMIZERS.names()


@pytest.mark.parametrize(("name", "near"), [("adamw", 1e-6), ("adamw-host", 1e-6)])
def test_it_is_adamw(name: str, near: float) -> None:
    tensors = masters()
    wanted = by_definition(tensors, range(4))
    move(made(name, tensors), tensors, range(4))
    for ours, theirs in zip(tensors, wanted, strict=True):
        assert float((ours.detach().double() - theirs).abs().max()) < near


def test_on_the_host_every_bit_is_that_of_adamw_on_a_cpu() -> None:
    ours, theirs = masters(), masters()
    move(made("adamw-host", ours), ours, range(5))
    move(made("adamw", theirs), theirs, range(5))
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw-host", BITS])
def test_saved_and_restored_it_goes_on_in_every_bit(name: str) -> None:
    kind, whole = OPTIMIZERS.get(name), masters()
    optimizer = made(name, whole)
    move(optimizer, whole, range(2))
    torn = [nn.Parameter(t.detach().clone()) for t in whole]
    saved = [{k: v.clone() for k, v in kind.state(optimizer, t).items()} for t in whole]
    again = made(name, torn)
    for tensor, state in zip(torn[:2], saved, strict=False):
        kind.restore(again, tensor, state, 2)
    move(optimizer, whole[:2], range(2, 5))
    move(again, torn[:2], range(2, 5))
    assert all(a.equal(b) for a, b in zip(whole[:2], torn[:2], strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw-host", BITS])
def test_second_moments_are_float32_or_8_bits_with_their_scales_and_never_bfloat16(name: str) -> None:
    tensors = masters()
    optimizer = made(name, tensors)
    move(optimizer, tensors, range(2))
    states = [OPTIMIZERS.get(name).state(optimizer, t) for t in tensors]
    large = {key: tensor.dtype for key, tensor in states[0].items()}
    if name == "adamw-8bit":
        scales = {"absmax1": torch.float32, "absmax2": torch.float32}
        assert large == {"state1": torch.uint8, "state2": torch.uint8, **scales}
        assert {tensor.dtype for tensor in states[1].values()} == {torch.float32}  # a small tensor's
    else:
        assert large == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
def test_in_8_bits_it_stays_near_adamw_and_is_not_it() -> None:
    start, ours, theirs = masters(), masters(), masters()
    move(made("adamw-8bit", ours), ours, range(3))
    move(made("adamw", theirs), theirs, range(3))
    moved = float((theirs[0] - start[0]).detach().abs().mean())
    apart = float((ours[0] - theirs[0]).detach().abs().mean())
    assert 0 < apart < 0.1 * moved


def test_without_the_package_or_on_a_device_that_it_can_t_serve_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, cpu = OPTIMIZERS.get("adamw-8bit"), torch.device("cpu")
    assert [OPTIMIZERS.get(name).problem(cpu) for name in ("adamw", "adamw-host")] == [None, None]
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert kind.problem(cpu) == (
            "optimizer: adamw-8bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes. "
            "Or take optimizer: adamw-host, which is exact and needs no package, or adamw"
        )
    for step, said in ((_raise, "NotImplementedError: no kernel"), (_nothing, "its first step is not AdamW's")):
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name: object())
            patched.setattr(type(kind), "make", lambda self, groups, rate, step=step: copy.copy(step))
            told = kind.problem(cpu) or ""
        assert f"can't be had on cpu ({said}); take optimizer: adamw-host" in told


class _Step:
    """An optimizer that raises, or does nothing."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def step(self) -> None:
        """As said."""
        if self.error:
            raise self.error


_raise, _nothing = _Step(NotImplementedError("no kernel")), _Step(None)
