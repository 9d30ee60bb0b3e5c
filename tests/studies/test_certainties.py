"""How sure a study's figures are: its rows, its pairs of methods, and the page's sections about them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.made_records import made_record, write_made
from remend.maths.paired import mcnemar_exact, paired_share_interval
from remend.maths.seeds import certainty
from remend.report.markdown import markdown
from remend.report.study import study_page
from remend.studies.certainties import BETTER, SAME, WORSE
from remend.studies.from_records import results_of_records
from remend.studies.plan import read_study
from remend.studies.table import table_of

GROUP = "nf4-tooluse-short"


def scores(task: float, general: float) -> dict[str, float]:
    return {"tooluse-short": task, "general": general}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of repair and SDFT, one of SFT, on a student that lost 34 points."""
    plan = read_study("paper-small")
    cells = {cell.name: cell for cell in plan.cells}
    made: dict[str, dict[str, Any]] = {
        "none/0": {"scores": scores(0.5, 0.1), "reference": 0.84},
        "sft/0": {"scores": scores(0.8, 0.1), "kl": (2.0, 2.4)},
    }
    for seed in range(3):
        made[f"repair/{seed}"] = {"scores": scores(0.6, 0.1), "kl": (2.0, 0.4)}
        made[f"sdft/{seed}"] = {"scores": scores(0.7 + 0.02 * seed, 0.1), "kl": (2.0, 0.6 + 0.02 * seed)}
    records = []
    for name, given in made.items():
        cell = cells[f"{GROUP}/{name}"]
        recipe = json.loads(json.dumps(plan.draft(cell).model_dump(mode="json", exclude={"out"})))
        budget = plan.budget.tokens if cell.method.steps else None
        records.append(made_record(cell.name, how=cell.method.how, recipe=recipe, budget=budget, **given))
    return write_made(tmp_path_factory.mktemp("made") / "records", *records)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return results_of_records(read_study("paper-small"), folder)


def right(folder: Path, cell: str, task: str = "tooluse-short") -> np.ndarray:
    record = json.loads((folder / f"{GROUP}--{cell}.json").read_text())
    return np.array(record["grades"][task]["results"][0]["correct"], dtype=float)


def entry(entries: list[dict[str, Any]], **wanted: str) -> dict[str, Any]:
    (found,) = [e for e in entries if all(e[key] == value for key, value in wanted.items())]
    return found


def test_points_of_several_seeds_are_those_of_the_items(folder: Path, results: dict[str, Any]) -> None:
    row = entry(results["certainty"]["rows"], method="sdft", measure="tooluse-short (paper) points")
    values = np.stack([right(folder, f"sdft--{seed}") for seed in range(3)]) - right(folder, "none--0")
    known = certainty(values)
    assert row["value"] == pytest.approx(values.mean())
    assert (row["seeds"], row["items"]) == (3, 200)
    for key in ("over_items", "over_seeds", "over_both"):
        assert row[key] == pytest.approx(getattr(known, key))
    assert row["interval"] == row["over_both"]
    assert (row["p"], row["verdict"]) == (known.p_value, BETTER)


def test_one_seed_has_the_exact_test(folder: Path, results: dict[str, Any]) -> None:
    row = entry(results["certainty"]["rows"], method="sft", measure="tooluse-short (paper) points")
    change = right(folder, "sft--0") - right(folder, "none--0")
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    assert (row["test"], row["p"]) == ("exact McNemar", mcnemar_exact(gained, lost))
    assert row["interval"] == row["over_items"] == paired_share_interval(gained, lost, 200)
    assert row["over_seeds"] is None
    assert row["over_both"] is None


def test_holm_goes_over_the_table_and_verdicts_follow(results: dict[str, Any]) -> None:
    rows = results["certainty"]["rows"]
    assert len(rows) == 3 * (2 + 2)  # methods × KL, agreement, task, general
    for row in rows:
        assert row["p_holm"] >= row["p"]
    smallest = min(rows, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, smallest["p"] * len(rows)))
    verdict = {row["method"]: row["verdict"] for row in rows if row["measure"] == "KL gap closed"}
    assert verdict == {"sft": WORSE, "repair": BETTER, "sdft": BETTER}
    assert entry(rows, method="sdft", measure="general (paper) points")["verdict"] == SAME


def test_pairs_have_an_on_policy_side_and_share_their_seeds(results: dict[str, Any]) -> None:
    pairs = results["certainty"]["pairs"]
    assert {(p["first"], p["second"]) for p in pairs} == {("sft", "sdft"), ("sdft", "repair")}
    assert {p["measure"] for p in pairs} == {"KL gap closed", "tooluse-short (paper) points"}
    assert [entry(pairs, first=a, measure="KL gap closed")["seeds"] for a in ("sft", "sdft")] == [1, 3]
    lost = entry(pairs, first="sdft", second="repair", measure="KL gap closed")
    assert lost["value"] == pytest.approx(-0.11, abs=0.02)
    assert lost["verdict"] == WORSE


def test_the_page_and_the_table_say_it(results: dict[str, Any]) -> None:
    page = markdown(study_page(results))
    for title in ("The task, and what it could before", "Seeds and power"):
        assert f"## {title}" in page
    head = next(line for line in page.splitlines() if "task points won back" in line)
    assert "KL gap closed | agreement gap closed | general, strict: points won back" in head
    assert "over items | over seeds | over both | least | p | p, Holm" in page
    assert "Said beforehand" in page
    table = list(csv.DictReader(table_of(results).splitlines()))
    kinds = {(line["graded"], line["ability"]) for line in table}
    assert kinds == {("tooluse-short", "task"), ("general", "prior")}
    assert all(line["agreement_gap_closed"] for line in table if line["method"] != "none")


def test_a_study_from_before_has_its_page_still(results: dict[str, Any]) -> None:
    old = json.loads(json.dumps({**results, "certainty": None}))
    for row in old["rows"]:
        del row["agreement_gap_closed"]
    page = markdown(study_page(old))
    assert "## Degraded and recovered" in page
    assert "## Seeds and power" not in page


def test_seconds_are_compared_on_one_machine(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "records"
    for path in folder.iterdir():
        record = json.loads(path.read_text())
        record.pop("sha256", None)
        if path.name == f"{GROUP}--sdft--2.json":
            record["outcome"]["hardware"]["processor"] = "another"
        write_made(other, record)
    results = results_of_records(read_study("paper-small"), other)
    (timed,), (by_tokens,) = results["at_equal_seconds"], results["at_equal_tokens"]
    assert timed["left_out"] == [f"{GROUP}/sdft/2"]
    seeds = {m["method"]: len(m["spent"]) for m in timed["methods"]}
    assert seeds == {"sft": 1, "sdft": 2}
    assert {m["method"]: len(m["spent"]) for m in by_tokens["methods"]} == {"sft": 1, "sdft": 3}
    assert f"another machine than most of their group: {GROUP}/sdft/2" in markdown(study_page(results))
