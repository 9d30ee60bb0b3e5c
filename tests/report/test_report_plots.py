"""Forest plots, scatters and heatmaps: marks where they belong, intervals, colours that rise, escaped text."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from remend.report.plots import Group, Interval, forest_plot, heatmap, percent, scatter, shade, shortened

BAD = '<script>"&'


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def drawing(html: str) -> ElementTree.Element:
    found = parsed(html).find("svg")
    assert found is not None
    return found


def at(html: str, css: str, key: str) -> list[float]:
    return [float(e.attrib[key]) for e in drawing(html).iter() if e.attrib.get("class", "") == css]


def test_words_of_an_interval() -> None:
    assert Interval("a", 0.57, 0.53, 0.61).words() == "57% (53% to 61%)"
    assert Interval("a", -0.2).words() == "−20%"
    assert Interval("a", None).words() == percent(None) == "–"


def test_forest_places_values_between_its_axes() -> None:
    html = forest_plot([Interval("a", 0.5, 0.25, 0.75), Interval("b", 0.25)], x_label="share", title="t")
    zero, one = at(html, "axis", "x1")
    assert at(html, "dot s0", "cx") == [pytest.approx((zero + one) / 2, abs=0.06)]
    (low,), (high,) = at(html, "whisker", "x1"), at(html, "whisker", "x2")
    assert (low - zero, one - high) == (pytest.approx((one - zero) / 4, abs=0.1),) * 2
    assert at(html, "dot s0 open", "cx") == [pytest.approx(low, abs=0.06)]  # no interval was measured
    assert "a: 50% (25% to 75%)" in [t.text for t in drawing(html).iter("title")]


def test_forest_keeps_a_failed_run_at_the_edge() -> None:
    html = forest_plot([Interval("lost", -8.0, -9.0, -7.0), Interval("won", 0.5)], x_label="share", title="t")
    left = min(float(e.attrib["x1"]) for e in drawing(html).iter("line"))
    assert at(html, "dot s0", "cx") == [left]
    assert "−800% (−900% to −700%)" in html
    assert forest_plot([Interval("a", None)], x_label="", title="") == "<p>no gap was there to close</p>"


def test_scatter_forces_neither_axis_to_zero_and_leaves_out_what_is_not_measured() -> None:
    points = [(0.90, 2.0, "step 0"), (None, 1.5, "step 5"), (0.95, 1.0, "step 10")]
    html = scatter(
        [Group("run", points), Group("alone", [(0.92, 1.4, "x")], joined=False)], x_label="x", y_label="y", title="t"
    )
    assert len(list(drawing(html).iter("polyline"))) == 1
    first, last = at(html, "dot s0 open", "cx")[0], at(html, "dot s0", "cx")[0]
    assert last - first > 400  # most of the width
    assert "run: step 10" in [t.text for t in drawing(html).iter("title")]
    assert scatter([Group("a", [(None, 1.0, "")])], x_label="", y_label="", title="") == "<p>nothing was measured</p>"
    one = scatter([Group("a", [(0.0, 0.0, "")])], x_label="", y_label="", title="")
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
    html = heatmap(values, x_label="theirs", y_label="ours", title="t")
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
    assert heatmap([], x_label="", y_label="", title="") == "<p>nothing was measured</p>"


def test_heatmap_without_hover_is_a_few_paths() -> None:
    values = [[(i * j) / 6400 for j in range(81)] for i in range(81)]
    small = heatmap(values, x_label="x", y_label="y", title="t", hover=False)
    assert len(small) < 200_000
    assert len(small) < len(heatmap(values, x_label="x", y_label="y", title="t")) / 4
    assert sum(p.attrib["d"].count("M") for p in drawing(small).iter("path")) == 81 * 81


def test_names_are_cut_in_the_middle() -> None:
    assert shortened("short", 10) == "short"
    assert shortened("abcdefghijklmnop", 9) == "abcd…mnop"
    assert len(shortened("x" * 99, 34)) == 34


def test_everything_is_escaped() -> None:
    charts = [
        forest_plot([Interval(BAD, 0.5, 0.4, 0.6)], x_label=BAD, title=BAD),
        scatter([Group(BAD, [(0, 0, BAD)])], x_label=BAD, y_label=BAD, title=BAD),
        heatmap([[0.5]], x_label=BAD, y_label=BAD, title=BAD, rows=[BAD], columns=[BAD]),
    ]
    for html in charts:
        assert drawing(html).attrib["aria-label"] == BAD  # well formed
        assert "<script" not in html
