"""The recipes that ship: each is valid as it is, and runs for two steps with a tiny model in its models' place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import remend
from helpers.tiny import prompts
from remend import cli
from remend.errors import InputError
from remend.files import recipes
from remend.files.yaml_files import read_yaml


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_passes_check_without_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = remend.check(str(recipes.path_of(name)), files=False)
    assert found.problems == []
    assert found.warnings == []


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs_for_two_steps(
    name: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "remend.recovery.written_prompts.generate",
        lambda *_, n, **__: ([f"What is number {i}?" for i in range(n)], None),
    )
    task = tmp_path / "task.jsonl"
    rows = [{"prompt": f"Task {p}", "demonstration": f"Do {i}."} for i, p in enumerate(prompts(30))]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = read_yaml(recipes.path_of(name))
    small: dict[str, Any] = {
        "student": recipe["student"],
        "teacher": recipe["teacher"],
        "out": str(tmp_path / "run"),
        "steps": 2,
        "max_new_tokens": [4, 8] if isinstance(values.get("max_new_tokens"), list) else 8,
        "self_prompts": 24,
        "gradient_accumulation": 1,
        "eval_every": 1 if values.get("eval_every") else 0,
        "device": "cpu",
        "repair": False,
    }
    if "streams" in values:
        small["streams"] = {n: {"data": str(task)} for n, s in values["streams"].items() if s.get("data") != "self"}
    elif values["data"] != "self":
        small["data"] = str(recipe["data"])
        small.pop("self_prompts")
    if values.get("merge"):
        small["student"] = _dense_copy(recipe, tmp_path)
    result = remend.recover(str(recipes.path_of(name)), **small)
    assert result.summary["steps"] == 2
    assert result.report.is_file()


def _dense_copy(recipe: dict[str, Any], tmp_path: Path) -> str:
    import shutil

    shutil.copytree(recipe["student"], tmp_path / "dense")
    for left in ("remend/grid.safetensors", "degradation.json"):
        (tmp_path / "dense" / left).unlink()
    return str(tmp_path / "dense")


def test_ls_and_cp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.build_app()(["recipes", "ls", "--plain"], standalone_mode=False) in (None, 0)
    assert capsys.readouterr().out.split() == [*recipes.names(), *recipes.studies()]
    assert {"forgetting", "quantized", "pruned"} <= set(recipes.names())
    (target,) = recipes.copy("forgetting", tmp_path / "new")
    assert target.read_text() == recipes.path_of("forgetting").read_text()
    with pytest.raises(InputError, match="is there already"):
        recipes.copy("forgetting", tmp_path / "new")
    (study,) = recipes.copy("studies/small", tmp_path / "new")
    assert study == tmp_path / "new" / "small.yaml"
    assert study.read_text() == recipes.path_of("studies/small").read_text()
    with pytest.raises(InputError, match=r'unknown recipe "forgeting"; known: .* Did you mean "forgetting"'):
        recipes.copy("forgeting", tmp_path)


def test_a_recipe_that_reads_prompts_brings_a_sample_and_overwrites_none(tmp_path: Path) -> None:
    copied, sample = recipes.copy("recover", tmp_path)
    assert sample == copied.with_name(str(read_yaml(copied)["data"]))
    assert all(set(json.loads(line)) == {"prompt"} for line in sample.read_text().splitlines())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prompts.jsonl").write_text("mine")
    assert len(recipes.copy("recover", tmp_path / "other")) == 1
    assert (tmp_path / "other" / "prompts.jsonl").read_text() == "mine"
