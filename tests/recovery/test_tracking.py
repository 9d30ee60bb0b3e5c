"""track.jsonl: alignment at the start, on the way and at the end of a recovery."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from remend.data.examples import load_examples, prompt_id
from remend.data.order import derive_seed
from remend.data.templates import encode
from remend.files.run_directory import TRACK, RunDirectory
from remend.maths.cka import debiased_cka
from remend.models.activations.capture import pick_positions
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.rollout import Rollout
from remend.recovery.job import RecoverResult, track


def test_rows_at_the_start_on_the_way_and_at_the_end(grid_run: RecoverResult) -> None:
    rows = RunDirectory(grid_run.out).rows(TRACK)
    stages = [(0, "degraded"), (8, "training"), (16, "training"), (24, "recovered")]
    assert [(r["step"], r["stage"]) for r in rows] == stages
    assert all(len(r["cka"]) == 2 and r["reference_layers"] == [0, 1] for r in rows)
    assert rows[0]["kl"] == pytest.approx(grid_run.summary["degraded"]["kl"])
    assert rows[-1]["kl"] == pytest.approx(grid_run.summary["recovered"]["kl"])
    assert rows[-1]["cka"][-1] > rows[0]["cka"][-1]


def test_the_last_row_is_what_the_saved_model_gives(grid_run: RecoverResult, reference_dir: Path, place: Path) -> None:
    """Against a slow second computation: rows taken one sequence at a time."""
    last = RunDirectory(grid_run.out).rows(TRACK)[-1]
    tokenizer = load_tokenizer(find_model(str(reference_dir)))
    examples = {prompt_id(e.prompt): e for e in load_examples(str(place / "prompts.jsonl"))}
    rollouts = [
        Rollout(row["id"], encode(tokenizer, examples[row["id"]]).tokens, tuple(row["completion"]), False)
        for row in RunDirectory(grid_run.out).rows("reference.jsonl")
        if row["completion"]
    ]
    draws = [derive_seed(0, "row", r.id) / 2**63 for r in rollouts]
    picks = pick_positions([len(r.completion) for r in rollouts], draws)
    rows = []
    for path in (reference_dir, grid_run.model):
        model = load_model(find_model(str(path)), dtype=torch.float32, device=torch.device("cpu"))
        states = []
        for rollout, pick in zip(rollouts, picks, strict=True):
            ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
            # the last entry is after the final norm, so the second block's own output is not in it
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
            states.append(hidden[0, len(rollout.prompt) + pick].detach())
        rows.append(torch.stack(states))
    assert last["cka"][0] == pytest.approx(debiased_cka(*rows), abs=1e-5)
    assert last["rows"] == len(rollouts)


def test_repair_has_a_row_of_its_own(repaired_run: RecoverResult) -> None:
    stages = [r["stage"] for r in RunDirectory(repaired_run.out).rows(TRACK)]
    assert stages == ["degraded", "repaired", "training", "recovered"]


def test_a_finished_run_can_be_tracked_afterwards(grid_run: RecoverResult, tmp_path: Path) -> None:
    """The checkpoints that were kept give the rows that the hook would have written, and the last step's beside."""
    wanted = RunDirectory(grid_run.out).rows(TRACK)
    later = Path(shutil.copytree(grid_run.out, tmp_path / "later"))
    (later / TRACK).unlink()
    rows = track(later)
    assert [(r["step"], r["stage"]) for r in rows] == [
        *((r["step"], r["stage"]) for r in wanted[:-1]), (24, "training"), (24, "recovered"),
    ]  # fmt: skip
    for row, same in zip([*rows[:3], rows[-1]], wanted, strict=True):
        assert row["cka"] == pytest.approx(same["cka"], abs=1e-9)
        assert row["kl"] == pytest.approx(same["kl"], rel=1e-6)
    assert track(later) == rows
