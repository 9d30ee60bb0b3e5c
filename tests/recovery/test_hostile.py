"""Damaged files of a run, and recipes and runs of a stranger's, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.recovering import assert_equal_runs, torn_copy
from remend.errors import InputError
from remend.files.run_directory import BEGINNING, MANIFEST, RECIPE, SUMMARY, RunDirectory
from remend.recovery.job import RecoverResult, check, recover, track


def written(recipe: dict[str, Any], path: Path, **more: Any) -> Path:
    path.write_text(yaml.safe_dump({**recipe, **more}))
    return path


def test_what_can_be_made_again_is(
    repaired_run: RecoverResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    for name in ("timing.jsonl", "reference.jsonl"):
        (torn / name).write_bytes((torn / name).read_bytes() + b'{"a": \xff}\n[1]\n{}\n')
    assert_equal_runs(repaired_run, recover(resume=torn))
    assert "3 damaged lines of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", MANIFEST, "baseline.json"])
@pytest.mark.parametrize("damage", ["[1]\n", "{}\n", "{\n", '{"a": ' + "9" * 5000 + "}\n"])
def test_what_a_run_can_not_go_on_without(
    name: str, damage: str, repaired_run: RecoverResult, tmp_path: Path, run: Any
) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    (torn / name).write_text(damage)
    code, _, err = run("recover", "--resume", torn)
    assert code == 2
    assert f"{torn / name}" in err.replace("working in", "")
    assert "put back a copy of it, or start a new run with another out" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_summary_that_says_nothing(text: str, repaired_run: RecoverResult, tmp_path: Path, run: Any) -> None:
    place = Path(shutil.copytree(repaired_run.out, tmp_path / "run"))
    (place / SUMMARY).write_text(text)
    code, _, err = run("recover", "--resume", place)
    assert code == 0
    assert "the run counts as interrupted" in err
    assert (place / f"{SUMMARY}.aside-1").read_text() == text
    assert RunDirectory(place).complete


def test_a_beginning_that_was_killed_can_be_begun_again(recipe: dict[str, Any]) -> None:
    out = Path(str(recipe["out"]))
    out.mkdir()
    (out / BEGINNING).write_text("")
    (out / RECIPE).write_text("")
    assert not [problem for problem in check(**recipe).problems if "not empty" in problem]
    (out / BEGINNING).unlink()
    assert any("is not empty" in problem for problem in check(**recipe).problems)


@pytest.mark.parametrize("value", [True, "yes", 1])
def test_a_recipe_lets_no_code_run(value: object, recipe: dict[str, Any], tmp_path: Path, run: Any) -> None:
    path = written(recipe, tmp_path / "r.yaml", trust_remote_code=value)
    code, _, err = run("check", path)
    assert code == 2
    assert "trust_remote_code is set, and a file never lets code run" in err
    assert "say --trust-remote-code with the command" in err


def test_the_command_may(recipe: dict[str, Any], tmp_path: Path, run: Any) -> None:
    path = written(recipe, tmp_path / "r.yaml", trust_remote_code=True)
    assert run("check", path, "--trust-remote-code")[0] == 0
    assert run("check", path, "trust_remote_code=true")[0] == 0
    assert run("check", written(recipe, tmp_path / "s.yaml", trust_remote_code=False))[0] == 0
    assert not check(**recipe, trust_remote_code=True).problems


def test_a_run_asks_for_it_again(repaired_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    manifest, recipe = json.loads((torn / MANIFEST).read_text()), yaml.safe_load((torn / RECIPE).read_text())
    manifest["recipe"]["trust_remote_code"] = recipe["trust_remote_code"] = True
    (torn / MANIFEST).write_text(json.dumps(manifest))
    (torn / RECIPE).write_text(yaml.safe_dump(recipe))
    for again in (lambda: recover(resume=torn), lambda: track(torn)):
        with pytest.raises(InputError, match="was begun with --trust-remote-code, and its files alone never let code"):
            again()
    assert_equal_runs(repaired_run, recover(resume=torn, trust_remote_code=True))


def test_python_beside_a_model_does_not_run(recipe: dict[str, Any], tmp_path: Path, run: Any) -> None:
    model, ran = Path(shutil.copytree(str(recipe["teacher"]), tmp_path / "model")), tmp_path / "ran"
    (model / "mod.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mod.C"}})
    )
    code, _, err = run("check", written({**recipe, "student": str(model)}, tmp_path / "r.yaml"))
    assert code == 2
    assert "it brings Python of its own" in err
    assert "a recipe can't" in err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("degradation.json", "[1]", "degradation.json can't be read: it holds a list"),
        ("degradation.json", '{"layer_map": [null, 1]}', "is no list of layers that rises from 0, and is left aside"),
        ("degradation.json", '{"layer_map": [-1, 0]}', "is no list of layers that rises from 0"),
        ("degradation.json", '{"layer_map": 7}', "is no list of layers that rises from 0"),
        ("degradation.json", '{"format": "int4-g32"}', "tells of the grid int4-g32, and its files hold int3-g64"),
        ("generation_config.json", "[1]", "it holds a list, .* transformers' defaults hold"),
    ],
)
def test_what_lies_beside_a_student(
    name: str, text: str, said: str, recipe: dict[str, Any], tmp_path: Path, run: Any
) -> None:
    student = Path(shutil.copytree(str(recipe["student"]), tmp_path / "student"))
    (student / "degradation.json").write_text("{}")
    (student / name).write_text(text)
    result = check(**{**recipe, "student": str(student)})
    assert any(re.search(said, line) for line in [*result.problems, *result.warnings])


def test_too_few_rows_to_compare_layers(recipe: dict[str, Any]) -> None:
    result = check(**{**recipe, "held_out": 2, "diagnose_every": 2})
    assert any("diagnose_every compares layers over the held-out prompts, 4 at" in p for p in result.problems)


@pytest.mark.parametrize("key", ["student", "teacher", "data", "out"])
def test_names_that_no_file_can_have(key: str, recipe: dict[str, Any], tmp_path: Path, run: Any) -> None:
    code, _, err = run("check", written(recipe, tmp_path / "r.yaml", **{key: "x" * 300}))
    assert code == 2
    assert "no folder can have one of over 255" in err or "File name too long" in err
    code, _, err = run("check", written(recipe, tmp_path / "r.yaml", **{key: "a\0b"}))
    assert code == 2
    assert "holds a zero byte" in err
    with pytest.raises(InputError, match="holds half a character"):
        check(**{**recipe, key: "a\ud800b"})


def test_names_are_no_markup_and_steer_no_terminal(recipe: dict[str, Any], tmp_path: Path, run: Any) -> None:
    rows = [{"prompt": "hi " * 900, "id": "[/b]\x1b[31m"}, *({"prompt": f"p {i}", "id": str(i)} for i in range(60))]
    data = tmp_path / "[red]p.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("check", written(recipe, tmp_path / "r.yaml", data=str(data), held_out=12))
    assert code == 0, err
    assert "[/b]?[31m" in out
    assert "\x1b" not in out + err


def test_an_out_that_is_a_link_to_nothing_or_to_itself_is_found_before_the_run(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    for target in ("nowhere", "link"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        problems = check(**{**recipe, "out": str(tmp_path / "link")}).problems
        assert any("is a link to nothing" in problem for problem in problems), problems
        (tmp_path / "link").unlink()


def test_a_number_beyond_any_range_is_a_problem_of_its_key(recipe: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"learning_rate.*larger than a number"):
        check(**{**recipe, "learning_rate": 10**400})
