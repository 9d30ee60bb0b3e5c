"""Charts: round ticks, marks where they belong, intervals, colours that rise in brightness, escaped text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remend.report.charts import (
    Arrows,
    Forest,
    Heatmap,
    Level,
    Lines,
    Points,
    Scatter,
    Series,
    Share,
    shade,
    shortened,
)
from remend.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, STYLES, TOP, WIDTH, marker, style, ticks
from remend.report.words import percent

BAD = '<script>"&'


def line_chart(series: Sequence[Series], **options: Any) -> str:
    return str(Lines("Loss", series, "step", "nats", **options).draw())


def forest_plot(*rows: Share) -> str:
    return str(Forest("t", rows, "share").draw())


def scatter(*groups: Points) -> str:
    return str(Scatter("t", groups, "x", "y").draw())


def heatmap(values: Sequence[Sequence[float | None]], **options: Any) -> str:
    return str(Heatmap("t", values, "theirs", "ours", **options).draw())


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def drawing(html: str) -> ElementTree.Element:
    """The chart without its legend."""
    chart = parsed(html).find("svg")
    assert chart is not None
    return chart


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
    marks = ticks(low, low + span, about)
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in marks)
    assert len(marks) <= about + 1
    assert all(s == pytest.approx(steps[0]) and s > 0 for s in steps)
    if steps:
        assert re.fullmatch(r"[125]\.0+e[+-]\d+", f"{steps[0]:.4e}")


def test_points_lie_where_they_belong() -> None:
    html = line_chart([Series("a", "strong", [(0, 0), (5, 1), (10, 2)], dots=True)])
    (line,) = drawing(html).iter("polyline")
    placed = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    inner = HEIGHT - TOP - BOTTOM
    assert placed[0] == (LEFT, HEIGHT - BOTTOM)  # the y axis begins at zero
    assert placed[2][0] == WIDTH - RIGHT
    assert placed[1][0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    assert placed[2][1] == pytest.approx(HEIGHT - BOTTOM - inner / 1.05, abs=0.06)
    assert [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in dots(html)] == placed


def test_legend_names_the_series_that_have_points() -> None:
    html = line_chart([Series("seen", "a", [(0, 1), (1, 2)]), Series("empty", "b", [])])
    assert ["".join(span.itertext()) for span in parsed(html).iter("span")] == ["seen"]
    assert dots(html) == []


def test_nothing_to_draw() -> None:
    assert line_chart([]) == line_chart([Series("a", "a", [])]) == "<p>nothing was measured</p>"


@pytest.mark.parametrize("points", [[(3, 0.5)], [(0, 0.0), (1, 0.0)], [(2, 0.0)]])
def test_one_point_or_only_zeros_stay_inside(points: list[tuple[float, float]]) -> None:
    html = line_chart([Series("a", "a", points, dots=True)])
    assert "nan" not in html
    assert len(dots(html)) == len(points)
    for circle in dots(html):
        assert LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT
        assert TOP <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM


def test_points_that_are_not_joined_have_no_line() -> None:
    apart = str(line_chart([Series("a", "accent", [(0, 1), (5, 2)], dots=True, joined=False)]))
    assert "<polyline" not in apart
    assert len(dots(apart)) == 2


def test_every_point_says_what_it_is_when_hovered() -> None:
    html = line_chart([Series("a", "s0", [(0, 1), (5, 2)]), Series("b", "s1", [(5, 3)], dots=True)])
    titles = [t.text for t in drawing(html).iter("title")]
    assert titles == ["a: 1 (step 0)", "a: 2 (step 5)", "b: 3 (step 5)"]
    own = line_chart([Series("a", "s0", [(0, 1), (1, 2)], titles=["first", "second"])])
    assert [t.text for t in drawing(own).iter("title")] == ["first", "second"]


def test_a_point_that_was_not_measured_breaks_line_and_band() -> None:
    points = [(0, 0.5), (1, 0.6), (2, None), (3, 0.7), (4, 0.8)]
    band = [(x, y and y - 0.1, y and y + 0.1) for x, y in points]
    html = line_chart([Series("a", "s0", points, band=band)])
    assert len(list(drawing(html).iter("polyline"))) == 2
    assert len([p for p in drawing(html).iter("polygon") if p.attrib["class"].startswith("band")]) == 2
    assert "None" not in html


def heights(html: str) -> list[float]:
    (line,) = drawing(html).iter("polyline")
    return [float(p.split(",")[1]) for p in line.attrib["points"].split()]


def test_the_y_axis_can_end_elsewhere_than_at_zero() -> None:
    points = [(0, 0.5), (1, 0.75)]
    floor, inner = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    up_to_one = heights(line_chart([Series("a", "s0", points)], high=1.0))
    assert up_to_one == pytest.approx([floor - 0.5 * inner, floor - 0.75 * inner], abs=0.06)
    assert heights(line_chart([Series("a", "s0", points)], low=None, high=0.75)) == [floor, TOP]
    negative = heights(line_chart([Series("a", "s0", [(0, -0.25), (1, 0.75)])], high=0.75))
    assert negative == [floor, TOP]


def test_levels_are_drawn_named_and_inside() -> None:
    html = line_chart([Series("a", "s0", [(0, 0.5), (1, 0.6)])], levels=[Level("chance", "null", 1.5)])
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
        texts = drawing(line_chart([Series("a", "s0", [(x, 1) for x in xs])])).iter("text")
        return [t.text or "" for t in texts if t.attrib["y"] == f"{HEIGHT - BOTTOM + 18:.1f}"]

    assert below([0, 1, 2, 3]) == ["0", "1", "2", "3"]
    assert below([0, 0.5, 2]) == ["0", "0.5", "1", "1.5", "2"]


def at(html: str, css: str, key: str) -> list[float]:
    return [float(e.attrib[key]) for e in drawing(html).iter() if e.attrib.get("class", "") == css]


def test_words_of_an_interval() -> None:
    assert Share("a", 0.57, 0.53, 0.61).words() == "57% (53% to 61%)"
    assert Share("a", -0.2).words() == "−20%"
    assert Share("a", None).words() == percent(None) == "–"


def test_forest_places_values_between_its_axes() -> None:
    html = forest_plot(Share("a", 0.5, 0.25, 0.75), Share("b", 0.25))
    zero, one = at(html, "axis", "x1")
    assert at(html, "dot s0", "cx") == [pytest.approx((zero + one) / 2, abs=0.06)]
    (low,), (high,) = at(html, "whisker", "x1"), at(html, "whisker", "x2")
    assert (low - zero, one - high) == (pytest.approx((one - zero) / 4, abs=0.1),) * 2
    assert at(html, "dot s0 open", "cx") == [pytest.approx(low, abs=0.06)]  # no interval was measured
    assert "a: 50% (25% to 75%)" in [t.text for t in drawing(html).iter("title")]


def test_forest_keeps_a_failed_run_at_the_edge() -> None:
    html = forest_plot(Share("lost", -8.0, -9.0, -7.0), Share("won", 0.5))
    left = min(float(e.attrib["x1"]) for e in drawing(html).iter("line"))
    assert at(html, "dot s0", "cx") == [left]
    assert "−800% (−900% to −700%)" in html
    assert forest_plot(Share("a", None)) == "<p>no gap was there to close</p>"


def test_scatter_forces_neither_axis_to_zero_and_leaves_out_what_is_not_measured() -> None:
    points = [(0.90, 2.0, "step 0"), (None, 1.5, "step 5"), (0.95, 1.0, "step 10")]
    html = scatter(Points("run", points), Points("alone", [(0.92, 1.4, "x")], joined=False))
    assert len(list(drawing(html).iter("polyline"))) == 1
    first, last = at(html, "dot s0 open", "cx")[0], at(html, "dot s0", "cx")[0]
    assert last - first > 400  # most of the width
    assert "run: step 10" in [t.text for t in drawing(html).iter("title")]
    assert scatter(Points("a", [(None, 1.0, "")])) == "<p>nothing was measured</p>"
    one = scatter(Points("a", [(0.0, 0.0, "")]))
    assert "nan" not in one


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_shades_rise_in_brightness() -> None:
    steps = [luminance(shade(i / 50)) for i in range(51)]
    assert steps == sorted(steps)
    assert shade(-3) == shade(0) == "#440154"
    assert shade(7) == shade(1) == "#fde725"


def test_heatmap_has_a_cell_for_each_value_with_row_0_at_the_bottom() -> None:
    values = [[1.0, 0.5, None], [0.0, 0.25, 0.75]]
    html = heatmap(values)
    cells = {e.find("title").text: e.attrib for e in drawing(html).iter("rect") if e.find("title") is not None}  # type: ignore[union-attr]
    assert set(cells) == {
        "ours 0, theirs 0: 1.000",
        "ours 0, theirs 1: 0.500",
        "ours 1, theirs 0: 0.000",
        "ours 1, theirs 1: 0.250",
        "ours 1, theirs 2: 0.750",
    }
    low, high = cells["ours 0, theirs 0: 1.000"], cells["ours 1, theirs 0: 0.000"]
    assert float(low["y"]) > float(high["y"])
    assert (low["fill"], high["fill"]) == (shade(1), shade(0))
    assert heatmap([]) == "<p>nothing was measured</p>"


def test_heatmap_without_hover_is_a_few_paths() -> None:
    values = [[(i * j) / 6400 for j in range(81)] for i in range(81)]
    small = heatmap(values, hover=False)
    assert len(small) < 200_000
    assert len(small) < len(heatmap(values)) / 4
    assert sum(p.attrib["d"].count("M") for p in drawing(small).iter("path")) == 81 * 81


@pytest.mark.parametrize(
    ("name", "letters", "cut"),
    [("short", 10, "short"), ("abcdefghijklmnop", 9, "abcd…mnop"), ("x" * 99, 5, "xx…xx")],
)
def test_names_are_cut_in_the_middle(name: str, letters: int, cut: str) -> None:
    assert shortened(name, letters) == cut


def test_everything_is_escaped() -> None:
    charts = [
        Lines(BAD, [Series(BAD, "a", [(0, 1)])], BAD, BAD),
        Forest(BAD, [Share(BAD, 0.5, 0.4, 0.6)], BAD),
        Scatter(BAD, [Points(BAD, [(0, 0, BAD)])], BAD, BAD),
        Heatmap(BAD, [[0.5]], BAD, BAD, rows=[BAD], columns=[BAD]),
        Arrows(BAD, [Points(BAD, [(0.2, 0.1, BAD), (0.6, 0.5, BAD)])], BAD, BAD, goal=(1.0, 0.9, BAD)),
    ]
    for chart in charts:
        html = str(chart.draw())
        assert drawing(html).attrib["aria-label"] == BAD  # well formed
        assert "<script" not in html


def arrows(*groups: Points, goal: tuple[float, float, str] | None = None) -> str:
    return str(Arrows("int3", groups, "agreement", "score", goal=goal).draw())


def test_an_arrow_has_a_start_a_head_and_a_goal() -> None:
    drawn = arrows(Points("sdft", [(0.2, 0.1, "before"), (0.6, 0.5, "after <1>")]), goal=(1.0, 0.9, "the reference"))
    assert drawn.count("<polygon") == 1
    for said in ("sdft: before", "sdft: after &lt;1&gt;", "the reference"):
        assert said in drawn


def test_what_did_not_move_is_a_point_and_what_is_unknown_is_left_out() -> None:
    still = arrows(Points("sft", [(0.2, 0.1, "before"), (0.2, 0.1, "after")]))
    assert "<polygon" not in still
    assert "sft: after" in still
    assert "nothing was measured" in arrows(Points("sft", [(None, 0.1, "before")]))
