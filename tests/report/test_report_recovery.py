"""The page of a recovery: gap closed, figures by stream, samples, how to rerun it, and tracks where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.made_reports import made_run, made_summary
from helpers.pages import check_page
from remend.report import write_report
from remend.report.charts import Forest, Lines
from remend.report.markdown import escape, grid, markdown
from remend.report.page import Figure, Table
from remend.report.recovery import recovery_page, table, verdict
from remend.report.training import rolling, thinned
from remend.report.writing import html


def summary_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return content


def charts(path: Path) -> dict[str, Any]:
    page = recovery_page(path, summary_of(path))
    figures = [b for section in page.sections for b in section.blocks if isinstance(b, Figure)]
    return {chart.title: chart for figure in figures for chart in figure.charts}


def test_all_content_is_there(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    assert write_report(path, summary_of(path)) == path / "report.html"
    text = (path / "report.html").read_text(encoding="utf-8")
    reader = check_page(text)
    assert verdict(made_summary()) in reader.text
    for row in table(made_summary()):
        assert row["label"] in reader.text
        assert row["degraded"] in reader.text
    assert "remend recover" in reader.text
    assert f"{path}/recipe.yaml out=NEW_DIRECTORY" in reader.text
    assert "rate: 0.01" in reader.text  # the recipe
    assert '"git_commit": "d2948adf' in reader.text  # the manifest
    assert "a note" in reader.text
    assert len(text) < 100_000
    assert "Recovery against alignment" not in reader.text


def test_markdown_and_json_say_the_same(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", track=True)
    write_report(path, summary_of(path))
    text = (path / "report.md").read_text(encoding="utf-8")
    for figure in ("64%", "61% to 67%", "2.500", "0.900", "| 12 |", "remend recover"):
        assert figure in text
    content = json.loads((path / "report.json").read_text(encoding="utf-8"))
    assert content["verdict"] == verdict(made_summary())
    assert content["sections"][0]["title"] == "Gap closed"


def test_gap_closed_has_the_interval_of_repair_from_the_sums_by_prompt(tmp_path: Path) -> None:
    chart = charts(made_run(tmp_path / "run"))["Gap closed, with 95% intervals"]
    assert isinstance(chart, Forest)
    repaired, recovered, *others = chart.rows
    assert repaired.value == pytest.approx(1 - 1.1 / 2.5)
    assert (repaired.low, repaired.high) == pytest.approx((1 - 53 / 120,) * 2)  # all prompts alike
    assert (recovered.value, recovered.low, recovered.high) == (0.64, 0.61, 0.67)
    assert [row.low for row in others] == [None, None]


def test_the_reference_has_a_column(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    blocks = recovery_page(path, summary_of(path)).sections[0].blocks
    (shown,) = [block for block in blocks if isinstance(block, Table)]
    by_label = {row[0]: row for row in shown.rows}
    assert by_label["perplexity of the reference's answers"][3:] == ["2.08", "–"]
    assert by_label["top-1 agreement with the reference"][3:] == ["100%", "37%"]


def test_no_damage_draws_no_gap(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    page = recovery_page(path, made_summary(gap_closed=None, gap_closed_kl_95=None))
    assert "No measurable damage" in check_page(html(page)).text
    assert "95% intervals" not in html(page)


def test_one_stream_and_its_speed(tmp_path: Path) -> None:
    figures = charts(made_run(tmp_path / "run"))
    loss, speed = figures["Loss and held-out KL"], figures["Tokens a second"]
    assert isinstance(loss, Lines)
    assert [len(s.points) for s in loss.series] == [24, 24, 3, 1]
    held_out = loss.series[2]
    assert held_out.points == [(0.0, 1.1), (12.0, 1.0), (24.0, 0.9)]  # begins where repair left it
    assert held_out.joined
    assert [s.name for s in speed.series] == ["completion tokens"]
    assert speed.series[0].points[0] == (2.0, (301 + 302) / 16)  # a round of sampling feeds two steps
    assert len(speed.series[0].points) == 12
    odd = charts(made_run(tmp_path / "odd", save_every=5))["Tokens a second"]  # rounds end at checkpoints
    assert len(odd.series[0].points) == 24


def test_several_streams_have_a_figure_each(tmp_path: Path) -> None:
    figures = charts(made_run(tmp_path / "run", streams=("recover", "keep")))
    main, side = figures["Loss and held-out KL: recover"], figures["Loss and held-out KL: keep"]
    assert [s.name for s in main.series][2] == "held-out KL (on the reference's answers)"
    assert side.series[2].points == [(0.0, 0.0), (24.0, 0.01)]
    assert not side.series[2].joined
    assert [s.name for s in figures["Tokens a second"].series] == ["all streams", "recover", "keep"]
    assert list(figures) == [
        "Gap closed, with 95% intervals",
        "Loss and held-out KL: recover",
        "Loss and held-out KL: keep",
        "Tokens a second",
    ]


def test_without_steps(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    for name in ("metrics.jsonl", "timing.jsonl", "held_out_repaired.jsonl"):
        (path / name).unlink()
    page = recovery_page(path, summary_of(path))
    assert "No steps were trained." in check_page(html(page)).text


def test_a_track_is_drawn(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", track=True)
    figures = charts(path)
    (group,) = figures["Recovery against alignment"].groups
    assert len(group.points) == 5
    assert group.points[0][0] == pytest.approx(0.85)
    assert group.points[0][1] == 2.5
    grid_ = figures["CKA by layer and step"]
    assert (len(grid_.values), list(grid_.columns)) == (6, ["start", "6", "12", "18", "end"])
    check_page(html(recovery_page(path, summary_of(path))))


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    path = made_run(tmp_path / "run", student=f"models/{bad}", lora={bad: bad})
    rows = [{"id": bad, "prompt": bad, "reference": bad, "degraded": f"{bad} x", "recovered": bad}]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = recovery_page(path, made_summary(notes=[bad], warnings=[bad], constraint=bad))
    reader = check_page(html(page))
    assert reader.text.count(bad) >= 8
    assert f"> {escape(bad)}" in markdown(page)


def test_ten_thousand_steps_stay_small(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    rows = [{"step": i, "loss": 1 / i, "tokens": 300} for i in range(1, 10_001)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = html(recovery_page(path, summary_of(path)))
    assert len(text) < 500_000
    assert "(mean of 25 steps)" in text


def test_thinned_keeps_the_mean_and_the_end() -> None:
    points = [(float(i), float(i)) for i in range(10)]
    assert thinned(points, 10) == points
    assert thinned(points, 5) == [(1.0, 0.5), (3.0, 2.5), (5.0, 4.5), (7.0, 6.5), (9.0, 8.5)]
    assert thinned([(0.0, None), (1.0, 2.0), (2.0, None)], 2) == [(1.0, 2.0), (2.0, None)]


def test_rolling_means() -> None:
    assert rolling([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b *c* [d](e) `f`", r"a\|b \*c\* \[d\](e) \`f\`"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("two\nlines", "two lines"),
        ("1. item", r"1\. item"),
        ("2.500", "2.500"),
        ("- item", r"\- item"),
        ("see https://a.b", "see https:&#47;&#47;a.b"),
    ],
)
def test_markdown_escapes(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_markdown_tables_have_their_columns() -> None:
    assert grid(["", "b"], [["x|y", "2"]]) == ["|   | b |", "| --- | ---: |", r"| x\|y | 2 |"]
