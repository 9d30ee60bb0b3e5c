"""The readiness gate: what it finds degenerate, when it opens; and how far the answers of a repair reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from helpers.tiny import build_model
from remend.files.run_directory import RunDirectory
from remend.files.settings import build
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.bootstrap import (
    EVERY,
    Gate,
    Verdict,
    judge_demonstrations,
    judge_rollouts,
    likelihood_gain,
    repair_budget,
    reuses_repair,
)
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import resolve
from remend.training.measure import PromptSums, negative_log_likelihoods, repetition
from remend.training.teachers.frozen import Frozen

FLUENT = Rollout("a", (1,), tuple(range(3, 23)), False)
LOOP = Rollout("b", (1,), (3, 4) * 10, True)


def sums(kl: float) -> list[PromptSums]:
    return [PromptSums("a", 10, 10 * kl, 5, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("own", "kl", "part"),
    [
        ([FLUENT], 0.5, None),
        ([FLUENT], 2.0, "KL 2.00 on the student's own samples"),
        ([LOOP], 0.5, "of its 4-grams are repetitions"),
        ([LOOP], 0.5, "run into the length limit 100% more often"),
    ],
)
def test_what_is_degenerate(own: list[Rollout], kl: float, part: str | None) -> None:
    verdict = judge_rollouts(own, sums(kl), [FLUENT])
    assert (verdict.reasons == []) if part is None else any(part in reason for reason in verdict.reasons)


def test_repetition_by_hand() -> None:
    assert repetition((1, 2, 3, 4, 5)) == 0
    assert repetition((1, 2, 1, 2, 1, 2)) == pytest.approx(1 / 3)  # 1212, 2121, 1212
    assert repetition((1, 2)) == 0


def test_demonstrations_that_help_and_that_do_not() -> None:
    assert judge_demonstrations("s", {"nll": [0.5, 0.6, 0.4]}, 0).reasons == []
    assert "don't show to help" in judge_demonstrations("s", {"nll": [0.5, -0.6, 0.1]}, 0).reasons[0]
    assert judge_demonstrations("s", {"nll": [0.5, 0.6], "score": [0.0, 0.0]}, 0).reasons[0].count("score") == 1


def test_likelihood_gain_is_the_difference_of_two_measurements() -> None:
    teacher = Frozen(scorer(build_model(320)))
    rollouts = [
        Rollout("a", (3, 4), (5, 6, 7), False, (9, 8, 5, 6, 7, 3, 4)),
        Rollout("b", (3,), (8, 9), False, (4, 3)),
    ]
    gain = likelihood_gain(teacher, rollouts)
    without, shown = (negative_log_likelihoods(teacher, rollouts, shown=s) for s in (False, True))
    assert gain == pytest.approx([a - b for a, b in zip(without, shown, strict=True)])
    assert gain[0] != 0


def gate(path: Path, verdicts: list[Verdict], mode: str = "auto", budget: int = 12) -> Gate:
    directory = RunDirectory(path)
    path.mkdir(exist_ok=True)
    return Gate(mode, budget, lambda: verdicts.pop(0), directory, Accelerator(cpu=True))


def test_it_measures_every_few_steps_until_it_opens(tmp_path: Path) -> None:
    verdicts = [Verdict(["babble"]), Verdict([])]
    made = gate(tmp_path / "run", verdicts)
    assert [made(step) for step in range(1, 8)] == [False] * EVERY + [True] * 3
    assert verdicts == []
    again = replace(made, measure=None, decided=[(0, False), (4, True)])  # a resumed run knows what was decided
    assert again(6)


def test_the_budget_ends_it(tmp_path: Path) -> None:
    made = gate(tmp_path / "run", [Verdict(["babble"])] * 9, budget=6)
    assert [made(step) for step in range(1, 9)] == [False] * 6 + [True] * 2
    rows: list[dict[str, Any]] = RunDirectory(tmp_path / "run").rows("gate.jsonl")
    assert rows[-1]["reasons"] == ["the budget of 6 bootstrap steps is spent"]


def test_on_waits_for_the_budget_and_off_for_nothing(tmp_path: Path) -> None:
    made = gate(tmp_path / "on", [], mode="on", budget=3)
    assert [made(step) for step in range(1, 6)] == [False] * 3 + [True] * 2
    assert gate(tmp_path / "off", [], mode="off")(1)


NAMES = {"student": "s", "teacher": "t", "data": "d", "out": "o", "bootstrap": "repair"}


@pytest.mark.parametrize(
    ("changed", "answers", "steps"),
    [
        ({"steps": 48}, 192, 48),
        ({"steps": 100}, 192, 48),
        ({"steps": 100, "gradient_accumulation": 3}, 192, 16),
        ({"steps": 100, "prompts_per_step": 32}, 192, 12),
        ({"steps": 100, "off_policy_passes": 1}, 192, 24),
        ({"steps": 100, "bootstrap_steps": 30}, 192, 30),
        ({"steps": 100, "updates_per_rollout": 5, "save_every": 0}, 192, 45),
        ({}, 0, 0),
    ],
)
def test_answers_serve_whole_steps(changed: dict[str, Any], answers: int, steps: int) -> None:
    assert repair_budget(build(RecoverConfig, {**NAMES, **changed}, "test"), answers) == steps


@pytest.mark.parametrize(
    ("changed", "reused"),
    [
        ({}, True),
        ({"bootstrap": "off"}, False),
        ({"bootstrap": "on"}, False),
        ({"temperature": 0.7}, False),
        ({"streams": {"a": {"policy": 0.5}}}, False),
        ({"streams": {"a": {"demonstrations": True}}}, False),
        ({"streams": {"a": {"teacher": "other"}}}, False),
        ({"streams": {"a": {}, "b": {"teacher": "initial"}}}, False),
    ],
)
def test_only_a_plain_stream_of_the_reference_can_use_them(changed: dict[str, Any], reused: bool) -> None:
    config = build(RecoverConfig, {**NAMES, **changed}, "test")
    assert reuses_repair(config, resolve(config)) is reused
