"""Line charts: round ticks, points where they belong, escaped text."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remend.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, ticks

LABELS = {"x_label": "step", "y_label": "nats", "title": "Loss"}


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 60, 8, [0, 10, 20, 30, 40, 50, 60]),
        (0, 0.35, 5, [0, 0.1, 0.2, 0.3]),
        (3, 17, 5, [5, 10, 15]),
        (2, 2, 5, [2]),
    ],
)
def test_ticks(low: float, high: float, about: int, expected: list[float]) -> None:
    assert ticks(low, high, about) == expected


@settings(deadline=None, max_examples=100, database=None)
@given(low=st.floats(-1e3, 1e3), span=st.floats(1e-3, 1e6), about=st.integers(2, 10))
def test_ticks_are_even_inside_and_few(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in found)
    assert len(found) <= about + 1
    assert all(s == pytest.approx(steps[0]) and s > 0 for s in steps)
    if steps:
        assert re.fullmatch(r"[125]\.0+e[+-]\d+", f"{steps[0]:.4e}")


def test_points_lie_where_they_belong() -> None:
    html = line_chart([Series("a", "strong", [(0, 0), (5, 1), (10, 2)], dots=True)], **LABELS)
    (line,) = parsed(html).iter("polyline")
    placed = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    inner = HEIGHT - TOP - BOTTOM
    assert placed[0] == (LEFT, HEIGHT - BOTTOM)  # the y axis begins at zero
    assert placed[2][0] == WIDTH - RIGHT
    assert placed[1][0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    assert placed[2][1] == pytest.approx(HEIGHT - BOTTOM - inner / 1.05, abs=0.06)
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parsed(html).iter("circle")]
    assert dots == placed


def test_legend_names_the_series_that_have_points() -> None:
    html = line_chart([Series("seen", "a", [(0, 1), (1, 2)]), Series("empty", "b", [])], **LABELS)
    assert [span.text for span in parsed(html).iter("span")] == ["seen"]
    assert "circle" not in html


def test_everything_is_escaped() -> None:
    bad = '<script>"&'
    html = line_chart([Series(bad, "a", [(0, 1)])], x_label=bad, y_label=bad, title=bad)
    root = parsed(html)  # well formed
    assert "<script>" not in html
    assert root.find("svg").attrib["aria-label"] == bad
    assert [t.text for t in root.iter("text")].count(bad) == 2


def test_nothing_to_draw() -> None:
    assert line_chart([], **LABELS) == line_chart([Series("a", "a", [])], **LABELS) == "<p>no steps were trained</p>"


@pytest.mark.parametrize("points", [[(3, 0.5)], [(0, 0.0), (1, 0.0)], [(2, 0.0)]])
def test_one_point_or_only_zeros_stay_inside(points: list[tuple[float, float]]) -> None:
    html = line_chart([Series("a", "a", points, dots=True)], **LABELS)
    assert "nan" not in html
    for circle in parsed(html).iter("circle"):
        assert LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT
        assert TOP <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM


def test_points_that_are_not_joined_have_no_line() -> None:
    apart = str(
        line_chart([Series("a", "accent", [(0, 1), (5, 2)], dots=True, joined=False)], x_label="", y_label="", title="")
    )
    assert "<polyline" not in apart
    assert apart.count("<circle") == 2
