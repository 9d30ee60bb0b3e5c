"""What earlier runs took on this machine, and which of them count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remend.recovery import speeds
from remend.recovery.speeds import Machine, RecordedRun, best_of, factors_of, guessed_factor, record, recorded

HERE = Machine("cpu", "a processor", "float32", 2)
RUN = RecordedRun(HERE, 1_000, "GridKind", {"loading": 2.0, "training": 10.0}, {"loading": 4.0, "training": 5.0}, 0.9)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rates.json"


def test_runs_are_kept_and_read_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded() == []
    record(RUN)
    record(replace(RUN, parameters=5))
    assert recorded() == [RUN, replace(RUN, parameters=5)]
    monkeypatch.setattr(speeds, "KEPT", 2)
    record(replace(RUN, parameters=6))
    assert [run.parameters for run in recorded()] == [5, 6]


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", '{"version": 2}', '{"version": 2, "runs": [3]}', '{"version": 2, "runs": [{"machine": {}}]}'],
)
def test_a_damaged_file_is_ignored_with_a_warning(cache: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert recorded() == []
    assert "is damaged and is ignored" in " ".join(capsys.readouterr().err.split())
    record(RUN)
    assert recorded() == [RUN]


def test_numbers_that_are_none_are_damage(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(RUN)
    value = json.loads(cache.read_text())
    value["runs"][0]["seconds"]["training"] = "long"
    cache.write_text(json.dumps(value))
    assert recorded() == []
    assert "damaged" in capsys.readouterr().err


def test_a_file_of_another_version_counts_for_nothing(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text('{"version": 0, "runs": "of old"}')
    assert recorded() == []


def test_a_cache_that_cannot_be_written_stops_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.parent.write_text("a file in the way")
    record(RUN)
    assert "is not kept for the next check" in " ".join(capsys.readouterr().err.split())


def test_which_runs_count() -> None:
    elsewhere = replace(RUN, machine=replace(HERE, threads=4))
    large = replace(RUN, parameters=1_000_000)
    free = replace(RUN, held="FreeKind", parameters=1_100)
    late = replace(RUN, parameters=900)
    runs = best_of([elsewhere, large, RUN, free, late], HERE, 1_000, "GridKind")
    assert runs == [late, RUN, free, large]
    assert best_of([elsewhere], HERE, 1_000, "GridKind") == []


def test_factors_by_phase() -> None:
    other = replace(RUN, expected={"repair": 3.0, "loading": 1.0}, seconds={"repair": 9.0, "loading": 9.0})
    assert factors_of([RUN, other]) == {"loading": 2.0, "training": 0.5, "repair": 3.0, "": 0.75}
    assert factors_of([]) == {}


def test_a_guess_multiplies_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "GUESSING", 0.01)
    assert 0 < guessed_factor(torch.device("cpu"), torch.float32) < 1e4
