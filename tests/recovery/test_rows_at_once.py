"""How many rows are sampled at once follows the free memory, and a run keeps its number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.patching import replace_everywhere
from helpers.recovering import assert_equal_runs, torn_copy
from helpers.tiny import small_recipe
from remend.cli import build_app
from remend.models.device import free_bytes
from remend.models.sampling.transformers_engine import ROWS, TransformersSampler
from remend.models.sizes import Size
from remend.recovery.job import RecoverResult, recover
from remend.recovery.rows_at_once import SHARE, bytes_of_row, rows_that_fit

SIZE = Size(0, 0, 0, 0, vocabulary=1000, width=64, layers=2, cached=256, grams=0, fits=0)


@pytest.fixture(scope="module")
def roomy_recipe(forgotten: Path, reference_dir: Path, place: Path) -> dict[str, Any]:
    values = small_recipe(forgotten, reference_dir, place / "prompts.jsonl", place / "roomy")
    return {**values, "updates_per_rollout": 2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def roomy_run(roomy_recipe: dict[str, Any]) -> RecoverResult:
    """By the command line, on a machine that has room for as many rows as a CPU takes."""
    words = [f"{key}={value}" for key, value in roomy_recipe.items()]
    done = CliRunner().invoke(build_app(), ["recover", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return recover(resume=roomy_recipe["out"])


def rows_in(run: RecoverResult) -> int:
    number: int = json.loads((run.out / "manifest.json").read_text())["rows_at_once"]
    return number


def test_a_row_takes_keys_and_values_a_blocks_states_and_logits() -> None:
    # 10 tokens of 256 float32 with half as many to spare, and of half of 800 bytes; 24 bytes of each of 1,000 tokens
    assert bytes_of_row(SIZE, 10, 800) == 10 * (256 * 4 * 1.5 + 400) + 24_000
    longer, wider = bytes_of_row(SIZE, 20, 800), bytes_of_row(replace(SIZE, cached=512), 10, 800)
    assert bytes_of_row(SIZE, 10, 800) < wider < longer


@pytest.mark.parametrize("most", [64, 512])
def test_rows_are_the_largest_power_of_two_that_fits(most: int) -> None:
    each, last = 1000, 0
    for free in range(0, 4_000_000, 3_917):
        rows = rows_that_fit(free, each, most)
        fitting = [n for n in (2**i for i in range(10)) if n <= most and n * each <= SHARE * free]
        assert rows == max(fitting, default=1)
        assert rows >= last
        last = rows
    assert last == most
    assert rows_that_fit(-1, each, most) == 1


def test_a_cpu_with_room_takes_what_it_always_took(roomy_run: RecoverResult) -> None:
    assert rows_in(roomy_run) == ROWS == 64


def sampled_rows(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of rows of all samplers at work from now on."""
    seen: set[int] = set()
    own = TransformersSampler.__call__

    def noted(self: TransformersSampler, *args: Any, **rest: Any) -> Any:
        seen.add(self.max_rows)
        return own(self, *args, **rest)

    monkeypatch.setattr(TransformersSampler, "__call__", noted)
    return seen


def test_where_little_is_free_fewer_rows_give_the_same_answers(
    roomy_recipe: dict[str, Any], roomy_run: RecoverResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sampled_rows(monkeypatch)
    replace_everywhere(monkeypatch, free_bytes, lambda device: 5 * 2**20)
    run = recover(**{**roomy_recipe, "gradient_checkpointing": False, "out": str(tmp_path / "narrow")})
    assert 1 < rows_in(run) < 6  # fewer than a round of sampling has, and than are held out
    assert seen == {rows_in(run)}
    assert_equal_runs(roomy_run, run)  # of a tiny model in float32; a large one's may differ where tokens are near


def test_a_resumed_run_keeps_its_number_whatever_is_free(
    roomy_run: RecoverResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = torn_copy(roomy_run.out, tmp_path / "torn", 2)
    manifest = json.loads((torn / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps({**manifest, "rows_at_once": 4}))
    seen = sampled_rows(monkeypatch)
    recover(resume=torn)
    assert seen == {4}


def test_a_run_of_an_earlier_version_goes_on_with_the_number_of_then(
    roomy_run: RecoverResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = torn_copy(roomy_run.out, tmp_path / "torn", 2)
    manifest = json.loads((torn / "manifest.json").read_text())
    del manifest["rows_at_once"]
    (torn / "manifest.json").write_text(json.dumps(manifest))
    seen = sampled_rows(monkeypatch)
    replace_everywhere(monkeypatch, free_bytes, lambda device: 5 * 2**20)
    assert_equal_runs(roomy_run, recover(resume=torn))
    assert seen == {64}
