"""Python hands over rows and paths; what is written can be run again without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

import remend
from helpers.tiny import prompts
from remend.errors import InputError

ROWS = [{"prompt": p, "completion": p[::-1]} for p in prompts(30)]


def test_a_run_from_rows_can_be_run_again_and_resumed(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"student": Path(recipe["student"]), "teacher": Path(recipe["teacher"]), "out": tmp_path / "run"}
    given = {**recipe, "data": Dataset.from_list(ROWS[:24]), "eval_data": ROWS[24:], "steps": 2, "held_out": None}
    checked = remend.check(**given)
    assert not checked.problems
    assert not recipe["out"].exists()
    run = remend.recover(**given)
    written = yaml.safe_load((run.out / "recipe.yaml").read_text())
    assert written["data"] == str(run.out / "data/data.jsonl")
    assert len((run.out / "data/eval_data.jsonl").read_text().splitlines()) == 6
    again = remend.recover(run.out / "recipe.yaml", out=tmp_path / "again")
    hashes = [json.loads((r.out / "manifest.json").read_text())["data"] for r in (run, again)]
    assert hashes[0] == hashes[1]
    assert (run.summary["recovered"], run.metrics) == (again.summary["recovered"], again.metrics)
    (run.out / "summary.json").unlink()
    assert remend.recover(resume=run.out).summary["recovered"] == run.summary["recovered"]
    (run.out / "summary.json").unlink()
    with pytest.raises(InputError, match="the files of data changed"):
        remend.recover(**{**given, "data": ROWS[1:24]}, resume=run.out)


def test_other_verbs_take_rows(reference_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    done = remend.finetune(reference_dir, damaged, data=ROWS, steps=1, probe=False)
    assert done["data"]["path"] == str(damaged / "data/data.jsonl")
    assert len((damaged / "data/data.jsonl").read_text().splitlines()) == 30
    remend.cache_teacher(reference_dir, tmp_path / "cache", data=ROWS[:6], k=4, max_new_tokens=4)
    assert (tmp_path / "cache/data/data.jsonl").is_file()
    told = remend.diagnose(reference_dir, damaged, tmp_path / "diagnosis", data=ROWS, rows=24, max_new_tokens=4)
    assert told["data"] == str(tmp_path / "diagnosis/data/data.jsonl")
    assert Path(told["data"]).is_file()
    rows = remend.tasks.get("tooluse-short").rows("held_out", 2)
    out = tmp_path / "scores.json"
    scores = remend.evaluate(reference_dir, ["tooluse-short"], out, data=rows, max_new_tokens=4)
    assert scores["data"]["tooluse-short"]["from"] == str(tmp_path / "scores.data.jsonl")
    again = remend.evaluate(reference_dir, ["tooluse-short"], out, data=rows, max_new_tokens=4)
    assert again["seconds"] == scores["seconds"]
