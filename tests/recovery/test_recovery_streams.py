"""Streams end to end on the tiny model: every option runs, has its effect, resumes exactly, or is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import remend
from helpers.patching import replace_everywhere
from helpers.tiny import build_model, prompts
from remend.degrade.prune import prune
from remend.errors import CheckError
from remend.files.run_directory import METRICS, RunDirectory
from remend.recovery import recover


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"Task {p}", "demonstration": f"Action: look at {i}."} for i, p in enumerate(prompts(30))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def forgotten(reference_dir: Path, tokenizer: Any, tmp_path: Path) -> str:
    """The reference, moved off by noise: a student on no grid."""
    path = tmp_path / "forgotten"
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def both(recipe: dict[str, Any], task_file: Path, forgotten: str) -> dict[str, Any]:
    """Two streams: recover from the reference, keep the student as it came in."""
    values = {k: v for k, v in recipe.items() if k not in ("data", "held_out")}
    streams = {
        "recover": {"data": str(recipe["data"]), "held_out": 6},
        "keep": {"data": str(task_file), "teacher": "initial", "held_out": 4, "weight": 0.5},
    }
    return {**values, "student": forgotten, "streams": streams, "save_every": 0, "eval_every": 2}


def changed(values: dict[str, Any], **keep: Any) -> dict[str, Any]:
    return {**values, "streams": {**values["streams"], "keep": {**values["streams"]["keep"], **keep}}}


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.metrics]


def test_two_streams_are_logged_apart_and_summed_by_weight(both: dict[str, Any]) -> None:
    result = recover(**both)
    row = result.metrics[1]
    assert row["loss"] == pytest.approx(row["recover/loss"] + 0.5 * row["keep/loss"])
    assert row["tokens"] == row["recover/tokens"] + row["keep/tokens"]
    assert result.metrics[0]["keep/loss"] == pytest.approx(0.0, abs=1e-5)  # the student is its own teacher yet
    assert row["keep/loss"] > 1e-6
    assert set(result.summary["streams"]) == {"keep"}
    assert result.summary["streams"]["keep"]["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
    rows = [r for r in RunDirectory(result.out).rows(METRICS) if "eval/kl" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert all("eval/keep/kl" in r and "eval/gap_closed" in r for r in rows)
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert manifest["streams"] == {"recover": {"train": 34, "held_out": 6}, "keep": {"train": 26, "held_out": 4}}


def test_a_named_stream_equals_the_short_form(recipe: dict[str, Any], tmp_path: Path) -> None:
    short = recover(**{**recipe, "save_every": 0})
    rest = {k: v for k, v in recipe.items() if k not in ("data", "teacher")}
    streams = {"recover": {"data": recipe["data"], "teacher": recipe["teacher"]}}
    long = recover(**{**rest, "streams": streams, "save_every": 0, "out": str(tmp_path / "long")})
    assert short.metrics == long.metrics
    assert short.summary["recovered"] == long.summary["recovered"]


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "ema", "demonstrations": True},
        {"teacher": "live", "demonstrations": True},
        {"demonstrations": True},
        {"policy": "off"},
        {"policy": 0.5},
        {"top_k": 3},
        {"beta": 1.0},
        {"weight": 2.0},
        {"share": 3},
        {"max_new_tokens": [3, 8]},
        {"temperature": 0.5},
        {"skip_first_tokens": 2},
    ],
    ids=str,
)
def test_every_stream_option_changes_the_trajectory(
    both: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    base = recover(**{**both, "out": str(tmp_path / "base")})
    other = recover(**{**changed(both, **change), "out": str(tmp_path / "other")})
    assert losses(base) != losses(other)
    assert all(torch.isfinite(torch.tensor(losses(other))))


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 5},
        {"updates_per_rollout": 1},
        {"skip_first_tokens": 2},
        {"max_new_tokens": "4→8"},
        {"bootstrap": "on"},
        {"bootstrap": "on", "bootstrap_steps": 3},
        {"ema": {"rate": 0.5}},
        {"ema": {"rate": 0.5, "every": 2}},
        {"demonstration_template": "{prompt}\n\n{demonstration}"},
    ],
    ids=str,
)
def test_every_option_of_a_run_changes_the_trajectory(
    both: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    values = changed(both, teacher="ema", demonstrations=True, skip_first_tokens=0)
    base = recover(**{**values, "out": str(tmp_path / "base")})
    other = recover(**{**values, **change, "out": str(tmp_path / "other")})
    assert losses(base) != losses(other)


EMA = {"teacher": "ema", "demonstrations": True}


@pytest.mark.parametrize(
    ("keep", "rest"),
    [
        (EMA, {"bootstrap": "on"}),
        ({"policy": 0.5}, {"bootstrap": "on"}),
        ({}, {"bootstrap": "on"}),
        (EMA, {"bootstrap": "auto"}),
        (EMA, {"updates_per_rollout": 2}),
        (EMA, {"select": "best"}),
        (EMA, {"lora": {"rank": 2}}),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(
    both: dict[str, Any], tmp_path: Path, keep: dict[str, Any], rest: dict[str, Any]
) -> None:
    values = {**changed(both, **keep), "steps": 6, "save_every": 2, "keep_checkpoints": 9, **rest}
    whole = recover(**{**values, "out": str(tmp_path / "whole")})
    cut = recover(**{**values, "out": str(tmp_path / "cut")})
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(cut.out / "checkpoints" / name)
    (cut.out / "summary.json").unlink()
    again = recover(resume=str(cut.out))
    assert again.metrics == whole.metrics
    assert again_gate(again) == again_gate(whole)
    assert again.summary["selected"] == whole.summary["selected"]
    assert again.summary["recovered"] == whole.summary["recovered"]
    name = "adapter_model.safetensors" if "lora" in rest else "model.safetensors"
    weights = [load_file(r.model / name) for r in (whole, again)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def again_gate(result: Any) -> list[dict[str, Any]]:
    return RunDirectory(result.out).rows("gate.jsonl")


def test_bootstrap_trains_on_the_teachers_completions_until_the_budget_is_spent(both: dict[str, Any]) -> None:
    result = recover(**{**both, "steps": 6, "bootstrap": "on", "bootstrap_steps": 2})
    assert [row["recover/on_policy"] for row in result.metrics] == [0, 0, 1, 1, 1, 1]
    rows = RunDirectory(result.out).rows("off-policy-recover.jsonl")
    assert len(rows) == 2  # 2 rows a step for 2 steps, each used twice at most
    assert again_gate(result)[-1]["reasons"] == ["the budget of 2 bootstrap steps is spent"]


def test_fewer_passes_want_more_completions_of_the_teacher(both: dict[str, Any], tmp_path: Path) -> None:
    counts = {}
    for passes in (1, 2, 4):
        values = {**both, "steps": 4, "bootstrap": "on", "bootstrap_steps": 2, "off_policy_passes": passes}
        result = recover(**{**values, "out": str(tmp_path / str(passes))})
        counts[passes] = len(RunDirectory(result.out).rows("off-policy-recover.jsonl"))
    assert counts == {1: 4, 2: 2, 4: 1}  # 2 rows a step for 2 steps


def test_a_share_after_bootstrap_wants_completions_for_both(both: dict[str, Any], tmp_path: Path) -> None:
    values = {**changed(both, policy=0.5), "steps": 4, "bootstrap": "on", "bootstrap_steps": 2}
    result = recover(**{**values, "off_policy_passes": 1})
    counts = [len(RunDirectory(result.out).rows(f"off-policy-{name}.jsonl")) for name in ("recover", "keep")]
    assert counts == [4, 6]  # 2 rows a step: for 2 steps, and where half of the rest is off-policy for 1 more


def test_every_second_update_is_not_every_update(both: dict[str, Any], tmp_path: Path) -> None:
    """With a fast average the teacher differs from step 2 on: it has followed the first step, or not yet."""
    values = {**changed(both, teacher="ema", demonstrations=True, skip_first_tokens=0), "learning_rate": 5e-3}
    each, second = (
        losses(recover(**{**values, "ema": {"rate": 1.0, "every": n}, "out": str(tmp_path / str(n))})) for n in (1, 2)
    )
    assert each[0] == second[0]
    assert each[1] != second[1]


def test_a_stream_may_be_measured_on_a_file_of_its_own(both: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"Another task {i}", "answer": "x"}) + "\n" for i in range(5)))
    keep = {k: v for k, v in both["streams"]["keep"].items() if k != "held_out"}
    values = {**both, "streams": {**both["streams"], "keep": {**keep, "eval_data": str(own)}}}
    result = recover(**values)
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert manifest["streams"]["keep"] == {"train": 30, "held_out": 5}  # nothing is set apart any more


def test_a_streams_task_gives_the_gate_scores(both: dict[str, Any], tmp_path: Path) -> None:
    rows = remend.tasks.get("tooluse-short").rows("train", 12)
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = {"data": str(path), "teacher": "ema", "demonstrations": True, "held_out": 4}
    found = []
    for extra in ({}, {"task": "tooluse-short"}):
        values = {**both, "streams": {**both["streams"], "keep": {**keep, **extra}}, "steps": 2, "bootstrap": "auto"}
        found.append(again_gate(recover(**{**values, "out": str(tmp_path / f"out{len(found)}")}))[0])
    assert not any("score" in key for key in found[0])
    assert any("score" in key for key in found[1])


def test_a_streams_task_needs_rows_that_it_can_grade(both: dict[str, Any], tmp_path: Path) -> None:
    rows = remend.tasks.get("tooluse-short").rows("train", 12)
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "golden_answer"}) + "\n" for row in rows))
    found = remend.check(**changed(both, data=str(path), teacher="ema", demonstrations=True, task="tooluse-short"))
    (problem,) = found.problems
    assert "task tooluse-short of keep" in problem
    assert 'the column "golden_answer" is missing' in problem


def test_what_comes_before_the_first_step_is_timed_apart(both: dict[str, Any], tmp_path: Path) -> None:
    values = {**changed(both, policy=0.5), "bootstrap": "auto", "save_every": 2}
    result = recover(**values)
    files = RunDirectory(result.out)
    stages = [(row["stage"], row.get("stream")) for row in files.rows("timing.jsonl") if row["step"] == 0]
    assert stages == [("gate", None), ("pool", "keep")]
    assert files.setup_seconds("pool") > 0
    assert list(files.step_seconds()) == [1, 2, 3, 4]
    assert result.summary["training_seconds"] == round(sum(files.step_seconds().values()), 1)
    shutil.rmtree(result.out / "checkpoints" / "step-000004")
    (result.out / "summary.json").unlink()
    recover(resume=str(result.out))
    again = files.rows("timing.jsonl")
    assert [(row["stage"], row.get("stream")) for row in again if row["step"] == 0] == stages
    assert list(files.step_seconds()) == [1, 2, 3, 4]


def test_the_automatic_gate_lets_the_fluent_pass_and_holds_the_babbling(
    both: dict[str, Any], reference_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    fluent = recover(**{**both, "steps": 2, "bootstrap": "auto", "out": str(tmp_path / "fluent")})
    first = again_gate(fluent)[0]
    assert (first["open"], first["reasons"]) == (True, [])
    assert first["kl_on_policy"] < 1.5
    assert not (fluent.out / "off-policy-recover.jsonl").exists()  # nothing is sampled that is not needed
    model = build_model(len(tokenizer), seed=99)  # nothing in common with the reference
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0)  # and sure of itself
    model.save_pretrained(tmp_path / "babbling")
    tokenizer.save_pretrained(tmp_path / "babbling")
    values = {**both, "student": str(tmp_path / "babbling"), "steps": 3, "bootstrap": "auto", "bootstrap_steps": 2}
    babbling = recover(**{**values, "out": str(tmp_path / "out")})
    first = again_gate(babbling)[0]
    assert not first["open"]
    assert "on the student's own samples is above 1.5" in first["reasons"][0]
    assert [row["recover/on_policy"] for row in babbling.metrics] == [0, 0, 1]


def test_the_gate_measures_whether_demonstrations_help(both: dict[str, Any]) -> None:
    values = changed(both, teacher="ema", demonstrations=True)
    result = recover(**{**values, "steps": 2, "bootstrap": "auto"})
    first = again_gate(result)[0]
    assert first["keep/nll_gain_low"] <= first["keep/nll_gain"] <= first["keep/nll_gain_high"]
    assert any("demonstrations" in reason for reason in first["reasons"]) == (first["keep/nll_gain_low"] <= 0)


def test_the_best_step_is_what_is_saved(both: dict[str, Any]) -> None:
    """At a rate that wrecks the student after the first evaluation, best is not last."""
    wild = {**both, "steps": 6, "learning_rate": 0.3, "warmup_steps": 0, "eval_every": 1, "select": "best"}
    result = recover(**wild)
    scores = [(r["eval/gap_closed"], r["step"]) for r in RunDirectory(result.out).rows(METRICS) if "eval/kl" in r]
    best = max(scores)
    assert result.summary["selected"]["step"] == best[1]
    kl = next(r["eval/kl"] for r in RunDirectory(result.out).rows(METRICS) if r["step"] == best[1] and "eval/kl" in r)
    assert result.summary["recovered"]["kl"] == pytest.approx(kl, rel=1e-4)


def test_patience_stops_early(both: dict[str, Any]) -> None:
    wild = {**both, "steps": 30, "learning_rate": 0.3, "warmup_steps": 0, "eval_every": 1, "patience": 2}
    result = recover(**wild)
    assert result.summary["steps"] < 30
    assert result.metrics[-1]["step"] == result.summary["steps"]


def test_self_written_prompts(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def written(model: Any, tokenizer: Any, *, n: int, **rest: Any) -> tuple[list[str], None]:
        return [f"What is number {i}?" for i in range(n)], None

    monkeypatch.setattr("remend.recovery.written_prompts.generate", written)
    also = {"data": "self", "teacher": "initial", "held_out": 5}
    streams = {**both["streams"], "recover": {"data": "self", "held_out": 3}, "also": also}
    result = recover(**{**both, "streams": streams, "self_prompts": 12})
    assert len(RunDirectory(result.out).rows("prompts.jsonl")) == 12
    assert result.summary["held_out_prompts"] == 3
    # the same prompts, split at other places: the five that `also` holds out are no training prompts of `recover`
    counts = json.loads((result.out / "manifest.json").read_text())["streams"]
    assert counts["recover"] == {"train": 7, "held_out": 3}
    assert any("2 prompts of recover are held out in another stream" in w for w in result.summary["warnings"])
    rows = RunDirectory(result.out).rows("timing.jsonl")
    assert [row["stage"] for row in rows if row["step"] == 0] == ["prompts"]


def test_merge_folds_the_adapter_in(both: dict[str, Any], tmp_path: Path) -> None:
    values = {**both, "lora": {"rank": 4}, "learning_rate": 1e-2}
    apart = recover(**{**values, "out": str(tmp_path / "apart")})
    merged = recover(**{**values, "merge": True, "out": str(tmp_path / "merged")})
    assert (apart.model / "adapter_config.json").is_file()
    assert not (merged.model / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(merged.model).config.num_hidden_layers == 2
    assert merged.summary["recovered"]["kl"] == pytest.approx(apart.summary["recovered"]["kl"], rel=1e-4)


def test_base_is_a_teacher_for_an_adapter(both: dict[str, Any]) -> None:
    result = recover(**{**changed(both, teacher="base"), "lora": {"rank": 4}, "learning_rate": 1e-2})
    assert result.metrics[0]["keep/loss"] == pytest.approx(0.0, abs=1e-5)
    assert result.metrics[-1]["keep/loss"] > 1e-5


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"merge": True}, "has no adapter to fold in"),
        ({"top_k": 10_000}, "top_k is 10000; the vocabulary has"),
    ],
)
def test_what_the_student_cannot_do(both: dict[str, Any], change: dict[str, Any], part: str) -> None:
    with pytest.raises(CheckError, match=part):
        recover(**{**both, **change})


def test_base_needs_an_adapter(both: dict[str, Any]) -> None:
    with pytest.raises(CheckError, match="teacher base is the student without its adapter"):
        recover(**changed(both, teacher="base"))


def test_merge_is_refused_on_a_grid(recipe: dict[str, Any]) -> None:
    with pytest.raises(CheckError, match="would take the student off what it is held to"):
        recover(**{**recipe, "lora": {"rank": 4}, "merge": True})


def test_a_row_without_demonstration_is_an_error(both: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(CheckError, match="has no demonstration"):
        recover(**changed(both, data=str(path), held_out=1, demonstrations=True))


def test_demonstrations_of_message_prompts(both: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Task {p} {{x}}"}],
            "demonstration": f'{{"look": {i}}}',
        }
        for i, p in enumerate(prompts(20))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**changed(both, data=str(path), teacher="ema", demonstrations=True), "steps": 2}
    plan = remend.check(**values).plan
    assert plan is not None
    keep = next(s for s in plan.streams if s.stream.name == "keep")
    prompt = keep.train[0]
    seen, shown = (tokenizer.decode(tokens) for tokens in (prompt.tokens, prompt.shown or ()))
    system, asked = seen.split("<|im_start|>user\n")
    assert shown.startswith(f"{system}<|im_start|>user\n{asked.split('<|im_end|>')[0]}")
    assert '{"look": ' in shown
    assert '{"look": ' not in seen
    assert recover(**values).metrics[0]["keep/loss"] > 1e-4  # the student's own weights, with more to read


def test_a_long_demonstration_drops_the_prompt_and_says_so(both: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i}", "privileged_context": "word " * (2 if i else 300)} for i in range(12)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({**row, "id": f"row-{i}"}) + "\n" for i, row in enumerate(rows)))
    found = remend.check(**{**changed(both, data=str(path), held_out=2, demonstrations=True), "max_prompt_tokens": 300})
    text = "\n".join([*found.warnings, *found.problems])
    assert "with their demonstrations have over max_prompt_tokens = 300 tokens and are dropped, not cut (row-0)" in text


def test_cached_teacher_recovers_without_its_model(
    recipe: dict[str, Any], forgotten: str, reference_dir: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    remend.cache_teacher(str(reference_dir), cache, data=str(recipe["data"]), k=40, max_new_tokens=8, held_out=6)
    rest = {k: v for k, v in recipe.items() if k not in ("data", "teacher", "held_out")}
    values = {**rest, "student": forgotten, "streams": {"recover": {"teacher": str(cache), "policy": "off"}}}
    result = recover(**{**values, "steps": 25, "learning_rate": 3e-3, "save_every": 0})
    assert result.summary["degraded"]["kl_on_policy"] is None
    assert result.summary["gap_closed"]["kl"] > 0.1
    assert losses(result)[-1] < losses(result)[0]
    assert "report.html" in {p.name for p in result.out.iterdir()}
    with pytest.raises(CheckError, match="scored its own completions only"):
        recover(**{**values, "out": str(tmp_path / "on"), "streams": {"recover": {"teacher": str(cache)}}})


def test_streams_of_one_teacher_share_it(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from remend.models.load import load_model

    loaded: list[str] = []
    load = load_model

    def counted(source: Any, **rest: Any) -> Any:
        loaded.append(source.spec)
        return load(source, **rest)

    replace_everywhere(monkeypatch, load, counted)
    recover(**changed({**both, "steps": 1}, teacher=both["teacher"]))
    assert loaded.count(both["teacher"]) == 1


def test_a_teacher_with_more_rows_is_aligned_on_shared_ids(
    both: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    padded = build_model(len(tokenizer) + 5, seed=3)
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    values = changed({**both, "steps": 1}, teacher=str(tmp_path / "padded"))
    assert json.loads((recover(**values).out / "manifest.json").read_text())["shared_vocabulary"] == len(tokenizer)


def test_a_view_of_the_student_teaches_in_bfloat16_too(both: dict[str, Any], tmp_path: Path) -> None:
    """Autocast must not hand the teacher's casts to the student: the kept stream's loss would stay 0."""
    values = {**both, "learning_rate": 5e-3, "temperature": 0.1}
    exact = recover(**{**values, "out": str(tmp_path / "float32")})
    mixed = recover(**{**values, "dtype": "bfloat16", "out": str(tmp_path / "bfloat16")})
    assert mixed.metrics[-1]["keep/loss"] == pytest.approx(exact.metrics[-1]["keep/loss"], rel=0.5)
    assert exact.metrics[-1]["keep/loss"] > 1e-3


def test_two_processes_share_pools_gate_and_streams(both: dict[str, Any], tmp_path: Path) -> None:
    # 5 and 3 rows a step, which two processes share unequally
    values = changed({**both, "bootstrap": "auto", "batch_size": 8, "steps": 3}, policy=0.5, share=0.6)
    single = recover(**{**values, "out": str(tmp_path / "single")})
    halves = {**values, "batch_size": 4, "out": str(tmp_path / "pair")}
    worker = str(Path(__file__).parents[1] / "helpers" / "worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, "plain"]
    done = subprocess.run([*command, json.dumps(halves)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pair = [r for r in RunDirectory(tmp_path / "pair").rows(METRICS) if "loss" in r]
    for a, b in zip(single.metrics, pair, strict=True):
        assert a["recover/loss"] == pytest.approx(b["recover/loss"], rel=1e-3)
        assert a["recover/tokens"] == b["recover/tokens"]
        for name in ("recover/clipped_share", "recover/completion_tokens", "keep/on_policy"):
            assert a[name] == pytest.approx(b[name], rel=1e-12)
    assert again_gate(single) == RunDirectory(tmp_path / "pair").rows("gate.jsonl")


def test_what_one_stream_is_measured_on_no_other_trains_on(both: dict[str, Any]) -> None:
    first = both["streams"]["recover"]["data"]
    found = remend.check(**changed(both, data=first, held_out=3))
    assert found.plan is not None
    held = {p.tokens for s in found.plan.streams for p in s.held_out}
    assert not held & {p.tokens for s in found.plan.streams for p in s.train}
    assert any("are held out in another stream" in warning for warning in found.warnings)


def test_a_healthy_model_may_adapt_with_itself_as_reference(both: dict[str, Any], reference_dir: Path) -> None:
    adapt = {**both["streams"]["keep"], "teacher": "ema", "demonstrations": True}
    values = {**both, "student": str(reference_dir), "streams": {"adapt": adapt}, "steps": 2}
    result = recover(**values)
    assert result.summary["gap_closed"] is None
    assert losses(result)[1] > 0


def test_the_average_of_a_masked_student_keeps_its_zeros(both: dict[str, Any], forgotten: str, tmp_path: Path) -> None:
    prune(forgotten, tmp_path / "sparse", method="magnitude", sparsity="2:4", probe=False)
    values = {**changed(both, **EMA), "student": str(tmp_path / "sparse"), "ema": {"rate": 0.5}, "weight_decay": 0.1}
    result = recover(**{**values, "steps": 4, "save_every": 4, "repair": False})
    came, left = (load_file(p / "model.safetensors") for p in (tmp_path / "sparse", result.model))
    (saved,) = (result.out / "checkpoints").glob("*/follower.safetensors")
    average = load_file(saved)
    names = [name for name in average if "proj" in name]
    assert len(names) == 14
    for name in names:
        assert bool((average[name][came[name] == 0] == 0).all()), name
        assert not average[name].equal(came[name])
        assert not average[name].equal(left[name])
