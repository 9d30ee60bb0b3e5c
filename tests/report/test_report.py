"""remend report: one path, several paths, and what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from helpers.made_reports import made_diagnosis, made_run, write_diagnosis
from helpers.pages import check_page
from remend.errors import FileError, InputError
from remend.report import report
from remend.report.comparison import flat


def test_one_run_is_written_anew(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    assert report([str(path)]) == path / "report.html"
    pages = {name: (path / name).read_text() for name in ("report.html", "report.md", "report.json")}
    (path / "report.html").write_text("old")
    report([path])
    assert {name: (path / name).read_text() for name in pages} == pages


def test_one_diagnosis_is_written_anew_or_elsewhere(tmp_path: Path) -> None:
    path = write_diagnosis(tmp_path / "diagnosis", made_diagnosis(2, layers=4))
    assert report([path]) == path / "report.html"
    assert report([path], tmp_path / "elsewhere") == tmp_path / "elsewhere" / "report.html"
    pages = [(place / "report.html").read_text() for place in (path, tmp_path / "elsewhere")]
    assert pages[0] == pages[1]


def test_several_are_compared(tmp_path: Path) -> None:
    first = made_run(tmp_path / "a" / "run", track=True)
    second = made_run(tmp_path / "b" / "run", student="<b>x|`y`", learning_rate=1e-4, ema={"rate": 0.1, "every": 1})
    diagnosis = write_diagnosis(tmp_path / "diagnosis", made_diagnosis(2, layers=6))
    out = tmp_path / "compared"
    assert report([first, second, diagnosis], out) == out / "report.html"
    reader = check_page((out / "report.html").read_text(encoding="utf-8"))
    for words in (
        "Comparison of 2 recoveries and 1 diagnosis",
        "Most of the KL gap is closed by diagnosis: recovered, from int3-g64: 75% (72% to 78%).",
        "a/run",
        "b/run",
        "64% (61% to 67%)",
        "75% (72% to 78%)",
        "CKA with the reference, by layer",
        "Recovery against alignment",
        "ema.rate",
        "learning_rate",
        f"remend report {first} {second} {diagnosis} --out NEW_DIRECTORY",
    ):
        assert words in reader.text, words
    assert "ema.every" not in reader.text  # the same in both
    assert "Warning" not in reader.text
    text = (out / "report.md").read_text(encoding="utf-8")
    assert r"&lt;b&gt;x\|\`y\`" in text
    assert "| a/run | 64% | 61% to 67% |" in text
    assert json.loads((out / "report.json").read_text())["title"].startswith("Comparison of")


def test_runs_alone_and_diagnoses_alone(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name) for name in ("one", "two")]
    reader = check_page(report(runs, tmp_path / "runs").read_text(encoding="utf-8"))
    assert "The recipes are the same but for where they write." in reader.text
    assert "Diagnosed models" not in reader.text
    diagnoses = [write_diagnosis(tmp_path / name, made_diagnosis(2, layers=4)) for name in ("three", "four")]
    reader = check_page(report(diagnoses, tmp_path / "diagnoses").read_text(encoding="utf-8"))
    assert "three: int3-g64" in reader.text
    assert "How the recipes differ" not in reader.text


def test_what_can_not_be_compared_is_said(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name) for name in ("one", "two")]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["data"]["held_out"], manifest["models"]["teacher"] = "other", {"model.gguf": "other"}
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    other = made_diagnosis(1, layers=4)
    other["data_hash"] = "other"
    diagnoses = [
        write_diagnosis(tmp_path / "three", made_diagnosis(1, layers=4)),
        write_diagnosis(tmp_path / "four", other),
    ]
    text = check_page(report([*runs, *diagnoses], tmp_path / "out").read_text(encoding="utf-8")).text
    assert "the runs have different held-out prompts" in text
    assert "the runs have different references" in text
    assert "the diagnoses have different prompts" in text


def test_what_is_refused(tmp_path: Path) -> None:
    run, diagnosis = made_run(tmp_path / "run"), write_diagnosis(tmp_path / "diagnosis", made_diagnosis(1, layers=4))
    with pytest.raises(InputError, match=r"no path is given; name at least one"):
        report([])
    with pytest.raises(InputError, match=r"2 paths are given and no out.*--out"):
        report([run, diagnosis])
    with pytest.raises(InputError, match="given twice"):
        report([run, tmp_path / "diagnosis" / ".." / "run"], tmp_path / "out")
    with pytest.raises(InputError, match=r"out .*run holds another run"):
        report([run, diagnosis], run)
    with pytest.raises(InputError, match=r"out .*diagnosis is not empty; name a new directory"):
        report([run], diagnosis)
    (tmp_path / "empty").mkdir()
    for wrong, reason in (("empty", "is neither a recovery nor a diagnosis"), ("none", "is no directory")):
        with pytest.raises(InputError, match=rf"{reason}.*manifest\.json.*recipe\.yaml.*diagnosis\.json.*--out"):
            report([tmp_path / wrong])
    (run / "summary.json").unlink()
    with pytest.raises(InputError, match=r"not complete.*remend recover --resume"):
        report([run])
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    path = write_diagnosis(tmp_path / "diagnosis", made_diagnosis(1, layers=4))
    (path / "diagnosis.json").write_text("[1, 2")
    with pytest.raises(FileError, match=r"diagnosis\.json can't be read"):
        report([path])
    (path / "diagnosis.json").write_text("[1, 2]")
    with pytest.raises(FileError, match=r"it holds a list, and an object belongs there"):
        report([path])
    (path / "diagnosis.json").write_text(json.dumps({"name": "from before"}))
    with pytest.raises(FileError, match=r"it lacks '\w+'.* is of another version; make it anew"):
        report([path])


def test_flat_recipes() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {}}, "e": None}) == {"a": 1, "b.c": 2, "b.d": {}, "e": None}


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "track.jsonl", "metrics.jsonl", "held_out.jsonl"])
@pytest.mark.parametrize(
    "content", [b"[1]\n", b'{"step": "x"}\n', b'{"degraded": {"kl": "x"}}\n', b"\xff\n", b"null\n"]
)
def test_damaged_files_of_a_run(name: str, content: bytes, tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / name).write_bytes(content)
    with contextlib.suppress(FileError, InputError):  # a file that the page does without may be anything
        report([path])
