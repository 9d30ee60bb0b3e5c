"""A small study end to end: it goes on where it was, a failing cell stops nothing, and its files say what came out."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny import prompts
from remend import cli
from remend.errors import FileError, InputError
from remend.files.atomic import write_json
from remend.files.reading import read_object
from remend.files.run_directory import SUMMARY
from remend.report import report
from remend.report.study import study_page
from remend.report.writing import write_page
from remend.studies.cell import OUTCOME
from remend.studies.made import make
from remend.studies.plan import read_study
from remend.studies.results import read_at
from remend.studies.study import lines, study
from remend.studies.work import Job, failure_of, run_jobs
from remend.training.teachers.cache import RECORD

BROKEN = {"how": "on-policy", "recipe": {"lora": {"rank": 2, "targets": ["no_such_layer"]}}}


def lines_of(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def write(tmp_path: Path, reference_dir: Path) -> Any:
    """Writes a study of a degradation and three methods, the last of which fails."""
    rows = [
        {"prompt": f"{p}\nA: tea\nB: rain", "demonstration": "AB"[i % 2], "answer": "AB"[i % 2]}
        for i, p in enumerate(prompts(20))
    ]
    train, held_out = lines_of(tmp_path / "task.jsonl", rows[8:]), lines_of(tmp_path / "rest.jsonl", rows[:8])
    general = lines_of(tmp_path / "general.jsonl", [{"prompt": p, "completion": "Tea."} for p in prompts(40)])
    values: dict[str, Any] = {
        "model": str(reference_dir),
        "degradations": {"int3": {"kind": "quantize", "format": "int3-g64"}},
        "methods": {"none": "none", "sdft": "on-policy", "broken": BROKEN},
        "tasks": {"science": {"train": train, "held_out": held_out, "options": {"max_new_tokens": 4}}},
        "data": {"train": general, "rows": 6},
        "seeds": [0],
        "budget": {"tokens": 100},
        "measurements": 2,
        "recipe": {"batch_size": 4, "max_new_tokens": 8, "learning_rate": 1e-3, "device": "cpu", "dtype": "float32"},
        "one_process": True,
        "keep_models": False,
    }

    def written(**changes: Any) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
        return path

    return written


def times(out: Path) -> dict[str, int]:
    """When each cell was finished."""
    return {str(p.parent.relative_to(out / "cells")): p.stat().st_mtime_ns for p in out.glob(f"cells/*/*/*/{OUTCOME}")}


def states(results: dict[str, Any]) -> dict[str, str]:
    return {cell["name"]: cell["state"] for cell in results["cells"]}


def test_a_study_goes_on_and_failures_stop_nothing(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    results = study(write(), out, only="int3/none")
    assert states(results) == {"int3/none/0": "done", "int3/sdft/0": "not run", "int3/broken/0": "not run"}
    begun = times(out)

    results = study(write(), out)
    assert list(results["failures"]) == ["int3/broken/0"]
    assert "no_such_layer" in results["failures"]["int3/broken/0"]
    assert list(times(out)) == ["int3/none/0", "int3/sdft/0"]
    assert times(out)["int3/none/0"] == begun["int3/none/0"]
    assert [row["method"] for row in results["rows"]] == ["none", "sdft"]
    ran = times(out)

    # an unchanged cell is not run again, a changed one is, and one that failed is tried again
    results = study(write(methods={"none": "none", "sdft": "on-policy", "broken": "sft"}), out)
    assert results["failures"] == {}
    assert set(states(results).values()) == {"done"}
    assert {name: when for name, when in times(out).items() if name in ran} == ran

    # nor is one that another version of remend wrote, with keys that are gone and without those that are newer
    record = out / "cells/int3/sdft/0/inputs/cell.json"
    inputs = read_object(record)
    recipe = inputs["training"]["recipe"]
    assert not {"loss", "repair_samples"} & set(recipe), "what the study does not say settles nothing"
    recipe |= {"weight_decay": 0.0, "scales": "fixed", "importance_clip": None}
    write_json(record, inputs)
    study(write(methods={"none": "none", "sdft": "on-policy", "broken": "sft"}), out)
    assert {name: when for name, when in times(out).items() if name in ran} == ran
    changed = {"none": "none", "sdft": {"how": "on-policy", "recipe": {"learning_rate": 2e-3}}}
    study(write(methods=changed), out)
    assert times(out)["int3/none/0"] == ran["int3/none/0"]
    assert times(out)["int3/sdft/0"] > ran["int3/sdft/0"]

    # a cell that was stopped while it was graded is not trained again
    place = out / "cells" / "int3" / "none" / "0"
    summary = (place / SUMMARY).stat().st_mtime_ns
    (place / OUTCOME).unlink()
    monkeypatch.setattr("remend.studies.cell.grade", lambda *_, **__: None)
    study(write(methods=changed), out)
    assert (place / SUMMARY).stat().st_mtime_ns == summary
    assert (place / OUTCOME).is_file()


def test_a_new_benchmark_leaves_finished_cells_as_they_are(write: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = {"none": "none", "sft": "sft"}
    study(write(methods=methods), out)
    ran = times(out)
    held_out = lines_of(
        tmp_path / "more.jsonl", [{"prompt": f"{p}\nA: tea\nB: rain", "answer": "A"} for p in prompts(4)]
    )
    more = write(
        methods=methods, benchmarks={"science-short": {"held_out": held_out, "options": {"max_new_tokens": 2}}}
    )
    dry = study(more, out, dry_run=True)
    assert dry["total"]["done"] == 2  # as the run will have it
    results = study(more, out)
    assert times(out) == ran
    assert results["failures"] == {}
    assert [row["not_graded"] for row in results["rows"]] == [["science-short"]] * 2
    assert [[grade["name"] for grade in row["grades"]] for row in results["rows"]] == [["science"]] * 2
    assert any("not graded on science-short" in line for line in lines(results))
    assert "not graded on science-short" in (out / "report.html").read_text()
    # another recipe is another cell, and the dry run knows it
    dry = study(
        write(methods={"none": "none", "sft": {"how": "sft", "recipe": {"learning_rate": 2e-3}}}), out, dry_run=True
    )
    assert [cell["done"] for cell in dry["cells"]] == [True, False]


def test_kept_models_are_graded_on_a_new_benchmark(write: Any, tmp_path: Path) -> None:
    out, methods = tmp_path / "out", {"none": "none", "sft": "sft"}
    study(write(methods=methods, keep_models=True), out)
    place = out / "cells" / "int3" / "sft" / "0"
    trained = (place / SUMMARY).stat().st_mtime_ns
    held_out = lines_of(
        tmp_path / "more.jsonl", [{"prompt": f"{p}\nA: tea\nB: rain", "answer": "A"} for p in prompts(4)]
    )
    benchmarks = {"science-short": {"held_out": held_out, "options": {"max_new_tokens": 2}}}
    results = study(write(methods=methods, keep_models=True, benchmarks=benchmarks), out)
    assert (place / SUMMARY).stat().st_mtime_ns == trained
    assert [[grade["name"] for grade in row["grades"]] for row in results["rows"]] == [["science", "science-short"]] * 2


def test_every_how_runs(write: Any, tmp_path: Path) -> None:
    hows = ["sft", "sft-teacher", "off-policy", "on-policy", "on-policy+bootstrap", "on-policy+repair", "on-policy+cka"]
    methods: dict[str, Any] = {"none": "none", **{how.replace("+", "-"): how for how in hows}}
    methods["on-policy-repair"] = {"how": "on-policy+repair", "recipe": {"repair_samples": 6}}
    results = study(write(methods=methods, budget={"tokens": 40}, measurements=1), tmp_path / "out")
    assert results["failures"] == {}
    rows = {row["how"]: row for row in results["rows"]}
    assert list(rows) == ["none", *hows]
    for how, row in rows.items():
        assert (row["steps"][0] >= 1) == (how != "none"), how
        assert (row["training_seconds_of"]["repair"][0] > 0) == ("repair" in how), how
        (grade,) = row["grades"]
        assert grade["scores"]["recovered"]["method"] == "Wilson"
        assert "minimum_detectable_effect" in grade["change"]
    labels = tmp_path / "out/cells/int3/sft/0/inputs/labels"
    record = read_object(labels / RECORD)
    (shard,) = record["shards"]
    assert shard["sha256"] == hashlib.sha256((labels / shard["file"]).read_bytes()).hexdigest()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "loss won back" not in page.lower()  # no loss, nothing to say in a column of its own
    grade["gap"] = {"value": 0.5, "interval": [0.25, 0.75]}
    assert "50% (25% to 75%)" in write_page(tmp_path, study_page(results)).read_text()
    for text in ("detectable", "Intervals of scores: Wilson; of changes: Bonett-Price"):
        assert text in page
    for note in results["correlation"]["notes"]:
        assert html.escape(note, quote=False) in page or html.escape(note) in page
    (line, *_) = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    assert line["interval_method"] == "Wilson"
    assert {"can_show", "task_gap_closed", "task_gap_closed_low", "difference_method", "not_graded"} <= set(line)


def test_every_kind_of_degradation_makes_a_student_once(write: Any, tmp_path: Path) -> None:
    """A kind that learns takes the task's rows; `width` is one of the kinds."""
    out = tmp_path / "out"
    degradations = {
        "narrow": {"kind": "width", "ffn": 0.5, "samples": 2},
        "flat": {"kind": "depth", "layers": [1]},
        "tuned": {"kind": "finetune", "steps": 1, "lora": {"rank": 2}},
    }
    path = write(degradations=degradations, methods={"none": "none"})
    assert study(path, out)["failures"] == {}
    records = {name: read_object(out / "students" / name / "degradation.json") for name in degradations}
    assert [record["method"] for record in records.values()] == ["width", "depth:list", "lora"]
    assert records["tuned"]["data"]["rows"] == 12
    inputs = read_object(out / "students" / "tuned.json")["degradation"]
    settled = "kind data steps epochs learning_rate batch_size gradient_accumulation max_tokens lora seed"
    assert set(inputs) == set(settled.split())  # as every version had it, so that old students are not made anew
    assert inputs["lora"] == {"rank": 2}
    made = [(out / "students" / name / "degradation.json").stat().st_mtime_ns for name in degradations]
    study(path, out)
    assert [(out / "students" / name / "degradation.json").stat().st_mtime_ns for name in degradations] == made


def test_a_degradation_stands_on_another(write: Any, tmp_path: Path) -> None:
    """Fine-tuned, then quantized: the fine-tuned model is the reference, of the grades too; base can be the teacher."""
    out = tmp_path / "out"
    degradations = {
        "packed": {"kind": "quantize", "format": "int3-g64", "on": "tuned"},
        "tuned": {"kind": "finetune", "steps": 2, "batch_size": 4},
    }
    methods = {
        "none": "none",
        "repair": "repair",
        "from-base": {"how": "on-policy+repair", "teacher": "base"},
        "sdft": "on-policy+repair",
    }
    path = write(degradations=degradations, methods=methods)
    results = study(path, out, only="packed")
    assert results["failures"] == {}
    assert (
        read_object(out / "students" / "packed.json")["model"] != read_object(out / "students" / "tuned.json")["model"]
    )
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == set(methods)
    assert rows["repair"]["steps"] == [0]
    assert rows["repair"]["kl"]["recovered"] < rows["repair"]["kl"]["degraded"]
    assert not any(entry["method"] == "repair" for equal in results["at_equal_tokens"] for entry in equal["methods"])
    graded = read_object(out / "reference-students" / "tuned" / "science.json")
    assert rows["none"]["grades"][0]["scores"]["reference"]["score"] == graded["score"]
    streams = {
        name: read_object(out / "cells" / "packed" / name / "0" / "manifest.json")["recipe"]["streams"]
        for name in ("sdft", "from-base")
    }
    assert [streams[name]["recover"]["teacher"] for name in streams] == [None, read_study(path).models["model"].path]
    for name in streams:
        manifest = read_object(out / "cells" / "packed" / name / "0" / "manifest.json")
        assert manifest["reference"] == str(out / "students" / "tuned")
    before = times(out)
    assert study(path, out, only="packed")["failures"] == {}
    assert times(out) == before


def test_finished_cells_are_taken_over_without_their_weights(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(methods={"none": "none", "repair": "repair", "sdft": "on-policy"}, seeds=[0])
    first = study(path, tmp_path / "here")
    records = tmp_path / "here" / "records"
    assert sorted(file.name for file in records.iterdir()) == [
        "int3--none--0.json",
        "int3--repair--0.json",
        "int3--sdft--0.json",
    ]
    assert all(file.stat().st_size < 30_000 for file in records.iterdir())

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("something was run again")

    with monkeypatch.context() as patch:
        patch.setattr("remend.studies.study.run_jobs", lambda out, jobs, **more: refuse() if jobs else ())
        second = study(path, tmp_path / "there", records=records)
        again = study(path, tmp_path / "there")
    assert not list((tmp_path / "there").rglob("*.safetensors"))
    for other in (second, again):
        assert states(other) == states(first)
        for key in ("rows", "at_equal_tokens", "at_equal_seconds"):
            assert json.loads(json.dumps(other[key])) == json.loads(json.dumps(first[key])), key
    changed = write(methods={"none": "none", "repair": "repair", "sdft": {"how": "on-policy", "recipe": {"beta": 1}}})
    capsys.readouterr()
    third = study(changed, tmp_path / "elsewhere", records=records)
    assert third["failures"] == {}
    assert "is of other settings or data, and its cell is run" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "elsewhere" / "cells" / "int3" / "sdft" / "0" / "summary.json").is_file()
    assert not (tmp_path / "elsewhere" / "cells" / "int3" / "repair" / "0" / "summary.json").is_file()


def test_a_record_that_changed_is_refused(write: Any, tmp_path: Path) -> None:
    path = write(methods={"none": "none"})
    study(path, tmp_path / "here")
    (record,) = (tmp_path / "here" / "records").iterdir()
    record.write_text(record.read_text().replace('"tokens":', '"tokens": 1', 1))
    with pytest.raises((InputError, FileError), match=r"int3--none--0\.json"):
        study(path, tmp_path / "there", records=record.parent)
    with pytest.raises(InputError, match="is no folder"):
        study(path, tmp_path / "other", records=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degradations": {"a": {"kind": "depth", "layers": 1, "on": "b"}}}, 'on "b" is no degradation'),
        (
            {
                "degradations": {
                    "a": {"kind": "depth", "layers": 1, "on": "b"},
                    "b": {"kind": "quantize", "format": "int3-g64", "on": "a"},
                }
            },
            "degradations.a stands on itself: a on b on a",
        ),
        ({"methods": {"none": "none", "x": "repair+cka"}}, "repair takes no step, so it takes no additions"),
        ({"methods": {"none": "none", "x": {"how": "sft", "teacher": "base"}}}, "sft learns from no distribution"),
    ],
)
def test_studies_that_stand_on_nothing_are_refused(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_study(write(**changes))


def test_bare_letters_are_trained_on_in_their_tags(write: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{p}\nA: tea\nB: rain", "answer": "AB"[i % 2]} for i, p in enumerate(prompts(20))]
    bare = lines_of(tmp_path / "bare.jsonl", rows[8:])
    held_out = lines_of(tmp_path / "bare-rest.jsonl", rows[:8])
    path = write(tasks={"science": {"train": bare, "held_out": held_out}})
    made = make(read_study(path), tmp_path / "out")
    learned = [json.loads(line) for line in (made.tasks["science"].train or Path()).read_text().splitlines()]
    assert learned[0]["demonstration"] == f"<answer>\n{learned[0]['answer']}\n</answer>"
    given = make(read_study(write()), tmp_path / "other").tasks["science"].train or Path()
    assert json.loads(given.read_text().splitlines()[0])["demonstration"] in ("A", "B")  # as it was written


def test_files_and_verb(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def remend(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["remend", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().out

    code, said = remend("study", write(), "--out", out, "--dry-run")
    assert (code, out.exists()) == (0, False)
    assert "3 cells, 2 of them trained, 0 done before" in said
    code, said = remend("study", write(), "--out", out)
    assert code == 1  # a cell failed
    assert remend("study", write(), "--out", out, "--only", "int3/sdft")[0] == 0  # and not one that was asked for
    assert remend("study", write(), "--out", out, "--only", "int3/broken")[0] == 1
    assert "failed: int3/broken/0: " in said
    assert "2 of 3 cells are done, 1 failed" in said
    results = read_object(out / "results.json")
    row = results["rows"][1]
    assert row["tokens_trained"][0] == pytest.approx(100, rel=0.5)
    assert len(row["gap_closed_95"]) == 2
    assert [grade["name"] for grade in row["grades"]] == ["science"]
    assert row["grades"][0]["n"] == 8
    assert results["correlation"]["checkpoints"] >= 3
    assert "p_value" in results["correlation"]["overall"]["within"]["spearman"]
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [line["method"] for line in table] == ["none", "sdft"]
    assert float(table[1]["gap_closed"]) == row["gap_closed"]
    page = (out / "report.html").read_text()
    for title in ("Degraded and recovered", "Task against general ability", "At the same trained tokens",
                  "At the same seconds", "CKA against recovery", "Cost", "Failed"):  # fmt: skip
        assert f">{title}</h2>" in page, title
    (out / "report.html").unlink()
    assert report([out]).read_text() == page
    assert not (out / "cells/int3/sdft/0/model").exists()  # keep_models: false
    code, said = remend("study", write(), "--out", out, "--dry-run")
    assert "3 cells, 2 of them trained, 2 done before" in said


def test_a_job_that_fails_leaves_its_message(tmp_path: Path) -> None:
    wrong = {"model": str(tmp_path / "nowhere"), "folder": str(tmp_path), "inputs": {}}
    job = Job("reference/a", "grade", {**wrong, "grading": [{"task": "general", "data": None, "options": {}}]})
    ((_, message),) = run_jobs(tmp_path, [job], processes=2, shared=False)  # in a process of its own
    assert message is not None
    assert "nowhere" in message
    assert failure_of(tmp_path, "reference/a") == message
    broken = Job("reference/b", "grade", {**wrong, "grading": None})
    assert [str(said)[:11] for _, said in run_jobs(tmp_path, [broken], processes=1, shared=True)] == ["TypeError: "]


def test_reading_a_course_at_equal_spending() -> None:
    start = [{"step": 0, "tokens": 0, "seconds": 0.0, "kl": 2.0}, {"step": 0, "tokens": 0, "seconds": 3.0, "kl": 1.0}]
    curve = [*start, {"step": 2, "tokens": 100, "seconds": 5.0, "kl": 0.6}]
    assert read_at(curve, "tokens", 50) == pytest.approx(0.8)
    assert read_at(curve, "tokens", 500) == 0.6
    assert [read_at(curve, "seconds", at) for at in (0.0, 2.9, 3.0)] == [2.0, 2.0, 1.0]  # a repair works when done
    assert read_at(curve, "seconds", 4.0) == pytest.approx(0.8)
