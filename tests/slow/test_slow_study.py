"""The study that trains its own model: whole in minutes, every degradation recovered beyond chance, CKA related."""

from __future__ import annotations

from pathlib import Path

import pytest

from remend.studies.study import study

pytestmark = pytest.mark.slow


def test_the_tiny_study_recovers_every_degradation(tmp_path: Path) -> None:
    found = study("tiny", tmp_path / "out")
    assert found["failures"] == {}
    assert {cell["state"] for cell in found["cells"]} == {"done"}
    for group in ("forgetting", "magnitude-70", "layers-removed"):
        rows = {row["method"]: row for row in found["rows"] if row["group"] == group}
        assert set(rows) == {"none", "sft", "off-policy", "repair-sdft"}
        row = rows["repair-sdft"]
        assert row["seeds"] == [0, 1, 2]
        assert row["kl"]["recovered"] < row["kl"]["degraded"]
        assert row["gap_closed_95"][0] > 0, group
        assert row["agreement"]["recovered"] > row["agreement"]["degraded"]
        assert all(gap > 0 for gap in row["gap_closed_by_seed"])
        for spent in ("at_equal_tokens", "at_equal_seconds"):
            (equal,) = (entry for entry in found[spent] if entry["group"] == group)
            assert [m["method"] for m in equal["methods"]] == ["sft", "off-policy", "repair-sdft"]
    # pruned it lost much of the task too, and wins some of that back; removed layers took the task for good
    lost = next(r for r in found["rows"] if (r["group"], r["method"]) == ("magnitude-70", "repair-sdft"))
    (grade,) = lost["grades"]
    assert grade["change"]["interval"][0] > 0
    for level in ("within", "between"):
        related = found["correlation"]["overall"][level]["spearman"]
        assert -1 <= related["coefficient"] <= 1
        assert 0 < related["p_value"] <= 1
        assert related["low"] <= related["coefficient"] <= related["high"]
