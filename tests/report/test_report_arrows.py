"""Arrows from degraded to recovered: their ends, the reference, and what can't be drawn."""

from __future__ import annotations

from remend.report.arrows import Arrows
from remend.report.plots import Group


def arrows(*groups: Group, goal: tuple[float, float, str] | None = None) -> str:
    return str(Arrows("int3", groups, "agreement", "score", goal=goal).draw())


def test_an_arrow_has_a_start_a_head_and_a_goal() -> None:
    drawn = arrows(Group("sdft", [(0.2, 0.1, "before"), (0.6, 0.5, "after <1>")]), goal=(1.0, 0.9, "the reference"))
    assert drawn.count("<polygon") == 1
    for said in ("sdft: before", "sdft: after &lt;1&gt;", "the reference"):
        assert said in drawn


def test_what_did_not_move_is_a_point_and_what_is_unknown_is_left_out() -> None:
    still = arrows(Group("sft", [(0.2, 0.1, "before"), (0.2, 0.1, "after")]))
    assert "<polygon" not in still
    assert "sft: after" in still
    assert "nothing was measured" in arrows(Group("sft", [(None, 0.1, "before")]))
