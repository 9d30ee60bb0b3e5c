"""What a verb does when a launcher has started several processes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import remend.cli
from remend.files.launch import processes, rank


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a line as process `number` of two: exit code, what it printed, and how many it was when it ended."""
    monkeypatch.setattr(remend.cli, "PATIENCE", 0)

    def run(number: int, *words: str) -> tuple[int, str, str, int]:
        told = {"WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["remend", *words])
        with pytest.raises(SystemExit) as ended:
            remend.cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err, processes()

    return run


@pytest.mark.parametrize(
    "line",
    [
        ["degrade", "quantize", "nowhere", "--out", "made"],
        ["export", "nowhere", "--out", "made"],
        ["check", "nowhere.yaml"],
        ["study", "nowhere.yaml", "--out", "made"],
        ["report", "nowhere"],
        ["version"],
        ["--help"],
    ],
)
def test_the_second_process_leaves_a_verb_to_the_first(line: list[str], launched: object) -> None:
    assert launched(1, *line)[:3] == (0, "", "")  # type: ignore[operator]


def test_the_first_process_of_such_a_verb_is_by_itself(launched: object, tmp_path: Path) -> None:
    code, _, err, count = launched(0, "report", str(tmp_path / "nowhere"))  # type: ignore[operator]
    assert (code, count, rank()) == (2, 1, 0)
    assert err.startswith("error: ")


def test_a_shared_verb_keeps_its_processes(launched: object) -> None:
    """The second one speaks only where the first has not ended it."""
    for number, who in ((0, "error: "), (1, "error in process 1: ")):
        code, _, err, count = launched(number, "recover", "nowhere.yaml")  # type: ignore[operator]
        assert (code, count) == (2, 2)
        assert err.startswith(who)


def test_check_says_what_several_would_do(launched: object) -> None:
    words = ["student=s", "teacher=t", "data=d", "out=o", "prompts_per_step=1", "--no-files"]
    code, out, err, _ = launched(0, "check", *words)  # type: ignore[operator]
    assert code == 2
    assert "2 processes share the prompts of a step, which are 1" in out + err
