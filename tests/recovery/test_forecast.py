"""A plan's facts, its forecast, and what a run leaves for the next one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from remend.files.run_directory import RunDirectory
from remend.recovery import speeds
from remend.recovery.estimate import COST
from remend.recovery.forecast import disk_at_most, facts_of, forecast
from remend.recovery.job import recover, settings
from remend.recovery.measure_speed import measured_costs
from remend.recovery.plan import Plan
from remend.recovery.preflight import preflight


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speeds, "GUESSING", 0.01)
    return tmp_path / "cache" / "rates.json"


def plan_of(recipe: dict[str, Any], **changes: Any) -> Plan:
    checked = preflight(settings(overrides={**recipe, **changes}))
    assert checked.plan is not None, checked.problems
    return checked.plan


def test_facts_of_a_plan(recipe: dict[str, Any]) -> None:
    plan = plan_of(recipe, repair=True, repair_samples=12)
    facts = facts_of(plan)
    (stream,) = facts.streams
    assert (stream.name, stream.rows, stream.answer, stream.held_out, stream.on_policy, stream.pool) == (
        *("recover", 4, 8, 6, 1.0),
        0,
    )
    lengths = [len(p.tokens) for p in plan.prompts.main.train]
    assert (stream.prompt, stream.longest) == (sum(lengths) / 34, max(lengths))
    assert (facts.steps, facts.updates, facts.batch, facts.repair) == (4, 2, 4, 12)
    assert (facts.checkpoints, facts.saved_checkpoints, facts.evaluations) == (2, 2, 0)
    # on a grid the embeddings of the teacher are not trained, and the matrices have masters of their own
    assert facts.student == facts.reference == plan.size
    assert facts.trained == plan.parameters - 320 * 64
    assert facts.held == plan.size.matrices
    grid = facts.codes + facts.scales
    assert disk_at_most(plan).total == 4 * plan.parameters + grid + 2 * 12 * plan.parameters


def test_facts_of_other_recipes(recipe: dict[str, Any]) -> None:
    adapter = facts_of(plan_of(recipe, lora={}, learning_rate=1e-3))
    assert (adapter.trained, adapter.held) == (16 * adapter.student.sides, 0)
    some = facts_of(plan_of(recipe, lora={"targets": ["q_proj"]}, learning_rate=1e-3))
    assert some.trained == some.student.parameters // 50
    assert facts_of(plan_of(recipe, eval_every=3)).evaluations == 2  # the last step is, for the best
    half = facts_of(plan_of(recipe, streams={"a": {"policy": 0.5}})).streams[0]
    assert (half.on_policy, half.pool) == (0.5, 4)
    written = facts_of(plan_of({**recipe, "held_out": None}, data="self", self_prompts=200))
    assert (written.written, written.streams[0].held_out) == (200, 20)
    streams = {"keep": {"teacher": "ema", "weight": 0.5}, "main": {}}
    two = facts_of(plan_of(recipe, streams=streams))
    assert [stream.name for stream in two.streams] == ["main", "keep"]  # the one that is measured comes first
    assert (two.copies, two.averages) == (1, True)


def test_without_a_record_it_is_a_guess(recipe: dict[str, Any]) -> None:
    found = forecast(plan_of(recipe))
    assert found.source == "no run was recorded on this machine; a guess from how fast it multiplies"
    assert found.answered is None
    assert list(found.seconds) == ["loading", "baseline", "training", "saving", "measuring"]
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_a_run_makes_the_next_estimate(recipe: dict[str, Any], cache: Path) -> None:
    began = time.monotonic()
    result = recover(**recipe)
    whole = time.monotonic() - began
    spent = RunDirectory(result.out).phase_seconds()
    assert list(spent) == ["loading", "prompts", "baseline", "repair", "training", "saving", "measuring"]
    assert 0.7 * whole < sum(spent.values()) <= whole  # no phase counts another's time; checks come before the first
    (run,) = json.loads(cache.read_text())["runs"]
    assert (run["parameters"], run["held"]) == (94_528, "GridKind")
    assert 0 < run["answered"] <= 1
    found = forecast(plan_of({**recipe, "out": recipe["out"] + "-2"}))
    assert found.source == "what a run on this machine took"
    assert found.answered == run["answered"]
    for phase in ("loading", "baseline", "training", "measuring"):
        assert found.seconds[phase] == pytest.approx(spent[phase], rel=0.01, abs=0.01)
    longer = forecast(plan_of({**recipe, "out": recipe["out"] + "-2"}, steps=8))
    assert longer.seconds["training"] == pytest.approx(2 * spent["training"], rel=0.2)


def test_a_resumed_run_says_nothing_of_this_machine(recipe: dict[str, Any], cache: Path) -> None:
    import shutil

    result = recover(**recipe)
    cache.unlink()
    shutil.rmtree(result.out / "model")
    (result.out / "summary.json").unlink()
    recover(resume=result.out)
    assert not cache.exists()


@pytest.mark.parametrize("changes", [{"repair": True}, {"lora": {}}, {"streams": {"a": {"policy": "off"}}}])
def test_measured_costs(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    plan = plan_of(recipe, **changes)
    costs = measured_costs(plan)
    assert set(costs) == set(COST)
    assert all(cost >= 0 for cost in costs.values())
    assert not Path(plan.config.out).exists()
    found = forecast(plan, costs, "a step that was timed now")
    assert found.source == "a step that was timed now"
    assert all(seconds > 0 for seconds in found.seconds.values())
