"""The campaign sees what falls short: commands that are broken on purpose, in the place of remend's."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from campaign import campaign, disk, fuzz, kills, powercuts, signals, writers
from campaign import place as places
from campaign.fuzz import Kind
from campaign.mutate import damaged
from campaign.place import Case, Place, Tried, Watch, differences
from campaign.reliability import PAGE, Row, page, rows

FAKE = Case("fake", "fake")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty place, whose one command is what `being` puts there."""
    place = Place(tmp_path)
    place.whole.mkdir()
    place.disk.mkdir(parents=True)
    for module, names in {kills: ("RECOVERIES", "OTHERS"), disk: ("ONES",), powercuts: ("ONES",)}.items():
        for name in names:
            monkeypatch.setattr(module, name, [FAKE])
    monkeypatch.setattr(writers, "RECOVERIES", [FAKE])
    monkeypatch.setattr(writers, "NEW", [FAKE])
    monkeypatch.setattr(signals, "CASES", {"fake": FAKE})
    return place


@pytest.fixture
def being(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Puts a function in the place of the command line; it writes into disk/."""

    def put(command: Callable[[], int]) -> None:
        def command_line(words: Sequence[str]) -> int:
            return command()

        monkeypatch.setattr(places, "command_line", command_line)

    return put


def several(part: Callable[[Place, Random], Tried], place: Place, count: int = 12) -> list[str]:
    """What fell short in so many tries."""
    return [fell for seed in range(count) for fell in part(place, Random(seed)).fell]


def wrote(text: str, name: str = "out.json") -> None:
    Path("disk", name).write_text(text)


def careful() -> int:
    wrote(json.dumps(list(range(100))), ".remend-tmp-x")
    time.sleep(0.02)
    Path("disk/.remend-tmp-x").rename("disk/out.json")
    return 0


def takes_halves_for_whole() -> int:
    if not Path("disk/out.json").exists():
        wrote("")
        time.sleep(0.02)
        wrote(json.dumps(list(range(100))))
    return 0


def leaves_temporary_files() -> int:
    name = f".remend-tmp-{os.getpid()}"
    wrote("[1]", name)
    Path("disk", name).rename("disk/out.json")
    return 0


def breaks_the_second_time() -> int:
    if any(Path("disk").iterdir()):
        raise FileExistsError
    wrote("[")
    wrote("[1]")
    return 0


def test_kills_that_do_no_harm(place: Place, being: Callable[..., None]) -> None:
    being(careful)
    assert several(kills.kills, place) == []


@pytest.mark.parametrize("command", [takes_halves_for_whole, leaves_temporary_files, breaks_the_second_time])
def test_kills_that_do(place: Place, being: Callable[..., None], command: Callable[[], int]) -> None:
    being(command)
    assert several(kills.kills, place)


def dies_with_words() -> int:
    wrote("[1]")
    sys.stdout.write("at work\n")
    sys.stdout.flush()
    time.sleep(0.4)
    return 0


def test_a_signal_that_is_not_heard(place: Place, being: Callable[..., None]) -> None:
    being(dies_with_words)
    # a signal counts that comes between the first word and the end, which on a quick machine not every one does
    tries = (fell for seed in range(40) for fell in signals.signals(place, Random(seed)).fell)
    assert any("not 143" in fell or "not 130" in fell for fell in tries)


def writes_twice() -> int:
    with Path("disk/out.jsonl").open("a") as stream:
        for step in range(3):
            stream.write(f"{step}\n")
            stream.flush()
            time.sleep(0.01)
    return 0


def test_two_writers_that_are_both_let_in(place: Place, being: Callable[..., None]) -> None:
    being(writes_twice)
    assert any("another than that of one alone" in fell for seed in range(9) for fell in _new(place, seed))


def _new(place: Place, seed: int) -> tuple[str, ...]:
    """Of the seeds with which both are new."""
    return writers.writers(place, Random(seed)).fell if Random(seed).random() >= 0.5 else ()


def test_a_full_disk_that_gives_a_traceback(place: Place, being: Callable[..., None]) -> None:
    being(lambda: wrote("x" * 4000) or 0)  # the OSError is nobody's
    assert any("it ended with" in fell for fell in several(disk.disk, place))


def test_a_result_that_was_not_flushed_is_lost_in_a_power_cut(place: Place, being: Callable[..., None]) -> None:
    being(lambda: wrote("[1]") or 0)
    tried = [powercuts.powercuts(place, Random(seed)) for seed in range(6)]
    if tried[0].skipped:
        pytest.skip(tried[0].skipped)
    assert any("said that it was done" in fell for one in tried for fell in one.fell)


def made(place: Place, where: Path) -> None:
    (where / "some.json").write_text('{"a": [1, 2], "b": "text"}')


def hangs(where: Path) -> bool:
    time.sleep(60)
    return True


def aborts(where: Path) -> bool:
    os.abort()


def trips(where: Path) -> bool:
    raise KeyError("a")


READERS: dict[str, tuple[Callable[[Path], bool], bool]] = {
    "traceback": (trips, False),
    "hang": (hangs, False),
    "died": (aborts, False),
    "taken silently": (lambda where: True, True),
}


@pytest.mark.parametrize("verdict", READERS)
def test_damage_that_is_taken_badly(place: Place, monkeypatch: pytest.MonkeyPatch, verdict: str) -> None:
    read, covered = READERS[verdict]
    monkeypatch.setattr(fuzz, "KINDS", [Kind("some", ["some.json"], made, read, covered)])
    monkeypatch.setattr(fuzz, "BATCH", 2)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    tried = fuzz.fuzz(place, Random(1))
    assert tried.kinds[f"some, {verdict}"] == 2
    assert tried.short == 2
    assert tried.fell


def test_damage_that_is_taken_well(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "KINDS", [Kind("some", ["some.json"], made, lambda where: False)])
    assert fuzz.fuzz(place, Random(1)) == Tried({"some, refused": fuzz.BATCH}, short=0)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.safetensors"])
def test_damage_depends_on_the_seed_alone(tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({"x": torch.zeros(3), "y": torch.ones(2)}, path)
    else:
        path.write_text('{"a": [1, 2], "b": {"c": "text"}}\n')
    contents = [damaged(path, Random(seed)) for seed in range(50)]
    assert contents == [damaged(path, Random(seed)) for seed in range(50)]
    assert len(set(contents)) > 30


def test_operations_are_counted_below_one_directory(tmp_path: Path) -> None:
    seen = []
    watch = Watch(str(tmp_path), places.Hook(2, seen.append))
    for name in ("a", "b", "c"):
        watch.seen("open", tmp_path / name)
    watch.seen("open", "/elsewhere")
    assert watch.count == 3
    assert [operation.path for operation in seen] == [str(tmp_path / "b")]


def test_times_are_no_difference(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1, 2), ("b", 3, 2), ("c", 1, 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps({"seconds": seconds, "loss": loss}))
        (tmp_path / name / "x.csv").write_text(f"loss,training_seconds\n{loss},{seconds}\n")
    assert differences(tmp_path / "a", tmp_path / "b") == ""
    told = differences(tmp_path / "a", tmp_path / "c")
    assert "x.json loss: 2 → 4" in told
    assert "x.csv [0].loss: 2 → 4" in told


def test_tries_are_added_up_and_skipped_ones_named() -> None:
    tries = [
        ("kills", 0, Tried({"eval": 2}, ("a fault",))),
        ("kills", 1, Tried({"eval": 1})),
        ("fuzz", 0, Tried({"yaml": 40}, ("one, and 2 more",), short=3)),
        ("powercuts", 0, Tried(skipped="no root")),
    ]
    assert campaign.summed(tries) == {
        "kills": {"tried": {"eval": 3}, "fell_short": 1},
        "fuzz": {"tried": {"yaml": 40}, "fell_short": 3},
        "powercuts": {"tried": {}, "fell_short": 0, "skipped": "no root"},
    }


def test_what_can_t_be_tried_is_left_out_of_the_next_round(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(campaign.PARTS, "powercuts", lambda place, random: Tried(skipped="no root"))
    monkeypatch.setitem(campaign.PARTS, "kills", lambda place, random: Tried({"eval": 1}))
    turns = campaign.in_turn(place, ["powercuts", "kills"], 0, time.monotonic() + 60)
    assert [next(turns)[0] for _ in range(4)] == ["powercuts", "kills", "kills", "kills"]


def test_the_page_adds_the_rows_up() -> None:
    part = {"tried": {"recover grid": 3, "eval": 1}, "fell_short": 1}
    skipped = {"tried": {}, "fell_short": 0, "skipped": "no root"}
    row = Row("2026-01-01", "abc1234", "a machine", 0, 2.0, {"kills": part, "powercuts": skipped})
    text = page([row, row])
    assert "given again: equal bit for bit | 8 | 2 |" in text
    assert "| recover grid | 6 |" in text
    assert "| 2026-01-01 | abc1234 | 0 | 2.0 | a machine | 4 | kills 1 | powercuts: no root |" in text


def test_the_page_is_current() -> None:
    current = PAGE.read_text(encoding="utf-8") == page(rows())
    assert current, f"{PAGE} is out of date; run: python tests/campaign/reliability.py"
