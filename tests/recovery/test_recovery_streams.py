"""Streams end to end on the tiny model: what each option does, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import remend
from helpers.recovering import LoopCall, keeping, torn_copy, weights
from helpers.task_rows import write
from helpers.tiny import build_model, prompts
from remend.degrade.prune import prune
from remend.files.run_directory import METRICS, TRACK, RunDirectory
from remend.models.load import save_model
from remend.recovery.bootstrap import GATE
from remend.recovery.job import RecoverResult, check, recover, track
from remend.recovery.plan import Plan
from remend.training.teachers.ema import Ema


def plan_of(recipe: dict[str, Any]) -> Plan:
    checked = check(**recipe)
    assert checked.plan is not None, checked.problems
    return checked.plan


def loss_of(call: LoopCall, name: str) -> float:
    """Of a stream at the first step, a mean over its tokens."""
    prepared = call.objective.prepare(1)
    sums = [call.objective(part).sums[name][0].item() for part in prepared.micro_batches if part[0].stream.name == name]
    return sum(sums) / prepared.tokens[name]


def test_two_streams_are_logged_apart_and_summed_by_weight(streams_run: RecoverResult) -> None:
    first, second = streams_run.metrics[:2]
    assert second["loss"] == pytest.approx(second["recover/loss"] + 0.5 * second["keep/loss"])
    assert second["tokens"] == second["recover/tokens"] + second["keep/tokens"]
    assert first["keep/loss"] == pytest.approx(0.0, abs=1e-5)  # the student is its own teacher yet
    assert second["keep/loss"] > 1e-6
    assert set(streams_run.summary["streams"]) == {"keep"}
    assert streams_run.summary["streams"]["keep"]["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
    rows = [r for r in RunDirectory(streams_run.out).rows(METRICS) if "eval/kl" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert all("eval/keep/kl" in r and "eval/gap_closed" in r for r in rows)
    manifest = json.loads((streams_run.out / "manifest.json").read_text())
    assert manifest["streams"] == {"recover": {"train": 34, "held_out": 6}, "keep": {"train": 26, "held_out": 4}}
    assert not (streams_run.out / TRACK).exists()  # diagnose_every was not asked for


@pytest.mark.parametrize("teacher", ["initial", "ema", "live"])
def test_a_demonstration_gives_the_students_own_weights_more_to_say(
    both: dict[str, Any], at_the_loop: Callable[..., LoopCall], teacher: str
) -> None:
    values = keeping(both, teacher=teacher, demonstrations=True)
    assert loss_of(at_the_loop(**values), "keep") > 1e-4


def test_settings_of_a_stream_and_of_its_teacher_arrive(
    both: dict[str, Any], at_the_loop: Callable[..., LoopCall]
) -> None:
    values = keeping(both, teacher="ema", demonstrations=True, weight=2.0, share=3, max_new_tokens=[4, 8])
    call = at_the_loop(**values, ema={"rate": 0.25, "every": 3})
    assert call.objective.weights == {"recover": 1.0, "keep": 2.0}
    recovering, kept = call.objective.rounds.sources
    assert (recovering.rows, kept.rows, kept.stream.lengths) == (1, 3, (4, 8))
    assert isinstance(kept.teacher, Ema)
    assert (kept.teacher.rate, kept.teacher.every) == (0.25, 3)


def test_streams_of_one_teacher_share_it(both: dict[str, Any], at_the_loop: Callable[..., LoopCall]) -> None:
    sources = at_the_loop(**keeping(both, teacher=both["teacher"])).objective.rounds.sources
    assert sources[0].teacher is sources[1].teacher


def test_a_view_of_the_student_teaches_in_bfloat16_too(
    both: dict[str, Any], at_the_loop: Callable[..., LoopCall]
) -> None:
    """Autocast must not hand the teacher's casts to the student: the kept stream's loss would stay 0."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        call = at_the_loop(**{**both, "dtype": dtype, "out": f"{both['out']}-{dtype}"})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in call.objective.student.model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        losses.append(loss_of(call, "keep"))
    assert losses[0] > 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_a_demonstration_template_is_what_the_teacher_reads(both: dict[str, Any], tokenizer: Any) -> None:
    values = keeping(both, demonstrations=True)
    plan = plan_of({**values, "demonstration_template": "{prompt}\n\nSee: {demonstration}"})
    prompt = plan.prompts.streams[1].train[0]
    seen, shown = (tokenizer.decode(tokens) for tokens in (prompt.tokens, prompt.shown or ()))
    assert "\n\nSee: Action: look at " in shown
    assert "See:" not in seen


def test_demonstrations_of_message_prompts(both: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Task {p} {{x}}"}],
            "demonstration": f'{{"look": {i}}}',
        }
        for i, p in enumerate(prompts(20))
    ]
    values = keeping(both, data=write(tmp_path / "chat.jsonl", rows), teacher="ema", demonstrations=True)
    prompt = plan_of(values).prompts.streams[1].train[0]
    seen, shown = (tokenizer.decode(tokens) for tokens in (prompt.tokens, prompt.shown or ()))
    system, asked = seen.split("<|im_start|>user\n")
    assert shown.startswith(f"{system}<|im_start|>user\n{asked.split('<|im_end|>')[0]}")
    assert '{"look": ' in shown
    assert '{"look": ' not in seen


def test_bootstrap_trains_on_the_teachers_completions_until_the_budget_is_spent(ema_run: RecoverResult) -> None:
    assert [row["recover/on_policy"] for row in ema_run.metrics] == [0, 0, 1, 1, 1, 1]
    assert [row["keep/on_policy"] for row in ema_run.metrics[:2]] == [0, 0]
    assert 0 < sum(row["keep/on_policy"] for row in ema_run.metrics) < 4  # a share of 0.5 of the rest
    directory = RunDirectory(ema_run.out)
    assert directory.rows(GATE)[-1]["reasons"] == ["the budget of 2 bootstrap steps is spent"]


@pytest.mark.parametrize(("passes", "recovering", "keep"), [(1, 4, 6), (2, 2, 3), (4, 1, 2)])
def test_fewer_passes_want_more_completions_of_the_teacher(
    both: dict[str, Any], at_the_loop: Callable[..., LoopCall], passes: int, recovering: int, keep: int
) -> None:
    """2 rows a step: for 2 steps of bootstrap, and where half of the rest is off-policy for 1 more."""
    values = {**keeping(both, policy=0.5), "bootstrap": "on", "bootstrap_steps": 2, "off_policy_passes": passes}
    at_the_loop(**values)
    files = [RunDirectory(Path(both["out"])).rows(f"off-policy-{name}.jsonl") for name in ("recover", "keep")]
    assert [len(rows) for rows in files] == [recovering, keep]


def test_the_automatic_gate_lets_the_fluent_pass(streams_run: RecoverResult) -> None:
    first = RunDirectory(streams_run.out).rows(GATE)[0]
    assert (first["open"], first["reasons"]) == (True, [])
    assert first["kl_on_policy"] < 1.5
    assert not any("score" in key for key in first)  # no stream has a task
    assert not (streams_run.out / "off-policy-recover.jsonl").exists()  # nothing is sampled that is not needed


def test_the_automatic_gate_holds_the_babbling(both: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = build_model(len(tokenizer), seed=99)  # nothing in common with the reference
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0)  # and sure of itself
    save_model(model, tokenizer, tmp_path / "babbling")
    gate = {"bootstrap": "auto", "bootstrap_steps": 2}
    babbling = recover(**{**both, "student": str(tmp_path / "babbling"), "steps": 3, **gate})
    first = RunDirectory(babbling.out).rows(GATE)[0]
    assert not first["open"]
    assert "on the student's own samples is above 1.5" in first["reasons"][0]
    assert [row["recover/on_policy"] for row in babbling.metrics] == [0, 0, 1]


def test_the_gate_measures_whether_demonstrations_help(gated_run: RecoverResult) -> None:
    """By the likelihood of the rows' answers, and by the score of the stream's task."""
    first = RunDirectory(gated_run.out).rows(GATE)[0]
    assert first["keep/nll_gain_low"] <= first["keep/nll_gain"] <= first["keep/nll_gain_high"]
    helped = [first[f"keep/{measure}_gain_low"] > 0 for measure in ("nll", "score")]
    assert any("demonstrations" in reason for reason in first["reasons"]) == (not all(helped))


def test_what_comes_before_the_first_step_is_timed_apart(gated_run: RecoverResult, tmp_path: Path) -> None:
    files = RunDirectory(gated_run.out)
    stages = [(row["stage"], row.get("stream")) for row in files.rows("timing.jsonl") if "stage" in row]
    assert stages == [("gate", None), ("pool", "recover"), ("pool", "keep")]
    assert files.setup_seconds("pool") > 0
    assert list(files.step_seconds()) == [1, 2, 3, 4]
    assert gated_run.summary["training_seconds"] == round(sum(files.step_seconds().values()), 1)
    again = RunDirectory(recover(resume=torn_copy(gated_run.out, tmp_path / "torn", 2)).out)
    assert [(r["stage"], r.get("stream")) for r in again.rows("timing.jsonl") if "stage" in r] == stages
    assert list(again.step_seconds()) == [1, 2, 3, 4]


def test_the_best_step_is_saved_and_patience_ends_the_run(both: dict[str, Any]) -> None:
    """At a rate that wrecks the student after the first evaluation, best is not last."""
    wild = {"steps": 30, "learning_rate": 0.3, "warmup_steps": 0, "eval_every": 1, "select": "best", "patience": 3}
    result = recover(**{**both, **wild})
    rows = [r for r in RunDirectory(result.out).rows(METRICS) if "eval/kl" in r]
    best = max(rows, key=lambda row: row["eval/gap_closed"])
    assert result.summary["selected"]["step"] == best["step"]
    assert result.summary["recovered"]["kl"] == pytest.approx(best["eval/kl"], rel=1e-4)
    assert result.metrics[-1]["step"] == result.summary["steps"] == best["step"] + 3 < 30


def test_self_written_prompts(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def written(model: Any, tokenizer: Any, *, n: int, **rest: Any) -> tuple[list[str], None]:
        return [f"What is number {i}?" for i in range(n)], None

    monkeypatch.setattr("remend.recovery.written_prompts.generate", written)
    also = {"data": "self", "teacher": "initial", "held_out": 5}
    streams = {**both["streams"], "recover": {"data": "self", "held_out": 4}, "also": also}
    result = recover(**{**both, "streams": streams, "self_prompts": 12})
    assert len(RunDirectory(result.out).rows("prompts.jsonl")) == 12
    assert result.summary["held_out_prompts"] == 4
    # the same prompts, split at other places: the five that `also` holds out are no training prompts of `recover`
    counts = json.loads((result.out / "manifest.json").read_text())["streams"]
    assert counts["recover"] == {"train": 7, "held_out": 4}
    assert any("1 prompts of recover are held out in another stream" in w for w in result.summary["warnings"])
    rows = RunDirectory(result.out).rows("timing.jsonl")
    assert [row["stage"] for row in rows if "stage" in row] == ["prompts"]
    assert track(result.out)[0]["kl"] == pytest.approx(
        result.summary["degraded"]["kl"], rel=1e-6
    )  # on the same prompts


def test_base_is_a_teacher_for_an_adapter(adapter_run: RecoverResult) -> None:
    assert adapter_run.metrics[0]["keep/loss"] == pytest.approx(0.0, abs=1e-5)
    assert adapter_run.metrics[-1]["keep/loss"] > 1e-5


def test_merge_folds_the_adapter_in(adapter_run: RecoverResult, adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    merged = recover(**adapter_recipe, merge=True, out=str(tmp_path / "merged"))
    assert (adapter_run.model / "adapter_config.json").is_file()
    assert not (merged.model / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(merged.model).config.num_hidden_layers == 2
    assert merged.summary["recovered"]["kl"] == pytest.approx(adapter_run.summary["recovered"]["kl"], rel=1e-4)


def test_cached_teacher_recovers_without_its_model(
    recipe: dict[str, Any], forgotten: Path, reference_dir: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    remend.cache_teacher(str(reference_dir), cache, data=recipe["data"], k=40, max_new_tokens=8, held_out=6)
    rest = {k: v for k, v in recipe.items() if k not in ("data", "teacher", "held_out")}
    values = {**rest, "student": str(forgotten), "streams": {"recover": {"teacher": str(cache), "policy": "off"}}}
    result = recover(**{**values, "steps": 25, "learning_rate": 3e-3, "save_every": 0})
    assert result.summary["degraded"]["kl_on_policy"] is None
    assert result.summary["gap_closed"]["kl"] > 0.1
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    assert (result.out / "report.html").is_file()
    on = {**values, "out": str(tmp_path / "on"), "streams": {"recover": {"teacher": str(cache)}}}
    assert "scored its own completions only" in check(**on).problems[0]
    layers = {**values, "out": str(tmp_path / "layers"), "diagnose_every": 2}
    assert any("diagnose_every needs the reference's layers" in problem for problem in check(**layers).problems)


def test_a_healthy_model_may_adapt_with_itself_as_reference(both: dict[str, Any], reference_dir: Path) -> None:
    adapt = {**both["streams"]["keep"], "teacher": "ema", "demonstrations": True}
    result = recover(**{**both, "student": str(reference_dir), "streams": {"adapt": adapt}, "steps": 2})
    assert result.summary["gap_closed"] is None
    assert result.metrics[1]["loss"] > 0


def test_the_average_of_a_masked_student_keeps_its_zeros(both: dict[str, Any], forgotten: Path, tmp_path: Path) -> None:
    prune(str(forgotten), tmp_path / "sparse", method="magnitude", sparsity="2:4", probe=False)
    values = keeping({**both, "student": str(tmp_path / "sparse")}, teacher="ema", demonstrations=True)
    rest = {"ema": {"rate": 0.5}, "weight_decay": 0.1, "save_every": 4}
    result = recover(**{**values, **rest})
    came, left = weights(tmp_path / "sparse"), weights(result.model)
    average = RunDirectory(result.out).checkpoints()[-1].follower()
    names = [name for name in average if "proj" in name]
    assert len(names) == 14
    for name in names:
        assert bool((average[name][came[name] == 0] == 0).all()), name
        assert not average[name].equal(came[name])
        assert not average[name].equal(left[name])


def test_a_stream_may_be_measured_on_a_file_of_its_own(both: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"Another task {i}", "answer": "x"} for i in range(5)]
    own = write(tmp_path / "own.jsonl", rows)
    plan = plan_of(keeping(both, eval_data=own, held_out=None))
    assert plan.prompts.counts()["keep"] == {"train": 30, "held_out": 5}  # nothing is set apart any more


def test_what_one_stream_is_measured_on_no_other_trains_on(both: dict[str, Any]) -> None:
    plan = plan_of(keeping(both, data=both["streams"]["recover"]["data"], held_out=3))
    held = {p.tokens for s in plan.prompts.streams for p in s.held_out}
    assert not held & {p.tokens for s in plan.prompts.streams for p in s.train}
    assert any("are held out in another stream" in warning for warning in plan.warnings)


def test_a_streams_task_needs_rows_that_it_can_grade(both: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": p, "demonstration": "Action: look"} for p in prompts(12)]
    data = write(tmp_path / "tools.jsonl", rows)
    (problem,) = check(**keeping(both, data=data, teacher="ema", demonstrations=True, task="tooluse-short")).problems
    assert "task tooluse-short of keep" in problem
    assert 'the column "golden_answer" is missing' in problem


def test_a_long_demonstration_drops_the_prompt_and_says_so(both: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"id": f"row-{i}", "prompt": f"p {i}", "privileged_context": "word " * (2 if i else 300)} for i in range(12)
    ]
    values = keeping(both, data=write(tmp_path / "long.jsonl", rows), held_out=2, demonstrations=True)
    checked = check(**{**values, "max_prompt_tokens": 300})
    text = "\n".join([*checked.warnings, *checked.problems])
    assert "with their demonstrations have over max_prompt_tokens = 300 tokens and are dropped, not cut (row-0)" in text
