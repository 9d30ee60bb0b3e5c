"""What a signal does: training ends with its round and a checkpoint; a second one, and all other work, ends at once."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.recovering import assert_equal_runs
from remend.files.run_directory import METRICS, SUMMARY, RunDirectory
from remend.recovery.job import RecoverResult, recover
from remend.training.constraints.grid import GridKind
from remend.training.stopping import Stopped, at_the_end_of_a_round, code_of, ending_on_signals


def test_the_first_signal_is_a_wish_and_the_second_ends(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with at_the_end_of_a_round() as wish:
        assert not wish
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.number == signal.SIGTERM
        assert "SIGTERM: training ends with this round of sampling" in capsys.readouterr().err
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_elsewhere_the_first_ends() -> None:
    with pytest.raises(Stopped) as stopped, ending_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


def as_typer_does() -> None:
    try:
        raise Stopped(signal.SIGTERM)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def test_the_code_is_found_behind_what_was_made_of_it() -> None:
    with pytest.raises(SystemExit) as ended:
        as_typer_does()
    assert code_of(ended.value) == 143
    assert code_of(SystemExit(130)) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_saves_and_says_how_it_goes_on(
    repaired_recipe: dict[str, Any],
    repaired_run: RecoverResult,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    append, out = RunDirectory.append, tmp_path / "run"

    def noted(directory: RunDirectory, name: str, row: dict[str, Any]) -> None:
        append(directory, name, row)
        if name == METRICS and row["step"] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", noted)
        ended, _, told = run("recover", written({**repaired_recipe, "save_every": 0, "out": str(out)}, tmp_path))
    assert ended == code, told
    (saved,) = RunDirectory(out).checkpoints()
    assert saved.step % repaired_recipe["updates_per_rollout"] == 0 or saved.step == repaired_recipe["steps"]
    assert f"saved up to step {saved.step}" in told
    said = re.search(r"remend recover --resume (\S+)", told)
    assert said
    assert Path(said[1]) == out
    assert "Traceback" not in told
    assert_equal_runs(repaired_run, recover(resume=out))


def test_before_training_it_ends_at_once(
    repaired_recipe: dict[str, Any], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GridKind, "repair", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "run"
    code, _, told = run("recover", written({**repaired_recipe, "out": str(out)}, tmp_path))
    assert code == 143, told
    assert "everything so far is done again" in told
    assert (out / "baseline.json").is_file()
    assert not (out / SUMMARY).exists()
    assert not list(out.glob(".remend-tmp-*"))


def written(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"
