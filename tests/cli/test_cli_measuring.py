"""diagnose, track, report and compare on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from remend.recovery.job import recover


def test_diagnose_prints_severity_and_the_worst_layers(
    run: Any, reference_dir: Path, student_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    words = ("--reference", reference_dir, "--student", student_dir, "--data", prompt_file, "--max-new-tokens", 8)
    code, out, _ = run("diagnose", *words, "--device", "cpu", "--out", tmp_path / "found")
    assert code == 0
    found = json.loads((tmp_path / "found" / "diagnosis.json").read_text())
    assert f"student: {found['severity']}" in out
    assert f"{found['layers'][found['ranking'][0]]['cka']:.3f}" in out
    next_line = f"remend recover --student {student_dir} --teacher {reference_dir} --out {student_dir}-recovered"
    assert (next_line in out) == found["recommendation"]["text"].startswith("Recover it")
    assert f"open {tmp_path / 'found'}/report.html" in out
    code, _, err = run("diagnose", *words, "--device", "cpu", "--out", tmp_path / "found")
    assert code == 2
    assert err.startswith("error: ")
    code, _, err = run("diagnose", *words, "--layer-map", "0,x", "--out", tmp_path / "other")
    assert (code, "no list of numbers" in err) == (2, True)
    code, out, _ = run("report", tmp_path / "found")
    assert code == 0
    assert "report.html" in out


def test_track_prints_a_line_a_checkpoint(run: Any, recipe: dict[str, Any]) -> None:
    result = recover(**{**recipe, "held_out": 12, "keep_checkpoints": 4})
    code, out, _ = run("track", result.out)
    assert code == 0
    assert [out.count(word) for word in ("degraded", "training", "recovered")] == [1, 2, 1]
    code, out, _ = run("correlate", result.out, "--permutations", 50, "--out", result.out.parent / "related")
    assert code == 0
    assert "recovery" in out
    assert (result.out.parent / "related" / "correlation.json").is_file()
    code, _, err = run("track", result.out / "model")
    assert (code, "no remend run" in err) == (2, True)


def test_compare_of_identical_results(run: Any, tmp_path: Path) -> None:
    rows = [{"id": str(i), "correct": i % 3 == 0} for i in range(30)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"task": "science", "grader": "paper", "items": rows}))
    code, out, _ = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "c.md")
    assert code == 0
    assert "identical: not distinguishable" in " ".join(out.split())
    assert (tmp_path / "c.md").is_file()
    code, _, err = run("compare", tmp_path / "a.json")
    assert (code, err.startswith("error: ")) == (2, True)
    before = (tmp_path / "a.json").read_bytes()
    code, out, err = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "a.json")
    assert (code, out, "is there already and is left as it is" in err) == (2, "", True)
    assert (tmp_path / "a.json").read_bytes() == before
    code, out, err = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "c.txt")
    assert (code, out, 'ends in ".txt"' in err) == (2, "", True)  # said before anything is counted
