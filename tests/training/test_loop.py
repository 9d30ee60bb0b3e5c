"""The loop: one gradient however the step is cut, exact resume, and a stop on what is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from remend.errors import TrainingError
from remend.files.run_directory import METRICS, RunDirectory
from remend.training.constraints import Constraint, Free
from remend.training.loop import Optimization, Prepared, Saving, StepOutput, Watch, train


class Quadratic:
    """Two streams with targets of their own, cut into micro-batches of `size` rows."""

    weights = {"a": 1.0, "b": 0.5}  # noqa: RUF012

    def __init__(self, model: nn.Linear, size: int, poison: int | None = None) -> None:
        self.model, self.size, self.poison = model, size, poison
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(8, 3, generator=generator)

    def prepare(self, step: int) -> Prepared[tuple[int, list[int]]]:
        rows = list(range(8))
        cut = [rows[i : i + self.size] for i in range(0, 8, self.size)]
        return Prepared([(step, part) for part in cut], {"a": 5, "b": 3}, [f"row-{i}" for i in rows])

    def __call__(self, micro_batch: tuple[int, list[int]]) -> StepOutput:
        step, rows = micro_batch
        sums = {}
        for name, mine in (("a", [r for r in rows if r < 5]), ("b", [r for r in rows if r >= 5])):
            if mine:
                loss = (self.model(self.x[mine]) - 1.0).square().sum()
                sums[name] = (loss * math.nan if step == self.poison else loss, len(mine))
        return StepOutput(sums)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def run_quadratic(path: Path, size: int, steps: int = 5, poison: int | None = None) -> tuple[nn.Linear, list[dict]]:
    model = linear()
    directory = RunDirectory.create(path)
    saving = Saving(directory, every=2, keep=2)
    objective = Quadratic(model, size, poison)
    train(objective, Free(model), Accelerator(cpu=True), Optimization(steps, 0.1, 1), saving)
    return model, directory.rows(METRICS)


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    whole, whole_rows = run_quadratic(tmp_path / "whole", 8)
    single, single_rows = run_quadratic(tmp_path / "single", 1)
    torch.testing.assert_close(whole.weight, single.weight, rtol=0, atol=1e-6)
    for a, b in zip(whole_rows, single_rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["tokens"] == b["tokens"] == 8


def test_loss_is_weighted_sum_of_stream_means(tmp_path: Path) -> None:
    """Against the formula, in float64: each stream divided by its own count, once."""
    model = linear().double()
    _, rows = run_quadratic(tmp_path / "run", 3, steps=1)
    x = Quadratic(linear(), 8).x.double()
    squares = (model(x) - 1.0).square()[:, 0]
    expected = squares[:5].mean() + 0.5 * squares[5:].mean()
    assert rows[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert rows[0]["a/loss"] == pytest.approx(squares[:5].mean().item(), rel=1e-5)
    weight, bias = torch.autograd.grad(expected, [model.weight, model.bias])
    assert rows[0]["grad_norm"] == pytest.approx(torch.cat([weight.flatten(), bias]).norm().item(), rel=1e-5)


def test_the_device_is_that_of_the_masters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Accelerator built earlier in the process, for another device, settles the device of all that follow."""
    expected, rows = run_quadratic(tmp_path / "a", 4)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("meta")))
    model, others = run_quadratic(tmp_path / "b", 4)
    assert model.weight.equal(expected.weight)
    assert others == rows


def test_an_update_by_hand(tmp_path: Path) -> None:
    """AdamW (arXiv 1711.05101) on the clipped gradient: matrices decay, vectors don't; the last checkpoints stay."""
    model, optimization = linear(), Optimization(3, 0.1, 0, weight_decay=0.5, max_grad_norm=0.125)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    directory = RunDirectory.create(tmp_path / "run")
    objective = Quadratic(model, 8)
    loss = (model(objective.x) - 1.0).square()[:, 0]
    gradients = torch.autograd.grad(loss[:5].mean() + 0.5 * loss[5:].mean(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    after: list[dict[str, torch.Tensor]] = []
    watch = Watch([lambda step: after.append({n: p.detach().clone() for n, p in model.named_parameters()})])
    train(objective, Free(model), Accelerator(cpu=True), optimization, Saving(directory, 1, 2), watch=watch)
    rate = optimization.rate_at(1)
    for (name, start), gradient in zip(before.items(), gradients, strict=True):
        kept = 1 - rate * 0.5 if name == "weight" else 1.0
        clipped = gradient * 0.125 / norm
        torch.testing.assert_close(after[0][name], kept * start - rate * clipped / (clipped.abs() + 1e-8))
    checkpoints = directory.checkpoints()
    assert [c.step for c in checkpoints] == [2, 3]
    assert checkpoints[-1].masters()["weight"].equal(after[2]["weight"])


def test_schedule_warms_up_and_follows_the_cosine() -> None:
    optimization = Optimization(steps=10, peak=2.0, warmup=2, final=0.1)
    assert optimization.rate_at(1) == 1.0
    assert optimization.rate_at(2) == 2.0
    assert optimization.rate_at(6) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert optimization.rate_at(10) == pytest.approx(0.2)


def test_not_finite_loss_stops_and_names_step_ids_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan at step 5 .*row-0.*step-000004") as caught:
        run_quadratic(tmp_path / "run", 4, steps=6, poison=5)
    assert "learning_rate" in str(caught.value)
    directory = RunDirectory(tmp_path / "run")
    assert [r["step"] for r in directory.rows(METRICS)] == [1, 2, 3, 4]
    assert [c.step for c in directory.checkpoints()] == [2, 4]
    assert all(t.isfinite().all() for t in directory.checkpoints()[-1].masters().values())


def test_on_step_and_hooks_are_logged(tmp_path: Path) -> None:
    model, seen = linear(), []
    directory = RunDirectory.create(tmp_path / "run")
    train(
        Quadratic(model, 8), Free(model), Accelerator(cpu=True), Optimization(4, 0.1, 1), Saving(directory, 0, 1),
        watch=Watch([lambda step: {"eval/x": float(step)} if step % 2 == 0 else None], on_step=seen.append),
    )  # fmt: skip
    assert [row["step"] for row in seen] == [1, 2, 3, 4]
    assert all(row["seconds"] >= 0 for row in seen)
    extra = [r for r in directory.rows(METRICS) if "loss" not in r]
    assert extra == [{"step": 2, "eval/x": 2.0}, {"step": 4, "eval/x": 4.0}]
    assert directory.checkpoints() == []
    assert len((directory.path / "timing.jsonl").read_text().splitlines()) == 4
    assert all("seconds" not in json.loads(line) for line in (directory.path / METRICS).read_text().splitlines())


class Turned(Constraint):
    """The master is [O, I] of a parameter that holds [I, O], so that its gradient lies in memory in another order."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter
        self.master = parameter.detach().T.contiguous()

    def masters(self) -> dict[str, torch.Tensor]:
        return {"w": self.master}

    def take_gradients(self) -> None:
        self.master.grad, self.parameter.grad = self.parameter.grad.T, None

    @torch.no_grad()
    def project(self) -> None:
        self.parameter.copy_(self.master.T)


class Product(nn.Module):
    """x ↦ x W, W [I, O]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def test_a_master_that_lies_the_other_way_round_gets_its_own_gradients(tmp_path: Path) -> None:
    """Fused AdamW takes weight and gradient as they lie in memory, and says nothing where their orders differ."""
    ends = []
    for name, hold in (("free", Free), ("turned", lambda model: Turned(model.w))):
        model = Product()
        saving = Saving(RunDirectory.create(tmp_path / name), every=2, keep=2)
        train(Quadratic(model, 8), hold(model), Accelerator(cpu=True), Optimization(3, 0.1, 1), saving)
        ends.append(model.w.detach())
    torch.testing.assert_close(ends[1], ends[0])
