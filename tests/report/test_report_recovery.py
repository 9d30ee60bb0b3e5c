"""The page of a recovery: gap closed, figures by stream, samples, how to rerun it, and tracks where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.made_reports import made_run, made_summary
from helpers.pages import check_page
from remend.report import write_report
from remend.report.charts import Lines, Scatter
from remend.report.markdown import escape, grid, markdown
from remend.report.next_steps import next_steps
from remend.report.page import Code, Figure, Table
from remend.report.recovery import gap_share, recovery_page, table, verdict
from remend.report.training import rolling, thinned
from remend.report.writing import HTML, MARKDOWN, html, write_page


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
    for row in table(made_summary(repair=None)):
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


def test_the_headline_separates_repair_from_training() -> None:
    said = verdict(made_summary())
    assert said == (
        "64% of the KL gap closed (95% interval 61% to 67%, paired over 24 held-out prompts): repair closed 56%, "
        "training 8% more."
    )
    nothing = {"kl": 2.5 * 0.36, "seconds": 1.0}
    assert verdict(made_summary(repair=nothing)).endswith("repair closed 64%, training 0% more.")
    harm = {"kl": 2.5 * 0.3, "seconds": 1.0}
    assert verdict(made_summary(repair=harm)).endswith("repair closed 70%, training took 6% away.")
    undone = {"kl": 3.0, "seconds": 1.0, "kept": False}
    assert "repair" not in verdict(made_summary(repair=undone))
    assert "nothing was trained" in verdict(made_summary(steps=0))


def test_a_few_prompts_carry_no_interval(tmp_path: Path) -> None:
    path, summary = made_run(tmp_path / "run"), made_summary(held_out_prompts=4)
    assert "4 held-out prompts are too few for an interval: take 16 or more" in verdict(summary)
    page = recovery_page(path, summary)
    assert "61%" not in html(page)
    (shown,) = [block for block in page.sections[0].blocks if isinstance(block, Table)]
    assert set(shown.tones) == {""}
    assert {tile.tone for tile in page.tiles} == {""}


@pytest.mark.parametrize(
    ("gap", "ends", "tone", "said"),
    [
        (0.05, [-0.02, 0.1], "", "holds 0%, so this may be chance"),
        (0.0, [0.0, 0.0], "", "may be chance"),
        (-0.18, [-0.21, -0.15], "bad", "further from the reference than it was"),
        (0.3, [0.2, 0.4], "good", "30% of the KL gap closed"),
    ],
)
def test_recovery_is_only_what_lies_above_zero(gap: float, ends: list[float], tone: str, said: str) -> None:
    summary = made_summary(gap_closed={"kl": gap}, gap_closed_kl_95=ends, repair=None)
    assert said in verdict(summary)
    assert gap_share(summary).tone == tone


def test_a_page_with_a_stream_that_keeps_says_so_first(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", streams=("recover", "keep"))
    summary = summary_of(path)
    summary["streams"]["keep"]["after"]["kl"] = 0.004
    assert verdict(summary).startswith(
        "Stream keep: kept (KL 0.004 nats per token to the student as it came in). 64% of"
    )
    tile = recovery_page(path, summary).tiles[0]
    assert (tile.label, tile.value, tile.tone) == ("Stream keep", "kept", "good")
    summary["streams"]["keep"]["after"]["kl"] = 0.4
    assert recovery_page(path, summary).tiles[0].tone == "bad"
    summary["streams"]["keep"]["teacher"] = "ema"
    assert verdict(summary).startswith("64%")
    page = html(recovery_page(path, summary))
    assert "can only rise" in page
    assert page.count("says that training went on too long") == 1


def test_the_table_has_repair_and_reference_in_columns_of_their_own(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    blocks = recovery_page(path, summary_of(path)).sections[0].blocks
    (shown,) = [block for block in blocks if isinstance(block, Table)]
    by_label = {row[0]: row for row in shown.rows}
    assert shown.columns[1:] == ["gap closed", "degraded", "repaired", "recovered", "reference"]
    assert by_label["KL to the reference, on its answers (nats per token)"][1] == "64% (61% to 67%)"
    assert by_label["perplexity of the reference's answers"][1:] == ["–", "40.00", "8.10", "7.10", "2.08"]
    assert by_label["top-1 agreement with the reference"][1:] == ["37%", "33.0%", "50.0%", "58.0%", "100.0%"]
    assert shown.tones == ["good", "", "", ""]


def test_every_prompt_is_a_point(tmp_path: Path) -> None:
    chart = charts(made_run(tmp_path / "run"))["Each held-out prompt, before and after"]
    assert isinstance(chart, Scatter)
    ((before, after, said), *_) = chart.groups[0].points
    assert len(chart.groups[0].points) == 24
    assert before > after
    assert said.startswith("What causes a volcano to erupt?: KL")


def test_the_worst_prompts_are_coloured_and_filtered(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    text = html(recovery_page(path, summary_of(path)))
    assert 'class="k4"' in text
    assert "Show prompts and answers with" in check_page(text).text
    (path / "worst.jsonl").unlink()  # a run of an older version
    assert "<script>" not in html(recovery_page(path, summary_of(path)))


def test_scores_stand_beside_the_gap(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / "evals").mkdir()
    graded = {"task": "tools", "score": 0.8, "interval_95": [0.7, 0.9], "n": 64}
    models = json.loads((path / "manifest.json").read_text())["models"]
    for name, content in {
        "before": {**graded, "score": 0.4, "model": "x", "files": models["student"]},
        "after": {"results": [graded], "model": str(path), "files": {}},
        "other": {**graded, "model": "y", "files": {"z": "1"}},
        "broken": {"model": str(path), "files": {}, "score": 1},
    }.items():
        (path / "evals" / f"{name}.json").write_text(json.dumps(content))
    (path / "evals" / "no.json").write_text("[")
    page = recovery_page(path, summary_of(path))
    (table_,) = next(s for s in page.sections if s.place == "tasks").blocks
    assert isinstance(table_, Table)
    assert table_.rows == [["tools", "40.0% (70.0% to 90.0%)", "80.0% (70.0% to 90.0%)", "–", "64"]]
    assert ("Score on tools", "80.0%", "degraded 40.0%") in [(t.label, t.value, t.note) for t in page.tiles]


def test_what_to_do_next_names_the_run(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (section,) = (s for s in recovery_page(path, made_summary(exports=["gguf:q4_0"])).sections if s.place == "next")
    said = "\n".join(block.text for block in section.blocks if isinstance(block, Code))
    for command in (
        f"AutoModelForCausalLM.from_pretrained('{path}/model')",
        f"vllm serve {path}/model",
        f"remend export {path} --format gguf:q4_0 --out {path}-gguf",
        f"remend eval {path} --task TASK --data ROWS.jsonl --out {path}/evals/recovered.json",
        f"remend push {path} YOUR_NAME/run",
    ):
        assert command in said
    (path / "model").mkdir()
    (path / "model" / "adapter_config.json").touch()
    manifest = {"recipe": {"student": "base"}, "reference": "t"}
    blocks = next_steps(path, made_summary(), manifest)
    adapter = "\n".join(block.text for block in blocks if isinstance(block, Code))
    assert "AutoPeftModelForCausalLM" in adapter
    assert f"vllm serve base --enable-lora --lora-modules recovered={path}/model" in adapter
    assert "remend export" not in adapter


def test_the_course_of_training_is_drawn(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    figures = charts(path)
    assert figures["Memory"].series[0].points[0] == (1.0, 4001)
    assert {"Learning rate", "Gradient norm", "Clipped share: completions that met the length limit"} <= set(figures)
    (path / "timing.jsonl").write_text('{"step": 1, "seconds": 2.0}\n')
    alone = charts(path)["Tokens per second"]
    assert len(alone.series[0].points) == 1
    assert alone.draw().count('class="dot s0"') == 1


def test_no_damage_draws_no_gap(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    page = recovery_page(path, made_summary(gap_closed=None, gap_closed_kl_95=None))
    assert "No measurable damage" in check_page(html(page)).text
    assert "KL gap closed" not in {tile.label for tile in page.tiles}


def test_one_stream_and_its_speed(tmp_path: Path) -> None:
    figures = charts(made_run(tmp_path / "run"))
    loss, speed = figures["Loss and held-out KL"], figures["Tokens per second"]
    assert isinstance(loss, Lines)
    assert [len(s.points) for s in loss.series] == [24, 24, 3, 1]
    held_out = loss.series[2]
    assert held_out.points == [(0.0, 1.1), (12.0, 1.0), (24.0, 0.9)]  # begins where repair left it
    assert held_out.joined
    assert [s.name for s in speed.series] == ["completion tokens"]
    assert speed.series[0].points[0] == (2.0, (301 + 302) / 16)  # a round of sampling feeds two steps
    assert len(speed.series[0].points) == 12
    odd = charts(made_run(tmp_path / "odd", save_every=5))["Tokens per second"]  # no round ends at a checkpoint
    assert len(odd.series[0].points) == 12


def test_several_streams_have_a_figure_each(tmp_path: Path) -> None:
    figures = charts(made_run(tmp_path / "run", streams=("recover", "keep")))
    main, side = figures["Loss and held-out KL: recover"], figures["Loss and held-out KL: keep"]
    assert [s.name for s in main.series][2] == "held-out KL (on the reference's answers)"
    assert side.series[2].points == [(0.0, 0.0), (24.0, 0.01)]
    assert not side.series[2].joined
    assert [s.name for s in figures["Tokens per second"].series] == ["all streams", "recover", "keep"]
    assert list(figures)[:3] == [
        "Each held-out prompt, before and after",
        "Loss and held-out KL: recover",
        "Loss and held-out KL: keep",
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


def test_what_a_model_wrote_steers_no_terminal(tmp_path: Path) -> None:
    bad = "\x1bgone\x07"
    page = recovery_page(made_run(tmp_path / "run"), made_summary(notes=[bad]))
    for file in (HTML, MARKDOWN):
        text = write_page(tmp_path, page).with_name(file).read_text()
        assert "?gone?" in text
        assert not set(text) & {"\x1b", "\x07"}


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
