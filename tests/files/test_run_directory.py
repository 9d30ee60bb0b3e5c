"""The run directory: what may stand where something new is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import remend
from remend.errors import FileError, InputError
from remend.files import run_directory
from remend.files.run_directory import INPUTS, METRICS, SUMMARY, RunDirectory, manifest_of, occupied
from remend.files.signed import signed


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A directory that holds inputs of a run to come."""
    (tmp_path / "place" / INPUTS).mkdir(parents=True)
    (tmp_path / "place" / INPUTS / "mine.txt").write_text("mine")
    return tmp_path / "place"


VERBS: dict[str, Callable[[str, Path, str], Any]] = {
    "quantize": lambda model, out, data: remend.quantize(model, out, format="int4-g32-sym", probe=False),
    "prune": lambda model, out, data: remend.prune(model, out, probe=False),
    "export": lambda model, out, data: remend.export(model, out, format="dense"),
    "cache-teacher": lambda model, out, data: remend.cache_teacher(model, out, data=data, max_new_tokens=2),
    "diagnose": lambda model, out, data: remend.diagnose(model, [model], out, data=data),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_replaces_a_directory_leaves_inputs_alone(
    reference_dir: Path, prompt_file: Path, prepared: Path, verb: str
) -> None:
    with pytest.raises(InputError, match="is not empty; name a new directory"):
        VERBS[verb](str(reference_dir), prepared, str(prompt_file))
    assert (prepared / INPUTS / "mine.txt").read_text() == "mine"


def test_a_run_goes_beside_its_inputs(recipe: dict[str, Any], prepared: Path) -> None:
    remend.recover(**{**recipe, "out": str(prepared), "steps": 0})
    assert (prepared / INPUTS / "mine.txt").read_text() == "mine"
    assert json.loads((prepared / SUMMARY).read_text())["steps"] == 0


def test_a_name_that_is_too_long_is_one_message() -> None:
    problem = occupied(Path("o" * 20_000))
    assert problem
    assert "can't be written: File name too long; name another directory" in problem
    assert len(problem) < 400


def test_inputs_are_allowed_to_those_that_ask(prepared: Path) -> None:
    assert occupied(prepared, inputs=True) is None
    assert "is not empty" in str(occupied(prepared))
    (prepared / "more").touch()
    assert "is not empty" in str(occupied(prepared, inputs=True))


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", "x" * 50])
def test_a_line_that_was_cut_short_does_not_spoil_the_next(tmp_path: Path, torn: str) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    directory.append(METRICS, {"step": 1, "word": "é"})
    with (directory.path / METRICS).open("a") as stream:
        stream.write(torn)
    directory.append(METRICS, {"step": 2})
    assert directory.rows(METRICS) == [{"step": 1, "word": "é"}, {"step": 2}]


def test_rows_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    directory.append(METRICS, {"step": 1})
    flushed: list[tuple[Path, int]] = []
    monkeypatch.setattr(run_directory, "flush", lambda path: flushed.append((path, len(directory.checkpoints()))))
    directory.save_checkpoint(1, {}, {}, keep=2)
    assert flushed == [(directory.path / METRICS, 0), (directory.path, 0)]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    for step in (1, 2, 3):
        directory.save_checkpoint(step, {}, {}, keep=9)
    directory.keep_newest(directory.checkpoints(), 2)
    assert [checkpoint.step for checkpoint in directory.checkpoints()] == [2, 3]


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "directory"])
def test_rows_are_never_added_through_a_link_or_to_a_pipe(tmp_path: Path, kind: str) -> None:
    victim, directory = tmp_path / "victim", RunDirectory.create(tmp_path / "run")
    path = directory.path / METRICS
    if kind == "link":
        victim.write_text("precious")
    if kind.startswith("link"):
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(FileError, match=f"{METRICS} is a link, or no plain file, and is not written"):
        directory.append(METRICS, {"step": 1})
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "precious"


@pytest.mark.parametrize(
    "logged",
    [
        [],
        {"/dev/zero": {"bytes": 8, "sha256": "0"}},
        {"../metrics.jsonl": {"bytes": 8, "sha256": "0"}},
        {"off-policy-/../../x.jsonl": {"bytes": 8, "sha256": "0"}},
        {METRICS: {"bytes": "8", "sha256": "0"}},
        {METRICS: 8},
    ],
)
def test_a_checkpoint_that_names_what_no_run_logs_is_left_aside(
    tmp_path: Path, logged: object, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    state = directory.save_checkpoint(1, {}, {}, keep=9).path / "state.json"
    assert directory.whole_checkpoints()
    state.write_text(json.dumps(signed({**json.loads(state.read_text()), "logged": logged})))
    assert not directory.whole_checkpoints()
    assert "names what no run logs" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("key", ["versions", "hardware", "prompts", "warnings", "constraint", "models"])
def test_a_manifest_of_other_kinds_is_one_message(tmp_path: Path, key: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": {}, key: 7}))
    with pytest.raises(FileError, match=f"has no {key} as a run writes it"):
        manifest_of(tmp_path)
