"""track.jsonl: alignment at the start, on the way and at the end of a recovery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from remend.data.order import derive_seed
from remend.errors import CheckError
from remend.files.run_directory import TRACK, RunDirectory
from remend.maths.cka import debiased_cka
from remend.models.activations.capture import pick_positions
from remend.models.find import find_model
from remend.models.load import load_model
from remend.models.sampling.rollout import Rollout
from remend.recovery import recover, settings, track
from remend.recovery.preflight import preflight


def test_rows_at_the_start_on_the_way_and_at_the_end(recipe: dict[str, Any]) -> None:
    result = recover(**{**recipe, "diagnose_every": 2, "held_out": 12})
    rows = RunDirectory(result.out).rows(TRACK)
    assert [(r["step"], r["stage"]) for r in rows] == [(0, "degraded"), (2, "training"), (4, "recovered")]
    assert all(len(r["cka"]) == 2 and r["reference_layers"] == [0, 1] for r in rows)
    assert rows[0]["kl"] == pytest.approx(result.summary["degraded"]["kl"])
    assert rows[-1]["kl"] == pytest.approx(result.summary["recovered"]["kl"])
    assert max(abs(a - b) for a, b in zip(rows[0]["cka"], rows[-1]["cka"], strict=True)) > 0


def test_the_last_row_is_what_the_saved_model_gives(recipe: dict[str, Any]) -> None:
    """Against a slow second computation: rows taken one sequence at a time."""
    result = recover(**{**recipe, "diagnose_every": 4, "held_out": 12})
    last = RunDirectory(result.out).rows(TRACK)[-1]
    checked = preflight(settings(None, {**recipe, "out": str(result.out) + "-x", "held_out": 12}))
    assert checked.plan is not None
    answers = {r["id"]: r["completion"] for r in RunDirectory(result.out).rows("reference.jsonl")}
    rollouts = [
        Rollout(p.id, p.tokens, tuple(answers[p.id]), False) for p in checked.plan.main.held_out if answers[p.id]
    ]
    picks = pick_positions(
        [len(r.completion) for r in rollouts], [derive_seed(0, "row", r.id) / 2**63 for r in rollouts]
    )
    rows = []
    for source in (str(recipe["teacher"]), str(result.model)):
        model = load_model(find_model(source), dtype=torch.float32, device=torch.device("cpu"))
        found = []
        for rollout, pick in zip(rollouts, picks, strict=True):
            ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
            states = model(ids, output_hidden_states=True).hidden_states
            # the last entry is after the final norm, so the second block's own output is not in it
            found.append(states[1][0, len(rollout.prompt) + pick].detach())
        rows.append(torch.stack(found))
    assert last["cka"][0] == pytest.approx(debiased_cka(*rows), abs=1e-5)
    assert last["rows"] == len(rollouts)


def test_repair_has_a_row_of_its_own(recipe: dict[str, Any]) -> None:
    result = recover(**{**recipe, "diagnose_every": 4, "repair": True})
    assert [r["stage"] for r in RunDirectory(result.out).rows(TRACK)] == ["degraded", "repaired", "recovered"]


def test_an_interrupted_run_has_the_same_rows(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = recover(**{**recipe, "diagnose_every": 1, "held_out": 12})
    wanted = (whole.out / TRACK).read_text()
    for path in (whole.out / "summary.json", whole.out / "checkpoints" / "step-000004" / "state.json"):
        path.unlink()
    rows = [json.loads(line) for line in wanted.splitlines()]
    assert rows[-1]["stage"] == "recovered"
    again = recover(resume=whole.out)
    assert (again.out / TRACK).read_text() == wanted


def test_a_finished_run_can_be_tracked_afterwards(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoints that were kept give the rows that the hook would have written."""
    on_the_way = recover(**{**recipe, "diagnose_every": 2, "held_out": 12})
    later = recover(**{**recipe, "held_out": 12, "out": str(tmp_path / "later"), "keep_checkpoints": 4})
    assert not (later.out / TRACK).exists()
    rows = track(later.out)
    assert [(r["step"], r["stage"]) for r in rows] == [
        (0, "degraded"),
        (2, "training"),
        (4, "training"),
        (4, "recovered"),
    ]
    wanted = RunDirectory(on_the_way.out).rows(TRACK)
    for row in wanted:
        (same,) = [r for r in rows if (r["step"], r["stage"]) == (row["step"], row["stage"])]
        assert same["cka"] == pytest.approx(row["cka"], abs=1e-9)
        assert same["kl"] == pytest.approx(row["kl"], rel=1e-6)
    assert track(later.out) == rows


def test_without_the_setting_nothing_is_tracked(recipe: dict[str, Any]) -> None:
    assert not (recover(**recipe).out / TRACK).exists()


def test_a_cached_reference_has_no_layers(recipe: dict[str, Any], tmp_path: Path) -> None:
    from remend.training.write_cache import cache_teacher

    cache_teacher(str(recipe["teacher"]), tmp_path / "cache", data=str(recipe["data"]), max_new_tokens=8, held_out=6)
    values = {k: v for k, v in recipe.items() if k != "held_out"}
    with pytest.raises(CheckError, match="diagnose_every"):
        recover(**{**values, "teacher": str(tmp_path / "cache"), "diagnose_every": 2})
