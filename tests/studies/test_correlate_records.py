"""`remend correlate` on committed records of a study's cells, and its three sentences to quote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.made_records import made_record, write_made
from remend import cli
from remend.errors import FileError, InputError
from remend.studies.correlate import correlate

LAYERS = 6


def ckas(start: float, change: float, seed: int, *, falling: int | None = None) -> list[list[float]]:
    """Five checkpoints of LAYERS layers whose CKA changes by `change` in all; one layer can fall by as much."""
    rng = np.random.default_rng(seed)
    rows = []
    for done in np.linspace(0, 1, 5):
        row = start + change * done + 0.002 * rng.normal(size=LAYERS)
        if falling is not None:
            row[falling] -= 2 * change * done
        rows.append([float(value) for value in row])
    return rows


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Eight seeds of an on-policy method with each teacher, a supervised one, and the degraded student."""
    made = [made_record("int3-g64/none/0", how="none", reference=0.9)]
    for seed in range(8):
        common: dict[str, Any] = {"how": "on-policy+repair", "recipe": {"seed": seed}}
        expert = ckas(0.6, 0.1, seed, falling=2)
        base = ckas(0.6, 0.2, 50 + seed, falling=2)
        made.append(made_record(f"int3-g64/repair-sdft/{seed}", scores={"t": 0.8}, cka=expert, **common))
        made.append(made_record(f"int3-g64/base-sdft/{seed}", scores={"t": 0.6}, cka=base, teacher="base", **common))
        made.append(made_record(f"int3-g64/sft/{seed}", how="sft", cka=ckas(0.6, -0.3, seed)))
    return write_made(tmp_path / "records", *made)


def test_a_folder_of_records_is_correlated(records: Path) -> None:
    result = correlate([records], permutations=200)
    assert len(result["runs"]) == 24  # the degraded student has no track
    assert {run["name"] for run in result["runs"]} >= {"int3-g64/repair-sdft/0", "int3-g64/sft/7"}
    assert result["checkpoints"] == 24 * 5
    assert result["near_the_end"]["layer"] == LAYERS - 2
    near, same = result["near_the_end"], result["layers"][LAYERS - 2]
    assert near["within"]["spearman"]["coefficient"] == same["within"]["spearman"]["coefficient"]


def test_kl_alone_lowers_a_layer_and_the_teachers_are_ordered(records: Path) -> None:
    result = correlate([records], permutations=200)
    by_kl = result["kl_only"]
    assert len(by_kl["cells"]) == 8  # sft is no divergence, and the base is not what CKA is measured to
    fell = {row["layer"] for row in by_kl["layers"] if row["change"] < 0 and row["p_holm"] < 0.05}
    assert fell == {2}
    assert by_kl["layers"][2]["fell"] == 8
    teachers = result["teachers"]
    assert len(teachers["pairs"]) == 8
    assert teachers["score"]["mean"] == pytest.approx(-0.2)
    assert teachers["cka"]["mean"] > 0.04
    assert teachers["cka"]["p"] == pytest.approx(2 / 2**8)
    recovery, kl, teacher = result["quotable"]
    assert recovery.startswith("Spearman's correlation of recovery with CKA is, within cells, ")
    assert "near the last layer (4)" in recovery
    assert kl.startswith("In 8 cells trained on KL alone, CKA changed by +0.")
    assert "fell beyond chance in 1 of 6 layers, in layer 2 most (−0." in kl
    assert "the base teacher has the higher CKA over all layers (base less expert +0." in teacher
    assert (
        "the expert teacher has the higher accuracy on the task (base less expert −20.0 points, p 0.0078 of 8)"
        in teacher
    )


def test_few_cells_say_how_little_they_can_show(tmp_path: Path) -> None:
    folder = write_made(
        tmp_path / "few",
        *(made_record(f"nf4/sdft/{seed}", cka=ckas(0.5, 0.1, seed, falling=1)) for seed in range(3)),
    )
    _, kl, teacher = correlate([folder], permutations=50)["quotable"]
    assert "fell beyond chance in none of 6 layers" in kl
    assert kl.endswith("With 3 cells no layer's p-value can be below 1.")
    assert teacher.startswith("Which teacher goes with the higher CKA and accuracy was not measured")


def test_on_the_expert_itself_base_and_reference_are_one_teacher(tmp_path: Path) -> None:
    both = [
        made_record(f"forgetting/{name}/0", teacher=teacher, stands_on=False, cka=ckas(0.5, 0.1, 0))
        for name, teacher in (("sdft", "reference"), ("base-sdft", "base"))
    ]
    result = correlate([write_made(tmp_path / "records", *both)], permutations=50)
    assert result["teachers"]["pairs"] == []


def test_records_that_are_refused(records: Path, tmp_path: Path) -> None:
    one = records / "int3-g64--sft--0.json"
    assert len(correlate([one], permutations=50)["runs"]) == 1
    with pytest.raises(InputError, match=r"int3-g64--sft--0\.json .*are the same run"):
        correlate([records, one])
    with pytest.raises(InputError, match="was not tracked"):
        correlate([records / "int3-g64--none--0.json"])
    idle = write_made(tmp_path / "idle", made_record("a/none/0", how="none"))
    with pytest.raises(InputError, match="holds 1 records, and none of them has a track"):
        correlate([idle])
    one.write_text(one.read_text().replace('"on-policy"', '"off-policy"').replace('"sft"', '"sft2"', 1))
    with pytest.raises((FileError, InputError), match="changed since it was written"):
        correlate([records])


def test_the_verb_says_it(records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = records.parent / "out"
    monkeypatch.setattr(sys, "argv", ["remend", "correlate", str(records), "--out", str(out), "--permutations", "50"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    said = capsys.readouterr().out
    for sentence in json.loads((out / "correlation.json").read_text())["quotable"]:
        assert f"in short: {sentence}" in said
