"""What a study can show is said beforehand, from its rows and seeds alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from remend.maths.paired import minimum_detectable_effect
from remend.studies.plan import read_study
from remend.studies.power import FLIPS, planned
from remend.studies.study import lines, study


def test_the_paper_study_says_what_200_rows_and_three_seeds_show() -> None:
    plan = read_study("paper-small")
    power = planned(plan)
    rows = {(cell.group.name, cell.method.name) for cell in plan.cells if cell.method.trained}
    assert power["tests"] == len(rows) * 5  # KL, agreement, the task, general strict and loose
    points = next(m for m in power["measures"] if m["measure"] == "tooluse-short points")
    assert (points["items"], power["seeds"]) == (200, 3)
    for one, share in zip(points["least"], FLIPS, strict=True):
        error = math.sqrt(share / 200 + 0.02**2 / 3)
        assert one["alone"] == pytest.approx((1.96 + 0.8416) * error, rel=0.05)  # many degrees of freedom
        strict = stats.norm.ppf(1 - 0.05 / power["tests"] / 2) + 0.8416
        assert one["in_table"] == pytest.approx(strict * error, rel=0.15)
        assert one["in_table"] > one["alone"]


def test_one_seed_is_counted_out_exactly(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "studies" / "small.yaml").read_text()
    path = tmp_path / "one.yaml"
    path.write_text(text.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    power = planned(read_study(path))
    (points,) = (m for m in power["measures"] if m["unit"] == "points")
    assert [one["alone"] for one in points["least"]] == [minimum_detectable_effect(64, share) for share in FLIPS]
    dry = study(path, tmp_path / "out", dry_run=True)
    assert dry["power"] == power
    said = "\n".join(lines(dry))
    assert f"tooluse-short points, 64 items × 1 seed: {100 * points['least'][1]['alone']:.1f} points" in said
