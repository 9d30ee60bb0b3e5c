"""Line charts: round ticks, points where they belong, escaped text."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remend.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    STYLES,
    TOP,
    WIDTH,
    Level,
    Series,
    line_chart,
    marker,
    style,
    ticks,
)

LABELS = {"x_label": "step", "y_label": "nats", "title": "Loss"}


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def drawing(html: str) -> ElementTree.Element:
    """The chart without its legend."""
    found = parsed(html).find("svg")
    assert found is not None
    return found


def dots(html: str) -> list[ElementTree.Element]:
    """The circles that are seen, without those that only catch the pointer."""
    return [c for c in drawing(html).iter("circle") if "dot" in c.attrib["class"].split()]


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
    (line,) = drawing(html).iter("polyline")
    placed = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    inner = HEIGHT - TOP - BOTTOM
    assert placed[0] == (LEFT, HEIGHT - BOTTOM)  # the y axis begins at zero
    assert placed[2][0] == WIDTH - RIGHT
    assert placed[1][0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    assert placed[2][1] == pytest.approx(HEIGHT - BOTTOM - inner / 1.05, abs=0.06)
    assert [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in dots(html)] == placed


def test_legend_names_the_series_that_have_points() -> None:
    html = line_chart([Series("seen", "a", [(0, 1), (1, 2)]), Series("empty", "b", [])], **LABELS)
    assert ["".join(span.itertext()) for span in parsed(html).iter("span")] == ["seen"]
    assert dots(html) == []


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
    assert len(dots(html)) == len(points)
    for circle in dots(html):
        assert LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT
        assert TOP <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM


def test_points_that_are_not_joined_have_no_line() -> None:
    apart = str(
        line_chart([Series("a", "accent", [(0, 1), (5, 2)], dots=True, joined=False)], x_label="", y_label="", title="")
    )
    assert "<polyline" not in apart
    assert len(dots(apart)) == 2


def test_every_point_says_what_it_is_when_hovered() -> None:
    html = line_chart([Series("a", "s0", [(0, 1), (5, 2)]), Series("b", "s1", [(5, 3)], dots=True)], **LABELS)
    titles = [t.text for t in drawing(html).iter("title")]
    assert titles == ["a: 1 (step 0)", "a: 2 (step 5)", "b: 3 (step 5)"]
    own = line_chart([Series("a", "s0", [(0, 1), (1, 2)], titles=["first", "second"])], **LABELS)
    assert [t.text for t in drawing(own).iter("title")] == ["first", "second"]


def test_a_point_that_was_not_measured_breaks_line_and_band() -> None:
    points = [(0, 0.5), (1, 0.6), (2, None), (3, 0.7), (4, 0.8)]
    band = [(x, y and y - 0.1, y and y + 0.1) for x, y in points]
    html = line_chart([Series("a", "s0", points, band=band)], **LABELS)
    assert len(list(drawing(html).iter("polyline"))) == 2
    assert len([p for p in drawing(html).iter("polygon") if p.attrib["class"].startswith("band")]) == 2
    assert "None" not in html


def heights(html: str) -> list[float]:
    (line,) = drawing(html).iter("polyline")
    return [float(p.split(",")[1]) for p in line.attrib["points"].split()]


def test_the_y_axis_can_end_elsewhere_than_at_zero() -> None:
    points = [(0, 0.5), (1, 0.75)]
    floor, inner = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    up_to_one = heights(line_chart([Series("a", "s0", points)], **LABELS, high=1.0))
    assert up_to_one == pytest.approx([floor - 0.5 * inner, floor - 0.75 * inner], abs=0.06)
    assert heights(line_chart([Series("a", "s0", points)], **LABELS, low=None, high=0.75)) == [floor, TOP]
    negative = heights(line_chart([Series("a", "s0", [(0, -0.25), (1, 0.75)])], **LABELS, high=0.75))
    assert negative == [floor, TOP]


def test_levels_are_drawn_named_and_inside() -> None:
    html = line_chart([Series("a", "s0", [(0, 0.5), (1, 0.6)])], **LABELS, levels=[Level("chance", "null", 1.5)])
    (line,) = [e for e in drawing(html).iter("line") if e.attrib["class"] == "line null"]
    assert TOP <= float(line.attrib["y1"]) <= HEIGHT - BOTTOM
    assert "chance" in ["".join(span.itertext()) for span in parsed(html).iter("span")]


def test_each_style_has_its_own_marker() -> None:
    shapes = {re.sub(r"s\d|[-\d.]+", "", marker(0, 0, style(i)).split("points")[0]) for i in range(STYLES)}
    drawn = [marker(0, 0, style(i)).replace(style(i), "") for i in range(STYLES)]
    assert len(shapes) == 2  # circles and polygons
    assert len(set(drawn)) == STYLES - 1  # s0 and s5 are both circles: one is filled, the other is a ring (style.css)
    assert style(STYLES) == style(0)


def test_counts_are_ticked_at_whole_numbers() -> None:
    def below(xs: list[float]) -> list[str]:
        texts = drawing(line_chart([Series("a", "s0", [(x, 1) for x in xs])], **LABELS)).iter("text")
        return [t.text or "" for t in texts if t.attrib["y"] == f"{HEIGHT - BOTTOM + 18:.1f}"]

    assert below([0, 1, 2, 3]) == ["0", "1", "2", "3"]
    assert below([0, 0.5, 2]) == ["0", "0.5", "1", "1.5", "2"]
