"""The page of a diagnosis: all content there, each figure explained, nothing unescaped, small, nothing loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.made_reports import made_diagnosis
from helpers.pages import Reader, check_page
from remend.report import write_diagnosis_report
from remend.report.diagnosis import command, diagnosis_page
from remend.report.markdown import markdown
from remend.report.page import Figure
from remend.report.pointers import resolve, value_text
from remend.report.samples import coloured, level, marked, words_of
from remend.report.writing import html

BAD = "<script>alert(1)</script>"


def everywhere(value: Any, bad: str) -> Any:
    """The same with every text that is not a word of the program's own made bad."""
    if isinstance(value, dict):
        kept = ("rests_on", "severity", "kind", "name")
        return {k: v if k in kept else everywhere(v, bad) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(item, bad) for item in value]
    return bad + value if isinstance(value, str) else value


def test_all_content_is_there(tmp_path: Path) -> None:
    diagnosis = made_diagnosis()
    path = write_diagnosis_report(tmp_path, diagnosis)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    reader = check_page(text)
    for student in (diagnosis, *diagnosis["others"]):
        for sentence in (*student["sentences"], student["recommendation"]):
            assert sentence["text"] in reader.text
        assert f"Every layer of {student['name']}" in reader.text
        for sample in student["samples"]:
            assert sample["prompt"] in reader.text
    assert "75% (72% to 78%)" in reader.text  # gap closed
    assert diagnosis["disclaimer"] in reader.text
    assert diagnosis["estimator"]["row_policy"] in reader.text
    assert diagnosis["data_hash"] in reader.text
    for words in ("the reference, run again", "random weights", "most that shuffled rows reach"):
        assert words in reader.text
    order = ["What was found", "Gap closed", "Behaviour", "Layer by layer", "Along the answer", "What the models say"]
    order += ["Norms and outlier dimensions", "How this was measured", "How to rerun this"]
    places = [reader.text.rindex(title) for title in order]
    assert places == sorted(places)
    assert reader.tags.count("rect") >= 2 * 30 * 30


def test_sentences_show_the_numbers_that_they_rest_on() -> None:
    diagnosis = made_diagnosis()
    page = diagnosis_page(diagnosis)
    attributes = dict.fromkeys(value for name, value in Reader(html(page)).attributes if name == "title")
    assert any("/others/0/behaviour/kl: 0.62" in value for value in attributes)
    findings: list[Any] = list(page.sections[0].blocks)
    assert len(findings) == 2
    for finding in findings:
        for sentence in (*finding.sentences, finding.advice):
            for pointer, said in sentence.rests_on:
                assert value_text(resolve(diagnosis, pointer)) == said


def test_every_figure_says_what_to_see_and_how_it_was_measured() -> None:
    for page in (diagnosis_page(made_diagnosis()), diagnosis_page(made_diagnosis(1))):
        figures = [b for section in page.sections for b in section.blocks if isinstance(b, Figure)]
        assert len(figures) >= 4
        assert all(figure.see.endswith(".") and figure.measured.endswith(".") for figure in figures)


@pytest.mark.parametrize("bad", [BAD, '"><img src=x onerror=alert(1)>', "</style></title><b>", "{{ 7*7 }}{% raw %}"])
def test_nothing_is_unescaped(bad: str) -> None:
    diagnosis = everywhere(made_diagnosis(), bad)
    for student in (diagnosis, *diagnosis["others"]):
        student["name"] = bad + student["name"]
        if student["compared_with"]:
            student["compared_with"]["name"] = bad + "int3-g64"
        student["sites"] = {bad: {"layers": student["layers"], "null_max": 0.05}}
    page = diagnosis_page(diagnosis)
    reader = check_page(html(page))
    assert reader.text.count(bad) > 20
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown(page), flags=re.S | re.M)
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\[|(?<!\\)!\[", outside)


def test_a_large_diagnosis_stays_small() -> None:
    many = made_diagnosis(3, layers=30, positions=512)
    assert len(html(diagnosis_page(many)).encode()) < 2_000_000
    deep = made_diagnosis(4, layers=80)
    assert len(html(diagnosis_page(deep)).encode()) < 2_000_000


def test_markdown_and_json_have_the_figures(tmp_path: Path) -> None:
    diagnosis = made_diagnosis()
    write_diagnosis_report(tmp_path, diagnosis)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for student in (diagnosis, *diagnosis["others"]):
        assert student["sentences"][1]["text"] in text
        for layer in student["layers"]:
            assert f"{layer['cka']:.3f} ({layer['cka_low']:.3f} to {layer['cka_high']:.3f})" in text
    for figure in ("75%", "72% to 78%", "2.500", "0.620", "`/others/0/behaviour/kl`"):
        assert figure in text
    assert all(len(set(map(len, table))) == 1 for table in tables(text))
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["sections"][0]["title"] == "What was found"
    charts = [c["kind"] for s in content["sections"] for b in s["blocks"] for c in b.get("charts", [])]
    assert {"lines", "forest", "heatmap", "scatter"} <= set(charts)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table."""
    blocks: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        if line.startswith("|"):
            blocks[-1].append(re.split(r"(?<!\\)\|", line))
        elif blocks[-1]:
            blocks.append([])
    return [table for table in blocks if table]


def test_numbers_that_are_not_there() -> None:
    """JSON's null stands for what is not finite."""
    diagnosis = made_diagnosis(2, layers=6)
    for student in (diagnosis, *diagnosis["others"]):
        for key in ("cka", "cka_low", "cka_high", "l2", "procrustes", "knn", "rerun", "random"):
            student["layers"][2][key] = None
        student["grid"][1][1] = None
        student["norms"]["student"][0]["top_dimension_share"] = None
        student["behaviour"]["kl_95"] = None
        student["null_max"] = None
    pair = diagnosis["others"][0]["compared_with"]
    pair["gap_closed_kl"] = pair["gap_closed_kl_95"] = pair["layers"][1]["change"] = None
    pair["layers"][1]["low"] = pair["layers"][1]["high"] = None
    page = diagnosis_page(diagnosis)
    reader = check_page(html(page))
    assert "None" not in reader.text + markdown(page)
    assert "nan" not in reader.text


@pytest.mark.parametrize("empty", ["positions", "stretches", "samples", "token_kl"])
def test_parts_that_are_empty(empty: str) -> None:
    diagnosis = made_diagnosis(2, layers=6)
    for student in (diagnosis, *diagnosis["others"]):
        student[empty] = []
    check_page(html(diagnosis_page(diagnosis)))


def test_one_student_alone_and_further_sites() -> None:
    diagnosis = made_diagnosis(1, layers=4)
    diagnosis["sites"] = {"attention": {"layers": diagnosis["layers"], "null_max": 0.05}}
    diagnosis["warnings"] = ["12 rows: below 256 the estimates are noisy"]
    reader = check_page(html(diagnosis_page(diagnosis)))
    assert "CKA of the attention outputs" in reader.text
    assert "Warning: 12 rows" in reader.text
    assert "Gap closed" not in reader.text
    assert "Recovery against alignment" not in reader.text


def test_a_student_with_fewer_layers_is_drawn_at_the_reference_s() -> None:
    diagnosis = made_diagnosis(3, layers=12)
    pruned = diagnosis["others"][1]
    assert len(pruned["layers"]) == 7
    text = html(diagnosis_page(diagnosis))
    assert f"layer 3 (the reference&#39;s {pruned['layer_map'][3]})" in text


CHANGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda d: None, "remend diagnose --reference smollm2 --out NEW_DIRECTORY"),
    (
        lambda d: d["environment"].update(command=["python", "study.py"]),
        "remend diagnose --reference smollm2 --student /models/int3-g64 --student /models/recovered --rows 256 "
        "--max-new-tokens 32 --seed 0 --out NEW_DIRECTORY",
    ),
    (
        lambda d: d["environment"].update(command=["x/remend", "diagnose", "--student", "a b", "--out=old"]),
        "remend diagnose --student 'a b' --out=NEW_DIRECTORY",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_command_to_rerun(change: Callable[[dict[str, Any]], None], expected: str) -> None:
    diagnosis = made_diagnosis(2, layers=4)
    change(diagnosis)
    assert command(diagnosis) == expected


def test_resolve_follows_rfc_6901() -> None:
    data = {"a/b": {"~": [1, {"c": None}]}, "": 3}
    assert resolve(data, "") is data
    assert resolve(data, "/a~1b/~0/0") == 1
    assert resolve(data, "/a~1b/~0/1/c") is None
    assert resolve(data, "/") == 3
    for wrong in ("/none", "/a~1b/~0/7", "/a~1b/~0/x", "/a~1b/~0/0/0"):
        with pytest.raises(LookupError):
            resolve(data, wrong)


def test_words_that_differ_are_marked_and_the_text_is_whole() -> None:
    reference, text = "The cat sat on the mat.\n\nIt slept.", "The dog sat on  a mat.\n\nIt slept …"
    said = marked(text, reference)
    assert "".join(piece.text for piece in said.pieces) == text
    assert [piece.text for piece in said.pieces if piece.css == "differs"] == ["dog", "a", "slept …"]
    assert said.note == "5 of 9 words are the reference's, in its order"
    assert "".join(words_of("  a  b\n")) == "  a  b\n"
    assert [p.css for p in marked("same words", "same words").pieces] == [""]
    assert marked("   ", reference).pieces[0].text == "(nothing)"
    assert marked("said", "").pieces[0].css == ""


def test_tokens_are_coloured_by_kl() -> None:
    assert [level(kl) for kl in (0.0, 0.05, 0.3, 1.0, 2.5, None)] == ["k0", "k1", "k2", "k3", "k4", "k0"]
    said = coloured([{"text": " a", "kl": 0.01, "rank": 0}, {"text": "b", "kl": 3.0, "rank": 1}])
    assert [p.css for p in said.pieces] == ["k0", "k4"]
    assert said.pieces[1].title == "KL 3.000 nats; it puts 1 other token before this one"
    assert said.note == "1 of 2 tokens are this model's first choice too"
