"""The pages of docs/extending: their files are written, and their commands run, as they stand on the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remend
from helpers.registering import restored
from remend.cli import main
from remend.compression.containers import CONTAINERS
from remend.data.tasks import TASKS
from remend.degrade import DEGRADATIONS
from remend.files.settings import parse_overrides
from remend.maths.losses import LOSSES
from remend.training.constraints import CONSTRAINTS
from remend.training.teachers import TEACHERS

PAGES = Path(__file__).parents[1] / "docs" / "extending"
QUICK = ["steps=2", "batch_size=2", "max_new_tokens=6", "held_out=4", "save_every=0", "repair=false"]
QUICK += ["device=cpu", "dtype=float32"]
"""What makes a recovery of the tiny model short; a page's recipe names what it is about."""


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def workplace(
    tmp_path: Path, reference_dir: Path, student_dir: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The directory that the pages speak of; what they register is forgotten afterwards."""
    shutil.copytree(reference_dir, tmp_path / "reference")
    shutil.copytree(student_dir, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    with restored(LOSSES, TEACHERS, DEGRADATIONS, CONSTRAINTS, CONTAINERS, TASKS):
        yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def manifest(run: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path("runs") / run / "manifest.json").read_text(encoding="utf-8"))
    return values


def summary(run: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path("runs") / run / "summary.json").read_text(encoding="utf-8"))
    return values


def trained_by_its_loss() -> None:
    assert summary("variation")["training_loss"] == "total variation, scale 2"
    rows = [json.loads(line) for line in Path("runs/variation/metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 2 for row in rows)  # a distance of distributions is at most 1


def softened_by_its_teacher() -> None:
    assert manifest("softened")["imports"] == ["softened"]
    assert "teacher softened:reference" in manifest("softened")["models"]
    rows = [json.loads(line) for line in Path("runs/softened/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 0
    assert summary("softened")["degraded"]["kl"] > 0  # measured against the reference itself


def held_to_its_constraint() -> None:
    assert summary("norms")["constraint"] == "only norms move"
    before, after = (load_file(f"{d}/model.safetensors") for d in ("student", "runs/norms/model"))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "norm" in n}
    recipe = {**parse_overrides(QUICK), "out": "runs/adapter", "lora": {"rank": 4}}
    adapter = load_file(remend.recover("recipe.yaml", **recipe).model / "adapter_model.safetensors")
    assert all(tensor.count_nonzero() for name, tensor in adapter.items() if "lora_B" in name)  # they begin at 0


def recognised_in_its_container() -> None:
    assert json.loads(Path("served/export.json").read_text())["check"]["weights_equal"] is True
    assert summary("npz")["constraint"] == "int3-g64-asym"
    assert any("npz: the grid" in note for note in summary("npz")["notes"])


def damaged_by_its_kind() -> None:
    record = json.loads(Path("noisy/degradation.json").read_text())
    assert (record["kind"], record["scale"], record["probe"]["kl"] > 0) == ("noise", 0.2, True)
    assert json.loads(Path("shrunk/degradation.json").read_text())["method"] == "shrunk"
    before, after = (load_file(f"{d}/model.safetensors") for d in ("reference", "noisy"))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "proj" in n}
    assert summary("noisy")["degraded"]["kl"] > 0


def graded_by_its_task() -> None:
    graded = json.loads(Path("grades.json").read_text())
    assert (graded["task"], graded["n"], graded["items"][0]["reason"][:8]) == ("capitals", 4, "expected")
    gate = [json.loads(line) for line in Path("runs/capitals/gate.jsonl").read_text().splitlines()]
    assert "words/score_gain" in gate[0]


CHECKS: dict[str, Callable[[], None]] = {
    "loss": trained_by_its_loss,
    "teacher": softened_by_its_teacher,
    "degradation": damaged_by_its_kind,
    "constraint": held_to_its_constraint,
    "container": recognised_in_its_container,
    "task": graded_by_its_task,
}


def test_every_page_is_run() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *CHECKS}


@pytest.mark.parametrize("page", sorted(CHECKS))
def test_a_page_runs_as_it_stands(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in [*blocks_of(page, "python"), *blocks_of(page, "yaml")]:
        name = re.match(r"# (\S+)\n", text)
        assert name, f"a block of {page} does not begin with the name of its file"
        (workplace / name[1]).write_text(text, encoding="utf-8")
    commands = [line for text in blocks_of(page, "bash") for line in text.splitlines()]
    assert sum(" recover " in command for command in commands) == 1
    for command in commands:
        words = shlex.split(command)
        if words[0] == "touch":
            Path(words[1]).touch()
            continue
        assert words[0] == "remend"
        quick = QUICK if {"recover", "check"} & set(words) else []
        monkeypatch.setattr(sys, "argv", [*words, *quick, *(["--device", "cpu"] if "eval" in words else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, command
    CHECKS[page]()
