"""Two processes that share each step come to what one comes to; what can't be shared is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.processes import two_processes
from helpers.recovering import keeping, torn_copy, weights
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.recovery.bootstrap import GATE
from remend.recovery.job import RecoverResult, check, recover


@pytest.fixture(scope="module")
def recipes(repaired_recipe: dict[str, Any], both_streams: dict[str, Any], place: Path) -> dict[str, dict[str, Any]]:
    """By name: 4 rows a step; 5 and 3 rows, and 2 and 1, which two processes share unequally."""
    repaired = {**repaired_recipe, "steps": 4, "eval_every": 0, "diagnose_every": 0, "save_every": 2}
    streams = {**keeping(both_streams, policy=0.5, share=0.6), "bootstrap": "auto", "batch_size": 8, "steps": 3}
    three = {**both_streams, "prompts_per_step": 3, "batch_size": 1, "steps": 2, "eval_every": 0}
    every = {"repaired": repaired, "undone": repaired, "streams": streams, "three": three}
    return {name: {**recipe, "out": str(place / f"one-{name}")} for name, recipe in every.items()}


@pytest.fixture(scope="module")
def diagnosis(reference_dir: Path, student_dir: Path, place: Path) -> dict[str, Any]:
    """What is asked of a diagnosis, without `out`."""
    models = {"reference": str(reference_dir), "students": [str(student_dir)]}
    return {**models, "data": str(place / "prompts.jsonl"), "max_new_tokens": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def repaired(recipes: dict[str, dict[str, Any]]) -> RecoverResult:
    return recover(**recipes["repaired"])


@pytest.fixture(scope="module")
def pairs(
    recipes: dict[str, dict[str, Any]], repaired: RecoverResult, diagnosis: dict[str, Any], place: Path
) -> dict[str, Path]:
    """The runs and the diagnosis of two processes, all by one launch; accelerate is told to divide gradients.

    In `undone` repair makes the student worse; in `resumed` two processes go on with the run of one.
    """
    out = {name: place / f"two-{name}" for name in recipes}
    kinds = {name: "spoiled" if name == "undone" else "recover" for name in recipes}
    jobs = [(kinds[name], {**recipe, "out": str(out[name])}) for name, recipe in recipes.items()]
    out["resumed"] = torn_copy(repaired.out, place / "two-resumed", 2)
    resumed = ("recover", {"resume": str(out["resumed"])})
    out["diagnosed"] = place / "two-diagnosed"
    diagnosed = {**diagnosis, "out": str(out["diagnosed"]), "cache": str(place / "cache-of-two")}
    differs = {**recipes["repaired"], "out": str(place / "two-differing"), "said": str(place / "said"), "repair": False}
    out["said"] = place / "said"
    two_processes(
        *jobs,
        resumed,
        ("diagnose", diagnosed),
        ("differing", {**differs, "bootstrap": "off"}),
        environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    )
    return out


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunDirectory(run).rows(METRICS) if "loss" in row]


def assert_alike(single: RecoverResult, pair: Path) -> None:
    for a, b in zip(single.metrics, rows_of(pair), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.keys() == b.keys()
        shares = {key: a[key] for key in a if key.endswith(("tokens", "clipped_share", "on_policy"))}
        assert {key: b[key] for key in shares} == pytest.approx(shares, rel=1e-12)
    summary = json.loads((pair / "summary.json").read_text())
    assert summary["recovered"]["kl"] == pytest.approx(single.summary["recovered"]["kl"], rel=1e-2)
    assert summary["tokens_trained"] == single.summary["tokens_trained"]


ROUNDING = 2e-5
"""A fiftieth of the learning rate: AdamW makes a part of a step even of a gradient that is all rounding."""


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = weights(one / "model"), weights(other / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=ROUNDING), name


def assert_same_codes(one: Path, other: Path) -> None:
    ours, theirs = weights(one / "model" / "remend"), weights(other / "model" / "remend")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_repair_and_the_answers_that_it_was_fitted_to(repaired: RecoverResult, pairs: dict[str, Path]) -> None:
    assert_alike(repaired, pairs["repaired"])
    assert [row["on_policy"] for row in rows_of(pairs["repaired"])] == [0.0, 0.0, 0.0, 1.0]
    assert_same_codes(repaired.out, pairs["repaired"])
    assert_same_model(repaired.out, pairs["repaired"])
    masters = [RunDirectory(out).checkpoints()[-1].masters() for out in (repaired.out, pairs["repaired"])]
    assert all(torch.allclose(tensor, masters[1][name], rtol=0, atol=ROUNDING) for name, tensor in masters[0].items())


def test_a_run_says_how_many_processes_shared_how_many_prompts(pairs: dict[str, Path]) -> None:
    shared = {"processes": 2, "prompts_per_step": 3}
    manifest = json.loads((pairs["three"] / "manifest.json").read_text())
    assert {key: manifest[key] for key in shared} == shared
    state = json.loads((RunDirectory(pairs["repaired"]).checkpoints()[-1].path / "state.json").read_text())
    assert (state["processes"], state["prompts_per_step"]) == (2, 4)


def test_two_processes_go_on_with_the_run_of_one_and_one_with_that_of_two(
    repaired: RecoverResult, pairs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_alike(repaired, pairs["resumed"])
    assert_same_codes(repaired.out, pairs["resumed"])
    torn = torn_copy(pairs["repaired"], tmp_path / "torn", 2)
    recover(resume=torn)
    assert "processes 2 to 1" in capsys.readouterr().err
    assert_alike(repaired, torn)
    assert_same_codes(repaired.out, torn)


def test_a_repair_that_makes_things_worse_is_undone_by_all(
    recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]
) -> None:
    assert_alike(recover(**{**recipes["undone"], "repair": False, "bootstrap": "off"}), pairs["undone"])
    assert not any("on_policy" in row for row in rows_of(pairs["undone"]))


def test_pools_gate_and_streams(recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]) -> None:
    single = recover(**recipes["streams"])
    assert_alike(single, pairs["streams"])
    assert RunDirectory(single.out).rows(GATE) == RunDirectory(pairs["streams"]).rows(GATE)


def test_a_diagnosis(diagnosis: dict[str, Any], pairs: dict[str, Path], tmp_path: Path) -> None:
    single = remend.diagnose(**diagnosis, out=str(tmp_path / "one"), cache=str(tmp_path / "cache"))
    pair = json.loads((pairs["diagnosed"] / "diagnosis.json").read_text())
    for key in ("layers", "behaviour", "positions", "stretches", "norms", "severity", "rows"):
        assert pair[key] == single[key], key


def test_three_prompts_on_two_processes(recipes: dict[str, dict[str, Any]], pairs: dict[str, Path]) -> None:
    single = recover(**recipes["three"])
    assert_alike(single, pairs["three"])
    assert_same_model(single.out, pairs["three"])


def test_processes_that_come_off_end_the_run(pairs: dict[str, Path]) -> None:
    """One of them moves a master; both are told which, and no checkpoint is written."""
    said = {Path(f"{pairs['said']}-{process}").read_text() for process in (0, 1)}
    (text,) = said
    assert re.match(r"process 1 holds other weights than process 0 (before|after) .*: model\.\S+ ", text)
    assert "make them so and go on with remend recover --resume, or launch one process" in text
    assert RunDirectory(pairs["said"].with_name("two-differing")).checkpoints() == []


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher says to the first of two processes."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts_per_step": 1}, "2 processes share the prompts of a step, which are 1; launch 1 at most, or raise"),
        ({"alignment": {"measure": "cka"}}, "which 2 processes cut otherwise than one; leave it out"),
        ({"device": "meta"}, "device meta can't be shared by 2 processes; give cpu or cuda"),
    ],
)
def test_what_two_processes_cant_share(recipe: dict[str, Any], changed: dict[str, Any], said: str) -> None:
    problems = check(**{**recipe, **changed}).problems
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP, and a model is not sharded over processes yet"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "asks for mixed_precision fp16, whose scaled gradients"),
    ],
)
def test_configurations_of_accelerate_that_are_refused(
    recipe: dict[str, Any], name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    problems = check(**recipe).problems
    assert len(problems) == 1
    assert said in problems[0]
    with pytest.raises(InputError, match="launch without it"):
        recover(**recipe)
    assert not Path(recipe["out"]).exists()


def test_what_of_accelerate_has_no_effect_is_said(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables as `accelerate launch --cpu --num_processes 2 --mixed_precision bf16` sets them."""
    told = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "bf16", "MASTER_ADDR": "127.0.0.1"}
    before = check(**recipe).warnings
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    new = [warning for warning in check(**recipe).warnings if warning not in before]
    assert len(new) == 2
    assert "bf16 has no effect: dtype decides, and it is float32 here" in new[0]
    assert "has started this one alone, as it does on a CPU; torchrun --nproc-per-node N" in new[1]


def test_a_run_keeps_the_prompts_of_its_steps(repaired: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired.out, tmp_path / "torn", 2)
    with pytest.raises(InputError, match="prompts_per_step: 4 became 8"):
        recover(resume=torn, prompts_per_step=8)
    manifest = torn / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "prompts_per_step": 8}))
    with pytest.raises(InputError, match="took 8 prompts, and would take 4 now; set prompts_per_step to 8"):
        recover(resume=torn)


def test_the_same_prompts_by_another_name_are_no_change(repaired: RecoverResult) -> None:
    assert recover(resume=repaired.out, prompts_per_step=4).summary == repaired.summary


@pytest.mark.usefixtures("two")
def test_two_processes_dont_go_on_with_what_was_not_recorded(repaired: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired.out, tmp_path / "torn", 2)
    manifest = json.loads((torn / "manifest.json").read_text())
    del manifest["processes"]
    (torn / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="multiplied the prompts of a step by the processes, and recorded neither"):
        recover(resume=torn)


@pytest.mark.usefixtures("two")
def test_each_process_draws_its_own_dropout(adapter_run: RecoverResult, tmp_path: Path) -> None:
    """So a run with dropout goes on with as many processes as it was begun with."""
    torn = torn_copy(adapter_run.out, tmp_path / "torn", 2)
    manifest, recipe = torn / "manifest.json", torn / "recipe.yaml"
    text = manifest.read_text()
    assert '"dropout": 0.0' in text
    manifest.write_text(text.replace('"dropout": 0.0', '"dropout": 0.1'))
    recipe.write_text(recipe.read_text().replace("dropout: 0.0", "dropout: 0.1"))
    with pytest.raises(InputError, match=r"begun with 1 processes, and 2 go on: each draws its own dropout.*Launch 1"):
        recover(resume=torn)
