"""The whole job on a tiny model: what it writes, what it holds, and that its settings arrive where they work."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.losses import DISTANCE
from helpers.recovering import LoopCall, assert_equal_runs, torn_copy, weights
from helpers.task_rows import write
from helpers.tiny import build_model
from remend.compression.grids import decode
from remend.compression.stored_grid import StoredGrid
from remend.data.examples import load_examples, prompt_id
from remend.data.order import Order
from remend.errors import FileError, InputError, RemendError
from remend.files.run_directory import METRICS, RunDirectory
from remend.maths.losses import of_beta
from remend.models.find import find_model
from remend.models.load import load_model, save_model
from remend.models.lora import LoraConfig
from remend.recovery.job import RecoverResult, check, recover
from remend.recovery.repair import REPAIR_ANSWERS
from remend.recovery.settings import RecoverConfig
from remend.report.recovery import verdict
from remend.training.loop import Optimization


def test_recovery_closes_part_of_the_gap_and_writes_everything(grid_run: RecoverResult) -> None:
    names = {p.name for p in grid_run.out.iterdir()}
    assert names >= {"recipe.yaml", "manifest.json", "metrics.jsonl", "timing.jsonl", "model", "samples.jsonl"}
    assert names >= {"summary.json", "report.html"}
    summary = json.loads((grid_run.out / "summary.json").read_text())
    assert summary == grid_run.summary
    figures = {"kl", "top1_agreement", "kl_on_policy", "perplexity"}
    assert set(summary["degraded"]) == set(summary["recovered"]) == figures
    assert set(summary["gap_closed"]) == {"kl", "kl_on_policy", "top1_agreement"}
    assert summary["gap_closed"]["kl"] == pytest.approx(1 - summary["recovered"]["kl"] / summary["degraded"]["kl"])
    assert 0.1 < summary["gap_closed_kl_95"][0] < summary["gap_closed"]["kl"] < summary["gap_closed_kl_95"][1] < 1
    assert summary["tokens_trained"] == sum(row["tokens"] for row in grid_run.metrics)
    assert [row["step"] for row in grid_run.metrics] == list(range(1, 25))
    assert (summary["steps"], summary["held_out_prompts"], summary["constraint"]) == (24, 12, "int3-g64-asym")
    assert summary["peak_rss_mib"] > 0
    assert not any("on_policy" in row for row in grid_run.metrics)  # there is no pool to take others from
    manifest = json.loads((grid_run.out / "manifest.json").read_text())
    assert manifest["recipe"] == yaml.safe_load((grid_run.out / "recipe.yaml").read_text())
    assert len(manifest["models"]["teacher"]["model.safetensors"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_worst_prompts_are_kept_token_by_token(grid_run: RecoverResult) -> None:
    rows = RunDirectory(grid_run.out).rows("worst.jsonl")
    sums = {row["id"]: row for row in RunDirectory(grid_run.out).rows("held_out.jsonl")}
    means = [row["kl"] for row in rows]
    assert means == sorted((r["kl_sum_recovered"] / r["tokens"] for r in sums.values()), reverse=True)[:10]
    for row in rows:
        assert sum(t["kl"] for t in row["reference"]) == pytest.approx(sums[row["id"]]["kl_sum_recovered"], abs=0.05)
        assert len(row["reference"]) == sums[row["id"]]["tokens"]
        assert row["own"]


def test_saved_model_lies_on_the_students_grid(grid_run: RecoverResult, student_dir: Path) -> None:
    before, after = StoredGrid.read(student_dir), StoredGrid.read(grid_run.model)
    assert before is not None
    assert after is not None
    saved = AutoModelForCausalLM.from_pretrained(grid_run.model)  # plain transformers opens it
    moved = 0
    for name, (codes, grid) in after.matrices.items():
        assert saved.get_parameter(name).equal(decode(codes, grid, after.format))
        assert grid.scales.equal(before.matrices[name][1].scales)
        assert grid.zeros.equal(before.matrices[name][1].zeros)
        moved += int((codes != before.matrices[name][0]).sum())
    assert moved > 100
    assert AutoTokenizer.from_pretrained(grid_run.model).chat_template


def test_summary_is_measured_on_the_saved_artifact(grid_run: RecoverResult, reference_dir: Path, place: Path) -> None:
    """An independent slow measurement of the files gives the summary's KL."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(p).double() for p in (grid_run.model, reference_dir))
    tokenizer = AutoTokenizer.from_pretrained(grid_run.model)
    total = count = 0
    texts = {prompt_id(e.prompt): e.prompt for e in load_examples(str(place / "prompts.jsonl"))}
    for row in RunDirectory(grid_run.out).rows("reference.jsonl"):
        message = [{"role": "user", "content": texts[row["id"]]}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([[*prompt, *row["completion"]]])
        with torch.no_grad():
            q, p = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
        total += float((p.exp() * (p - q)).sum())
        count += len(row["completion"])
    assert grid_run.summary["recovered"]["kl"] == pytest.approx(total / count, rel=1e-4)


def test_eval_every_logs_held_out_measurements(grid_run: RecoverResult) -> None:
    kl = {r["step"]: r["eval/kl"] for r in RunDirectory(grid_run.out).rows(METRICS) if "eval/kl" in r}
    assert list(kl) == [8, 16, 24]
    chosen = grid_run.summary["selected"]["step"]
    assert kl[chosen] == pytest.approx(grid_run.summary["recovered"]["kl"], rel=1e-5)
    assert kl[24] < kl[8] < grid_run.summary["degraded"]["kl"]


def test_checkpoints_are_safetensors_with_all_moments(grid_run: RecoverResult) -> None:
    saved = RunDirectory(grid_run.out).checkpoints()[-1]
    masters, moments = load_file(saved.path / "masters.safetensors"), load_file(saved.path / "optimizer.safetensors")
    assert set(moments) == {f"{n}.{k}" for n in masters for k in ("exp_avg", "exp_avg_sq")}
    assert not [*saved.path.rglob("*.pt"), *saved.path.rglob("*.bin")]


def test_settings_arrive_where_they_work(recipe: dict[str, Any], at_the_loop: Callable[..., LoopCall]) -> None:
    """What each does there is tested beside the loop, the step function and the losses."""
    rates = {"learning_rate": 1e-4, "warmup_steps": 3, "final_learning_rate": 0.5, "weight_decay": 0.25}
    saving = {"steps": 9, "save_every": 3, "keep_checkpoints": 7, "updates_per_rollout": 3, "seed": 5}
    rows = {"batch_size": 3, "gradient_accumulation": 2, "max_new_tokens": 4, "beta": 0.5, "temperature": 0.5}
    values = {**recipe, **rates, **saving, **rows, "max_grad_norm": 0.125, "dtype": "bfloat16"}
    plan = check(**values).plan
    assert plan is not None
    call = at_the_loop(**values)
    assert call.optimization == Optimization(9, 1e-4, 3, 0.5, 0.25, 0.125)
    assert (call.saving.every, call.saving.keep) == (3, 7)
    rounds, micro_batches = call.objective.rounds, call.objective.prepare(1).micro_batches
    assert (rounds.seed, rounds.steps, rounds.updates) == (5, 9, 3)
    assert [len(rollouts) for _, rollouts in micro_batches] == [3, 3]
    drawn = [r for _, rollouts in micro_batches for r in rollouts]
    assert {r.id for r in drawn} == {prompt.id for _, prompt in Order(plan.prompts.main.train, 5).take(0, 6)}
    assert max(len(r.completion) for r in drawn) == 4
    stream = micro_batches[0][0].stream
    assert (stream.loss, stream.temperature) == (of_beta(0.5), 0.5)
    with call.objective.precision:
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_loss_from_outside_is_trained_on_and_said(recipe: dict[str, Any]) -> None:
    loss = {"name": DISTANCE, "power": 1.0}
    result = recover(**{**recipe, "steps": 2, "loss": loss})
    assert all(0 < row["loss"] < 2 for row in result.metrics)  # Σ |q − p| is 2 at most
    assert result.summary["training_loss"] == "distance, power 1"
    assert result.summary["kl_direction"] == "forward KL, teacher‖student"
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert (manifest["recipe"]["loss"], manifest["recipe"]["beta"]) == (loss, None)
    assert recover(resume=result.out).summary == result.summary


def test_zero_steps_measures_only(recipe: dict[str, Any]) -> None:
    summary = recover(**{**recipe, "steps": 0}).summary
    assert summary["degraded"] == summary["recovered"]
    assert summary["gap_closed"]["kl"] == 0


def test_no_measurable_damage(recipe: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    save_model(build_model(len(tokenizer)), tokenizer, tmp_path / "copy")
    result = recover(**{**recipe, "student": str(tmp_path / "copy"), "steps": 1})
    assert result.summary["gap_closed"] is None
    assert result.summary["constraint"] == "none"
    assert "No measurable damage" in result.report.read_text()


def test_messages_and_what_looks_like_markup(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"<script>a({i})</script>"},
            ]
        }
        for i in range(9)
    ]
    result = recover(**{**recipe, "data": write(tmp_path / "chat.jsonl", rows), "steps": 1, "held_out": 2})
    assert result.samples()[0]["prompt"].startswith("<script>a(")
    page = result.report.read_text()
    assert "<script>a" not in page
    assert "&lt;script&gt;a(" in page


def test_disk_full_while_writing(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that can't be written: one message, the earlier checkpoint stays, no partial files."""
    calls = []

    def full(tensors: Any, path: Path, **extra: Any) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(FileError, match=r"the disk is full: .*step-000004 could not be written"):
        recover(**recipe)
    kept = Path(recipe["out"]) / "checkpoints"
    assert [p.name for p in kept.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert recover(resume=recipe["out"]).summary["steps"] == 4


@pytest.mark.parametrize(
    ("weight", "kind", "reason"),
    [(float("nan"), FileError, "norm.weight are NaN"), (3e38, InputError, "not finite")],
)
def test_a_teacher_whose_numbers_are_none_is_refused(
    recipe: dict[str, Any], tokenizer: Any, tmp_path: Path, weight: float, kind: type[RemendError], reason: str
) -> None:
    """In its weights, or in what it computes from them."""
    model = build_model(len(tokenizer))
    model.model.norm.weight.data[:] = weight
    save_model(model, tokenizer, tmp_path / "broken")
    with pytest.raises(kind, match=reason):
        recover(**{**recipe, "teacher": str(tmp_path / "broken")})


def test_lora_beside_a_grid_leaves_the_base_and_learns(
    recipe: dict[str, Any], student_dir: Path, tmp_path: Path
) -> None:
    """Nothing is repaired under it, so training begins on-policy."""
    before = {p: p.read_bytes() for p in student_dir.rglob("*") if p.is_file()}
    rest = {"steps": 20, "learning_rate": 2e-2, "save_every": 0, "repair": True, "bootstrap": "repair"}
    result = recover(**{**recipe, **rest, "lora": {"rank": 8}})
    assert {p: p.read_bytes() for p in student_dir.rglob("*") if p.is_file()} == before
    names = {p.name for p in result.model.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"model.safetensors", "remend"}
    assert result.summary["gap_closed"]["kl"] > 0.1
    assert not (result.out / REPAIR_ANSWERS).exists()
    assert not any("on_policy" in row for row in result.metrics)
    loaded = load_model(find_model(str(result.model)), dtype=torch.float32, device=torch.device("cpu"))
    stored = StoredGrid.read(student_dir)
    assert stored is not None
    tensors = dict(loaded.named_parameters())
    for name, (codes, grid) in stored.matrices.items():
        on_grid = tensors[name.replace(".weight", ".base_layer.weight")]
        assert on_grid.equal(decode(codes, grid, stored.format))


def test_lora_settings_arrive(recipe: dict[str, Any], at_the_loop: Callable[..., LoopCall]) -> None:
    call = at_the_loop(**recipe, lora={"rank": 2, "alpha": 64, "targets": ["q_proj", "down_proj"]})
    masters = call.constraint.masters()
    assert {name.split(".")[-4] for name in masters} == {"q_proj", "down_proj"}
    assert {min(tensor.shape) for tensor in masters.values()} == {2}
    student: Any = call.objective.student.model
    assert student.peft_config["default"].lora_alpha == 64


def test_a_student_that_is_an_adapter_is_trained_as_one(adapter_run: RecoverResult, both: dict[str, Any]) -> None:
    values = {**both, "student": str(adapter_run.model), "learning_rate": 1e-2}
    second = recover(**values)
    assert second.summary["degraded"]["kl"] == pytest.approx(adapter_run.summary["recovered"]["kl"])
    assert second.summary["recovered"]["kl"] < second.summary["degraded"]["kl"]
    before, after = weights(adapter_run.model), weights(second.model)
    assert before.keys() == after.keys()
    assert any(not before[k].equal(after[k]) for k in before)
    (problem,) = check(**{**values, "lora": {"rank": 2}, "out": f"{both['out']}-third"}).problems
    assert "is an adapter, which is trained as it is; leave lora out" in problem


def test_the_recovered_model_has_a_card(grid_run: RecoverResult) -> None:
    card = (grid_run.model / "README.md").read_text(encoding="utf-8")
    assert verdict(grid_run.summary) in card
    assert "held by training: int3-g64-asym" in card
    assert "licence: not known" in card
    assert "AutoModelForCausalLM" in card


def test_an_adapter_with_dropout_is_resumed_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    values = {**recipe, "lora": {"rank": 4, "dropout": 0.5}, "learning_rate": 1e-2, "seed": 3}
    whole = recover(**values)
    plain = recover(**{**values, "lora": {"rank": 4}, "out": str(tmp_path / "plain")})
    assert [row["loss"] for row in whole.metrics] != [row["loss"] for row in plain.metrics]
    assert_equal_runs(whole, recover(resume=torn_copy(whole.out, tmp_path / "torn", 2)))
    assert whole.summary["degraded"] == plain.summary["degraded"]


@pytest.fixture
def lora_of(run: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoraConfig | None]:
    """What a command's words say of the adapter."""
    seen: list[RecoverConfig] = []

    def noted(config: RecoverConfig, **_: object) -> None:
        seen.append(config)
        raise InputError("no further")

    monkeypatch.setattr("remend.recovery.preflight.preflight", noted)

    def said(*words: str) -> LoraConfig | None:
        _, _, err = run("check", *words)
        assert "no further" in err, err
        return seen[-1].lora

    return said


@pytest.mark.parametrize(
    "words",
    [
        "--lora.r 8 RECIPE",
        "RECIPE lora.r=8",
        "RECIPE --lora-r 8",
        "RECIPE --lora.rank=8",
        "RECIPE --lora-rank 8 --lora-alpha 6 --lora-dropout 0",
    ],
)
def test_a_rank_by_any_name_over_the_recipes(
    recipe: dict[str, Any], lora_of: Callable[..., LoraConfig | None], tmp_path: Path, words: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**recipe, "lora": {"r": 4, "lora_alpha": 6}}))
    assert lora_of(*words.replace("RECIPE", str(path)).split()) == LoraConfig(rank=8, alpha=6)


def test_settings_given_whole_on_the_command_line(
    recipe: dict[str, Any], lora_of: Callable[..., LoraConfig | None]
) -> None:
    words = [f"{key}={value}" for key, value in recipe.items()]
    assert lora_of(*words, "lora={r: 8, lora_dropout: 0.1}") == LoraConfig(rank=8, dropout=0.1)


def test_attention_is_computed_as_asked_everywhere(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the student, the teacher and the saved model, which does not keep it."""
    seen = []

    def noted(*args: Any, **rest: Any) -> Any:
        seen.append(model := load_model(*args, **rest))
        return model

    monkeypatch.setattr("remend.models.blocks.placement.load_model", noted)
    result = recover(**{**recipe, "steps": 1, "attn_implementation": "eager"})
    assert [model.config._attn_implementation for model in seen] == ["eager"] * 3
    assert "eager" not in (result.model / "config.json").read_text()
    other = recover(**{**recipe, "steps": 1, "out": f"{recipe['out']}-sdpa"})
    assert [model.config._attn_implementation for model in seen[3:]] == ["sdpa"] * 3
    assert other.summary["degraded"]["kl"] == pytest.approx(result.summary["degraded"]["kl"], rel=1e-3)
