"""What changed on the disk since it was written is told, and never taken silently."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import remend
from helpers.packed import needs_exact_unpacking
from helpers.recovering import assert_equal_runs, torn_copy
from remend.errors import FileError, InputError
from remend.files.lock import only_writer
from remend.files.run_directory import MANIFEST, METRICS, SUMMARY, RunDirectory
from remend.files.signed import signed
from remend.recovery.job import RecoverResult, recover
from remend.report import report


def flip(path: Path, at: int = -5) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, zeroed, truncated, Path.unlink])
@pytest.mark.parametrize("name", ["masters.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(
    repaired_run: RecoverResult,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    steps = [checkpoint.step for checkpoint in RunDirectory(torn).checkpoints()]
    assert len(steps) == 2
    damage(torn / "checkpoints" / f"step-{steps[-1]:06d}" / name)
    whole = RunDirectory(torn).whole_checkpoints()
    assert [checkpoint.step for checkpoint in whole] == steps[:1]
    told = "is damaged and left aside" in capsys.readouterr().err
    assert told or (damage, name) == (Path.unlink, "state.json")  # without its last file it is no checkpoint


def test_a_run_goes_on_from_the_checkpoint_that_is_whole(repaired_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    last = RunDirectory(torn).checkpoints()[-1]
    flip(last.path / "masters.safetensors")
    assert_equal_runs(repaired_run, recover(resume=torn))


def test_a_checkpoint_of_another_step_is_not_taken(repaired_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    first, last = RunDirectory(torn).checkpoints()
    shutil.rmtree(last.path)
    shutil.copytree(first.path, last.path)
    assert [checkpoint.step for checkpoint in RunDirectory(torn).whole_checkpoints()] == [first.step]


LOGGED = ["metrics.jsonl", "gate.jsonl", "baseline.json", "repair.json", "held_out_repaired.jsonl"]


def with_another_digit(path: Path) -> None:
    """A figure in a file's first line or so is another."""
    text = path.read_text(encoding="utf-8")
    at = next(i for i, letter in enumerate(text) if letter in "12345678" and text[i - 1] in ". ")
    path.write_text(f"{text[:at]}9{text[at + 1 :]}", encoding="utf-8")


@pytest.mark.parametrize("name", [*LOGGED, "repair-answers.jsonl"])
def test_figures_that_changed_since_the_checkpoint_are_refused(
    repaired_run: RecoverResult, tmp_path: Path, name: str
) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    with_another_digit(torn / name)
    with pytest.raises(FileError, match=rf"{name} changed or can't be read since the checkpoint of step \d+ was"):
        recover(resume=torn)


def test_the_reference_s_answers_that_changed_are_made_again(
    repaired_run: RecoverResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    with_another_digit(torn / "reference.jsonl")
    assert_equal_runs(repaired_run, recover(resume=torn))
    assert "reference.jsonl.aside-1 is damaged and left aside" in " ".join(capsys.readouterr().err.split())


def test_the_best_weights_that_changed_are_refused(repaired_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    flip(torn / "best" / "masters.safetensors")
    with pytest.raises(FileError, match=r"masters\.safetensors of .*best changed or can't be read"):
        recover(resume=torn)


def test_a_run_whose_checkpoints_know_no_files_goes_on(repaired_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(repaired_run.out, tmp_path / "torn", 8)
    for checkpoint in RunDirectory(torn).checkpoints():
        state = json.loads((checkpoint.path / "state.json").read_text())
        del state["logged"], state["sha256"]
        (checkpoint.path / "state.json").write_text(json.dumps(state))
    assert_equal_runs(repaired_run, recover(resume=torn))


def test_steps_are_numbers_and_other_folders_the_user_s(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    for step in (999_998, 999_999, 1_000_000):
        directory.save_checkpoint(step, {}, {}, keep=2)
    shutil.copytree(tmp_path / "run/checkpoints/step-999999", tmp_path / "run/checkpoints/step-999999.bak")
    assert [checkpoint.step for checkpoint in directory.checkpoints()] == [999_999, 1_000_000]
    directory.save_checkpoint(1_000_001, {}, {}, keep=1)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-1000001", "step-999999.bak"]


USES: dict[str, Callable[[Path, Path], Any]] = {
    "resume": lambda run, out: recover(resume=run),
    "export": lambda run, out: remend.export(run, out, format="dense"),
    "export of the model": lambda run, out: remend.export(run / "model", out, format="dense"),
    "prune": lambda run, out: remend.prune(str(run / "model"), out, probe=False),
    "recover": lambda run, out: recover(student=str(run / "model"), teacher=str(run / "model"), out=str(out), steps=1),
}


@pytest.mark.parametrize("use", USES)
def test_a_damaged_model_of_a_run_is_refused_by_name(grid_run: RecoverResult, tmp_path: Path, use: str) -> None:
    run = shutil.copytree(grid_run.out, tmp_path / "run")
    flip(run / "model" / "model.safetensors")
    with pytest.raises(
        (FileError, InputError), match=r"model\.safetensors of .* changed or can't be read since"
    ) as told:
        USES[use](run, tmp_path / "out")
    assert "remend recover --resume" in str(told.value)


def test_a_model_that_is_gone_is_written_again(grid_run: RecoverResult, tmp_path: Path) -> None:
    run = shutil.copytree(grid_run.out, tmp_path / "run")
    shutil.rmtree(run / "model")
    assert_equal_runs(grid_run, recover(resume=run))


@needs_exact_unpacking
def test_degraded_and_exported_models_are_known_too(reference_dir: Path, tmp_path: Path) -> None:
    remend.quantize(str(reference_dir), tmp_path / "q4", format="int4-g32-sym", probe=False)
    remend.export(tmp_path / "q4", tmp_path / "packed", format="compressed-tensors")
    for made in ("q4", "packed"):
        copied = shutil.copytree(tmp_path / made, tmp_path / f"{made}-damaged")
        flip(copied / "model.safetensors")
        with pytest.raises(FileError, match="copy it again, or make it again"):
            remend.export(copied, tmp_path / "out", format="dense")
        record = next(copied / name for name in ("export.json", "degradation.json") if (copied / name).is_file())
        kept = {k: v for k, v in json.loads(record.read_text()).items() if k not in ("files", "sha256")}
        record.write_text(json.dumps(kept))
        if made == "packed":  # its owner says that it is meant
            remend.export(copied, tmp_path / "out", format="dense")


def test_a_record_of_a_model_knows_when_it_changed(
    reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "q4"
    remend.quantize(str(reference_dir), student, format="int4-g32-sym", probe=False)
    record = student / "degradation.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "seconds": 5.0}))
    with pytest.raises(FileError, match=r'degradation\.json of .* changed .* remove "sha256" from') as told:
        remend.export(student, tmp_path / "out", format="dense")
    assert '"files"' not in str(told.value)
    record.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("files", "sha256")}))
    remend.export(student, tmp_path / "out", format="dense")
    assert capsys.readouterr().err.count("of a version without hashes") == 1


def test_a_run_s_model_without_hashes_is_read_with_a_warning(
    grid_run: RecoverResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(grid_run.out, tmp_path / "run")
    (run / "model" / "degradation.json").unlink()
    summary = json.loads((run / "summary.json").read_text())
    del summary["saved"]["files"], summary["sha256"]
    (run / "summary.json").write_text(json.dumps(summary))
    remend.export(run, tmp_path / "out", format="dense")
    assert f"{run / 'model'} is of a version without hashes" in capsys.readouterr().err


def test_a_summary_knows_when_it_changed(
    grid_run: RecoverResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(grid_run.out, tmp_path / "run"))
    summary = json.loads((run / SUMMARY).read_text())
    summary["recovered"]["kl"] /= 2
    (run / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(FileError, match=rf"{SUMMARY} changed since remend wrote it: remend recover --resume"):
        report([run])
    with pytest.raises(FileError, match=rf'{SUMMARY} of .* changed .* remove "sha256" from {run / SUMMARY}'):
        remend.export(run, tmp_path / "out", format="dense")
    assert_equal_runs(grid_run, recover(resume=run))
    assert "the run counts as interrupted" in capsys.readouterr().err


def test_a_row_of_the_track_knows_when_it_changed(grid_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(grid_run.out, tmp_path / "torn", 8)
    text = (torn / "track.jsonl").read_text()
    (torn / "track.jsonl").write_text(text.replace("reference_layers", "regerence_layers", 1))
    with pytest.raises(FileError, match=r"track\.jsonl, row 1, changed since it was written; remove that line"):
        recover(resume=torn)


def test_rows_that_are_all_dropped_leave_no_file(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    directory.append("gate.jsonl", {"step": 4, "open": True})
    directory.rewind("gate.jsonl", 2)
    assert not (directory.path / "gate.jsonl").exists()


def test_two_at_once_are_not_let_in(grid_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(grid_run.out, tmp_path / "torn", 16)
    rows = (torn / METRICS).read_bytes()
    with only_writer(torn, "run"), pytest.raises(InputError, match="another process"):
        recover(resume=torn)
    assert (torn / METRICS).read_bytes() == rows


def test_files_of_others_in_a_run_stay(grid_run: RecoverResult, tmp_path: Path) -> None:
    torn = torn_copy(grid_run.out, tmp_path / "torn", 16)
    (torn / ".git").mkdir()
    (torn / ".git" / "config").touch()
    (torn / ".env").touch()
    (torn / ".remend-tmp-left").touch()
    recover(resume=torn)
    assert (torn / ".git" / "config").is_file()
    assert (torn / ".env").is_file()
    assert not (torn / ".remend-tmp-left").exists()


def test_no_step_depends_on_when_checkpoints_are_written(repaired_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two steps are sampled at once, and a checkpoint that is due between them waits for the second."""
    quick = {**repaired_recipe, "repair": False, "bootstrap": "off", "updates_per_rollout": 2, "diagnose_every": 0}
    one, other = (recover(**{**quick, "out": str(tmp_path / str(every)), "save_every": every}) for every in (0, 3))
    assert RunDirectory(one.out).rows(METRICS) == RunDirectory(other.out).rows(METRICS)
    assert all(checkpoint.step % 2 == 0 for checkpoint in RunDirectory(other.out).checkpoints())


def test_a_machine_that_changed_is_told(
    grid_run: RecoverResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = torn_copy(grid_run.out, tmp_path / "torn", 16)
    manifest = json.loads((torn / MANIFEST).read_text())
    manifest["versions"]["torch"], manifest["hardware"]["threads"] = "1.0.0", 64
    (torn / MANIFEST).write_text(json.dumps(manifest))
    recover(resume=torn)
    told = " ".join(capsys.readouterr().err.split())
    assert "since the run began, torch 1.0.0 to" in told
    assert "threads 64 to" in told
    assert (torn / SUMMARY).is_file()


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "a\0b"])
def test_a_record_that_names_what_has_no_end_is_told_at_once(reference_dir: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "q4"
    remend.quantize(str(reference_dir), model, format="int4-g32-sym", probe=False)
    os.mkfifo(model / "pipe")
    record = json.loads((model / "degradation.json").read_text())
    (model / "degradation.json").write_text(json.dumps(signed({**record, "files": {name: "x"}})))
    with pytest.raises(FileError, match="changed or can't be read since remend wrote it"):
        remend.export(model, tmp_path / "out", format="dense")
