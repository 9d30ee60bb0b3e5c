"""remend eval on the tiny model: what its results say, that they don't hang on batches, and that it goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from helpers.task_rows import letter_rows, tool_rows, write
from remend.data import tasks
from remend.data.templates import Encoded
from remend.errors import FileError, InputError
from remend.evaluation import job as evaluation_job
from remend.evaluation.compare import compare
from remend.evaluation.job import evaluate
from remend.maths.paired import wilson
from remend.models import adapters
from remend.models.sampling.rollout import Rollout

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "device": "cpu"}


@pytest.fixture
def tools(tmp_path: Path) -> str:
    return write(tmp_path / "tools.jsonl", tool_rows(10))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write(tmp_path / "questions.jsonl", letter_rows(10))


@pytest.fixture
def tooluse(reference_dir: Path, tools: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates the tiny model on the tool-use rows, into the file of that name."""

    def run(name: str = "results", **changes: Any) -> dict[str, Any]:
        settings = {"data": tools, **OPTIONS, **changes}
        return evaluate(str(reference_dir), ["tooluse"], tmp_path / name / "results.json", **settings)

    return run


def texts(found: dict[str, Any]) -> list[str]:
    return [item["answer"] for item in found["items"]]


def test_of_a_runs_directory_its_adapter_is_graded(reference_dir: Path, tools: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    adapters.add_lora(model, rank=2, base=str(reference_dir))
    adapters.save_adapter(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "manifest.json").write_text('{"recipe": {}}')
    found = evaluate(str(tmp_path / "run"), ["tooluse"], tmp_path / "results.json", data=tools, **OPTIONS)
    assert "adapter_model.safetensors" in found["files"]


def test_results_hold_every_answer_with_its_grade(
    tooluse: Callable[..., dict[str, Any]], tmp_path: Path, reference_dir: Path
) -> None:
    found = tooluse()
    assert found == json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert (found["task"], found["grader"], found["how"], found["n"]) == ("tooluse", "paper", "generate", 10)
    assert found["score"] == sum(item["correct"] for item in found["items"]) / 10
    assert set(found["items"][0]) == {"id", "correct", "reason", "answer", "tokens", "clipped"}
    rows = tool_rows(10)
    assert [item["id"] for item in found["items"]] == [tasks.row_id(row) for row in rows]
    for item, row in zip(found["items"], rows, strict=True):
        grade = tasks.get("tooluse").grade(item["answer"], row)
        assert (item["correct"], item["reason"]) == (grade.correct, grade.reason)
        assert 1 <= item["tokens"] <= 12
    assert found["model"] == str(reference_dir)
    assert "model.safetensors" in found["files"]
    assert found["data"]["tooluse"]["rows"] == 10
    assert found["settings"]["answers"]["tooluse"]["max_new_tokens"] == 12
    assert found["clipped"] == sum(item["clipped"] for item in found["items"])
    assert any("met the limit of 12 tokens" in w for w in found["warnings"]) == bool(found["clipped"])
    assert found["environment"]["versions"]["torch"]
    assert tuple(found["interval_95"]) == wilson(round(10 * found["score"]), 10)
    assert found["interval_method"] == "Wilson"


def test_the_answers_are_the_same_in_batches_of_other_sizes(tooluse: Callable[..., dict[str, Any]]) -> None:
    """But for near ties, and none is among these."""
    for samples in (1, 2):
        found = [tooluse(f"{samples}-{rows}", batch_rows=rows, samples=samples)["items"] for rows in (1, 3, 8)]
        assert found[0] == found[1] == found[2]


class Shapely:
    """An engine whose answers hang on the batch, as a near tie does: on its size, and on a row's place in it."""

    def __init__(self, stop_at: int = 0) -> None:
        self.sizes: list[int] = []
        self.stop_at = stop_at

    def __call__(self, prompts: Sequence[Encoded], **_: Any) -> list[Rollout]:
        self.sizes.append(len(prompts))
        if len(self.sizes) == self.stop_at:
            raise KeyboardInterrupt
        return [Rollout(p.id, p.tokens, (40 + len(prompts), 50 + at), False) for at, p in enumerate(prompts)]


def test_batches_are_those_of_all_rows_whatever_is_answered_already(
    tooluse: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def engine(stop_at: int = 0) -> Shapely:
        made = Shapely(stop_at)
        monkeypatch.setattr(evaluation_job, "hf_sampler", lambda *_: made)
        return made

    engine()
    whole = tooluse("whole", batch_rows=3)
    engine(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        tooluse("stopped", batch_rows=3)
    kept = tmp_path / "stopped" / "results.answers.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert [("answer" in json.loads(line)) for line in lines] == [False, *[True] * 6]
    kept.write_text("\n".join([lines[0], *lines[2:5]]) + "\n", encoding="utf-8")  # two batches lack rows
    again = engine()
    monkeypatch.setattr(evaluation_job, "token_cap", lambda model: 1)  # the memory that was free at first counts
    assert tooluse("stopped", batch_rows=3)["items"] == whole["items"]
    assert again.sizes == [3, 3, 3, 1]
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 11


def die_at_the_third_batch(tooluse: Callable[..., dict[str, Any]]) -> None:
    """Evaluate in this process, and kill it there."""
    torch.set_num_threads(1)  # those that were there before a fork are not there after it
    decoding, calls = evaluation_job.hf_sampler, []

    def deadly(*given: Any) -> Any:
        decode = decoding(*given)

        def sample(prompts: Any, **how: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(prompts, **how)

        return sample

    evaluation_job.hf_sampler = deadly
    tooluse("killed", batch_rows=3)


def test_it_goes_on_where_it_was_killed(tooluse: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    if not (child := os.fork()):
        try:
            die_at_the_third_batch(tooluse)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    out = tmp_path / "killed" / "results.json"
    assert not out.exists()
    kept = out.with_name("results.answers.jsonl")
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 7
    with kept.open("ab") as stream:  # a line that the process did not finish, in the middle of a character
        stream.write('{"key": "0123", "answer": "Å'.encode()[:-1])
    assert tooluse("killed", batch_rows=3)["items"] == tooluse("whole", batch_rows=3)["items"]


def test_a_finished_file_is_returned_and_never_overwritten(
    tooluse: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = tooluse()
    path = tmp_path / "results" / "results.json"
    before = path.read_bytes()
    monkeypatch.setattr(evaluation_job, "load_model", None)  # would fail if it were called
    assert tooluse() == found
    with pytest.raises(InputError, match="differ in settings; name a new file, or remove it"):
        tooluse(grader="robust")
    assert path.read_bytes() == before
    path.unlink()  # the answers are still there
    assert tooluse(grader="robust", limit=4)["items"] == [dict(item) for item in found["items"][:4]]
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="exists and holds no results"):
        tooluse()


def test_answers_are_asked_anew_when_their_settings_change(
    tooluse: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    short = tooluse(max_new_tokens=3)
    (tmp_path / "results" / "results.json").unlink()
    long = tooluse(max_new_tokens=5)
    assert {item["tokens"] for item in short["items"]} <= {1, 2, 3}
    assert max(item["tokens"] for item in long["items"]) == 5


def test_both_graders_and_several_tasks_stand_in_one_file(reference_dir: Path, tools: str, tmp_path: Path) -> None:
    found = evaluate(
        str(reference_dir),
        ["general", "tooluse"],
        tmp_path / "r.json",
        data=tools,
        grader="both",
        limit=3,
        **OPTIONS,
    )
    named = [(part["task"], part["grader"]) for part in found["results"]]
    assert named == [(task, grader) for task in ("general", "tooluse") for grader in ("paper", "robust")]
    assert [part["n"] for part in found["results"]] == [3] * 4
    held_out = tasks.get("general").rows("held_out", 3)
    assert [item["id"] for item in found["results"][0]["items"]] == [row["id"] for row in held_out]


def test_several_answers_give_pass_at_k(tooluse: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = tooluse("three", samples=3)
    assert set(found["pass_at"]) == {"1", "2", "3"}
    item = found["items"][0]
    assert (item["samples"], len(item["answers"])) == (3, 3)
    assert item["correct"] == item["correct_count"] / 3
    assert len({one["answer"] for one in item["answers"]}) > 1
    assert tooluse("again", samples=3)["items"] == found["items"]
    assert tooluse("seed", samples=3, seed=1)["items"] != found["items"]
    more = tooluse("four", samples=4)  # the first answers are the same
    assert [one["answer"] for one in more["items"][0]["answers"][:3]] == [one["answer"] for one in item["answers"]]
    files = [tmp_path / name / "results.json" for name in ("three", "again")]
    assert compare(files)["tasks"][0]["comparisons"][0]["identical"]


def test_letters_are_scored(reference_dir: Path, questions: str, tmp_path: Path) -> None:
    found = evaluate(str(reference_dir), ["science"], tmp_path / "r.json", data=questions, how="choices", device="cpu")
    assert (found["grader"], found["how"], found["n"], found["lead"]) == (
        "letter log-likelihood",
        "choices",
        10,
        "<answer>\n",
    )
    assert found["chance"] == 0.25
    assert found["golds"] == {"A": 3, "B": 3, "C": 2, "D": 2}
    assert sum(found["picks"].values()) == 10
    item = found["items"][0]
    assert set(item["log_likelihoods"]) == set("ABCD")
    assert item["correct"] == (item["margin"] > 0) == (item["answer"] == item["gold"])
    other = evaluate(
        str(reference_dir), ["science"], tmp_path / "o.json", data=questions, how="choices", device="cpu", batch_rows=8
    )
    assert other["items"] == found["items"]
    assert other["warnings"] == ["science: batch_rows has no effect, since a CPU scores letters one by one"]


def test_prompts_beyond_the_context_are_dropped_counted_and_named(reference_dir: Path, tmp_path: Path) -> None:
    rows = [*tool_rows(3), {**tool_rows(1)[0], "prompt": "Tell me about rain. " * 200, "id": "long"}]
    data = write(tmp_path / "d.jsonl", rows)
    found = evaluate(str(reference_dir), ["tooluse"], tmp_path / "r.json", data=data, **OPTIONS)
    assert (found["n"], found["dropped"]) == (3, ["long"])
    assert "1 of 4 prompts have over 512 (the model's context) − 12 (its answer) tokens" in found["warnings"][0]
    with pytest.raises(InputError, match="None is left"):
        evaluate(
            str(reference_dir), ["tooluse"], tmp_path / "o.json", data=write(tmp_path / "l.jsonl", rows[3:]), **OPTIONS
        )
    with pytest.raises(InputError, match=r"max_new_tokens is 512, .* no room for a prompt"):
        evaluate(str(reference_dir), ["tooluse"], tmp_path / "o.json", data=data, **{**OPTIONS, "max_new_tokens": 512})


def test_a_row_that_stands_twice_is_graded_once(reference_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [*tool_rows(3), *tool_rows(1)])
    found = evaluate(str(reference_dir), ["tooluse"], tmp_path / "r.json", data=data, **OPTIONS)
    assert found["n"] == 3
    assert any("1 rows of" in warning and "twice" in warning for warning in found["warnings"])
    rows = [{**tool_rows(1)[0], "id": "x"}, {**tool_rows(1)[0], "id": "x", "golden_answer": []}]
    with pytest.raises(InputError, match='row 2: the id "x" stands for another row already'):
        evaluate(str(reference_dir), ["tooluse"], tmp_path / "o.json", data=write(tmp_path / "e.jsonl", rows))


def test_a_grader_that_raises_names_the_row_and_goes_on(reference_dir: Path, tmp_path: Path) -> None:
    rows = [*tool_rows(3), {**tool_rows(4)[3], "golden_answer": "none", "id": "odd"}]
    data = write(tmp_path / "d.jsonl", rows)
    found = evaluate(str(reference_dir), ["tooluse"], tmp_path / "r.json", data=data, **OPTIONS)
    assert (found["n"], found["raised"]) == (4, 1)
    assert "the grader raised on row odd" in found["items"][3]["reason"]
    told = "grader raised on 1 of 4 answers, which count as wrong; rows odd; first, the grader raised on row odd: Input"
    assert any(told in warning for warning in found["warnings"])


def test_a_model_that_answers_nothing_is_an_error(
    tooluse: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(prompts: Sequence[Encoded], **_: Any) -> list[Rollout]:
        return [Rollout(p.id, p.tokens, (2,), False) for p in prompts]

    monkeypatch.setattr(evaluation_job, "hf_sampler", lambda *_: silent)
    with pytest.raises(InputError, match="all 10 answers are empty, so there is nothing to grade"):
        tooluse()


def test_damaged_weights_are_named(reference_dir: Path, tools: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(reference_dir)
    model.model.norm.weight.data[:] = 3e38  # numbers still, and refused by name when they are none
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(reference_dir).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="logits are not finite: its weights are damaged beyond use"):
        evaluate(str(tmp_path / "model"), ["tooluse"], tmp_path / "r.json", data=tools, **OPTIONS)


def test_a_run_directory_stands_for_its_model(reference_dir: Path, tools: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    (run / "model").symlink_to(reference_dir)
    direct = evaluate(str(reference_dir), ["tooluse"], tmp_path / "a.json", data=tools, limit=2, **OPTIONS)
    assert (
        evaluate(str(run), ["tooluse"], tmp_path / "b.json", data=tools, limit=2, **OPTIONS)["files"] == direct["files"]
    )


def test_weights_on_a_grid_are_evaluated(student_dir: Path, tooluse: Any, tools: str, tmp_path: Path) -> None:
    found = evaluate(str(student_dir), ["tooluse"], tmp_path / "r.json", data=tools, **OPTIONS)
    assert texts(found) != texts(tooluse())


BAD: list[tuple[list[str], dict[str, Any], str]] = [
    (["tooluze"], {}, 'unknown task "tooluze"; known: general, .*Did you mean "tooluse"'),
    ([], {}, "no task is given; known: general"),
    (["general", "general"], {}, "task general is named twice"),
    (["tooluse"], {}, "tooluse makes no rows of its own; give .* --data tooluse=FILE"),
    (["tooluse", "science"], {"data": "x.jsonl"}, "x.jsonl is one file, and could be for tooluse and science"),
    (["tooluze"], {"data": "x.jsonl"}, "x.jsonl is for none of the tasks that are given"),
    (["general"], {"data": {"science": "x.jsonl"}}, "data is given for science, which is not among the tasks"),
    (["general"], {"how": "choices"}, "general is no choice between letters.*tasks with letters are science, science-"),
    (["general"], {"how": "letters"}, 'how is "letters"; allowed: generate, choices'),
    (["general"], {"engine": "vlm"}, 'engine is "vlm"; allowed: hf, vllm. Did you mean "vllm"'),
    (["general"], {"grader": "strict"}, 'grader is "strict"; allowed: paper, robust, both'),
    (["general"], {"dtype": "float8"}, 'dtype is "float8"; allowed: auto, float32, bfloat16'),
    (["general"], {"samples": 0, "limit": 0}, "samples is 0; allowed is 1 or more\nlimit is 0; allowed is 1 or more"),
    (["general"], {"max_new_tokens": 0}, "max_new_tokens is 0; allowed is 1 or more"),
    (["general"], {"batch_rows": -1}, "batch_rows is -1; allowed is 1 or more"),
    (["general"], {"seed": -1}, "seed is -1; allowed is 0 or more"),
    (["science-short"], {"how": "choices", "grader": "paper", "samples": 2}, "grader, samples: without effect"),
    (["science-short"], {"how": "choices", "engine": "vllm"}, "choices runs with engine hf only"),
    (["general"], {"include": "."}, "include, allow_code and num_fewshot concern lm-eval: tasks, and none is given"),
    (["lm-eval:x"], {"include": "nowhere"}, "include nowhere is no directory"),
    (["lm-eval:"], {}, "needs a name after it"),
    (["general"], {"sample": 2}, 'unknown key "sample". Did you mean "samples"'),
    (["general"], {"limit": "3"}, "\"limit\" is '3': input should be a valid integer"),
    (["lm-eval:x"], {"samples": 2}, "run with engine hf, how: generate and samples 1"),
]


@pytest.mark.parametrize(("names", "settings", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_settings_that_do_not_fit(names: list[str], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        evaluate("no-model-is-read", names, tmp_path / "r.json", **settings)


def test_data_and_files_that_do_not_fit(reference_dir: Path, tools: str, tmp_path: Path) -> None:
    model, out = str(reference_dir), tmp_path / "r.json"
    with pytest.raises(
        InputError, match=r'tools.jsonl, row 1: the column "answer" is missing \(it has: prompt, golden'
    ):
        evaluate(model, ["science"], out, data=tools)
    with pytest.raises(InputError, match="is empty; it needs rows with a prompt"):
        evaluate(model, ["tooluse"], out, data=write(tmp_path / "empty.jsonl", []))
    with pytest.raises(FileError, match="can't be read"):
        evaluate(model, ["tooluse"], out, data=str(tmp_path / "none.jsonl"))
    odd = [{**letter_rows(1)[0], "answer": "E"}]
    with pytest.raises(InputError, match="the answer is E; the prompt's options are A, B, C, D"):
        evaluate(model, ["science"], out, data=write(tmp_path / "odd.jsonl", odd), how="choices")
    with pytest.raises(InputError, match=r"must be the name of a \.json file"):
        evaluate(model, ["tooluse"], tmp_path / "results", data=tools)
    with pytest.raises(FileError, match="does not exist"):
        evaluate(str(tmp_path / "none"), ["tooluse"], out, data=tools)
    with pytest.raises(InputError, match=r"engine vllm needs the package vllm, .*pip install vllm"):
        evaluate(model, ["tooluse"], out, data=tools, engine="vllm")
    (tmp_path / "r.answers.jsonl").write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(FileError, match="Move that file away to begin anew"):
        evaluate(model, ["tooluse"], out, data=tools)
    assert not out.exists()
