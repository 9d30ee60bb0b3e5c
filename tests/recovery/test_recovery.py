"""The whole job on a tiny model: what it writes, what it holds, and that every knob has its effect."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import remend
from helpers.losses import DISTANCE
from remend.compression.grids import decode
from remend.compression.stored_grid import StoredGrid
from remend.errors import FileError, InputError
from remend.files.run_directory import RunDirectory
from remend.models.find import find_model
from remend.models.load import load_model
from remend.recovery import recover


@pytest.fixture
def longer(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "steps": 25, "learning_rate": 4e-3, "save_every": 0, "max_new_tokens": 12}


def test_recovery_closes_part_of_the_gap_and_writes_everything(longer: dict[str, Any]) -> None:
    result = remend.recover(**longer)
    names = {p.name for p in result.out.iterdir()}
    assert names >= {"recipe.yaml", "manifest.json", "metrics.jsonl", "timing.jsonl", "model", "samples.jsonl"}
    assert names >= {"summary.json", "report.html"}
    summary = json.loads((result.out / "summary.json").read_text())
    assert summary == result.summary
    assert (
        set(summary["degraded"]) == set(summary["recovered"]) == {"kl", "top1_agreement", "kl_on_policy", "perplexity"}
    )
    assert set(summary["gap_closed"]) == {"kl", "kl_on_policy", "top1_agreement"}
    assert summary["gap_closed"]["kl"] == pytest.approx(1 - summary["recovered"]["kl"] / summary["degraded"]["kl"])
    assert 0.1 < summary["gap_closed_kl_95"][0] < summary["gap_closed"]["kl"] < summary["gap_closed_kl_95"][1] < 1
    assert summary["tokens_trained"] == sum(row["tokens"] for row in result.metrics)
    assert [row["step"] for row in result.metrics] == list(range(1, 26))
    assert (summary["steps"], summary["held_out_prompts"], summary["constraint"]) == (25, 6, "int3-g64-asym")
    assert summary["peak_rss_mib"] > 0
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert manifest["recipe"] == yaml.safe_load((result.out / "recipe.yaml").read_text())
    assert len(manifest["models"]["teacher"]["model.safetensors"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__


def test_saved_model_lies_on_the_students_grid(longer: dict[str, Any]) -> None:
    result = recover(**{**longer, "steps": 5})
    before, after = StoredGrid.read(Path(longer["student"])), StoredGrid.read(result.model)
    assert before is not None
    assert after is not None
    saved = AutoModelForCausalLM.from_pretrained(result.model)  # plain transformers opens it
    moved = 0
    for name, (codes, grid) in after.matrices.items():
        assert saved.get_parameter(name).equal(decode(codes, grid, after.format))
        assert grid.scales.equal(before.matrices[name][1].scales)
        assert grid.zeros.equal(before.matrices[name][1].zeros)
        moved += int((codes != before.matrices[name][0]).sum())
    assert moved > 100
    assert AutoTokenizer.from_pretrained(result.model).chat_template


def test_summary_is_measured_on_the_saved_artifact(longer: dict[str, Any]) -> None:
    """An independent slow measurement of the files gives the summary's KL."""
    result = recover(**{**longer, "steps": 3})
    student, teacher = (AutoModelForCausalLM.from_pretrained(p).double() for p in (result.model, longer["teacher"]))
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    total = count = 0
    held = {r["id"]: r["completion"] for r in RunDirectory(result.out).rows("reference.jsonl")}
    from remend.data.examples import load_examples, prompt_id

    texts = {prompt_id(e.prompt): e.prompt for e in load_examples(longer["data"])}
    for key, completion in held.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": texts[key]}], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            q, p = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
        total += float((p.exp() * (p - q)).sum())
        count += len(completion)
    assert result.summary["recovered"]["kl"] == pytest.approx(total / count, rel=1e-4)


def test_equal_seeds_equal_runs_other_seeds_others(recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = [recover(**{**recipe, "seed": s, "out": str(tmp_path / f"{i}")}) for i, s in enumerate((1, 1, 2))]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].metrics != runs[2].metrics


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 1.0},
        {"beta": 0.5},
        {"temperature": 0.5},
        {"learning_rate": 1e-4},
        {"warmup_steps": 3},
        {"final_learning_rate": 1.0},
        {"weight_decay": 0.5},
        {"max_grad_norm": 1e-3},
        {"batch_size": 3},
        {"gradient_accumulation": 2},
        {"max_new_tokens": 4},
        {"dtype": "bfloat16"},
    ],
)
def test_every_knob_changes_the_trajectory(recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    base = recover(**{**recipe, "save_every": 0, "out": str(tmp_path / "base")})
    other = recover(**{**recipe, **change, "save_every": 0, "out": str(tmp_path / "other")})
    assert [r["loss"] for r in base.metrics] != [r["loss"] for r in other.metrics]
    assert all(r["loss"] > 0 for r in other.metrics)


def test_a_loss_from_outside_is_trained_on_and_said(recipe: dict[str, Any]) -> None:
    loss = {"name": DISTANCE, "power": 1.0}
    result = recover(**{**recipe, "steps": 2, "loss": loss})
    assert all(0 < row["loss"] < 2 for row in result.metrics)  # Σ |q − p| is 2 at most
    assert result.summary["training_loss"] == "distance, power 1"
    assert result.summary["kl_direction"] == "forward KL, teacher‖student"
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert (manifest["recipe"]["loss"], manifest["recipe"]["beta"]) == (loss, None)
    assert recover(resume=result.out).summary == result.summary


def test_eval_every_logs_held_out_measurements(recipe: dict[str, Any]) -> None:
    result = recover(**{**recipe, "eval_every": 2})
    rows = [r for r in RunDirectory(result.out).rows("metrics.jsonl") if "eval/kl" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert rows[-1]["eval/kl"] == pytest.approx(result.summary["recovered"]["kl"], rel=1e-5)


def test_zero_steps_measures_only(recipe: dict[str, Any]) -> None:
    summary = recover(**{**recipe, "steps": 0}).summary
    assert summary["degraded"] == summary["recovered"]
    assert summary["gap_closed"]["kl"] == 0


def test_no_measurable_damage(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(recipe["teacher"])
    model.save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(recipe["teacher"]).save_pretrained(tmp_path / "copy")
    result = recover(**{**recipe, "student": str(tmp_path / "copy"), "steps": 1})
    assert result.summary["gap_closed"] is None
    assert result.summary["constraint"] == "none"
    assert "No measurable damage" in result.report.read_text()


def test_messages_and_plain_text_prompts(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Hi {i}"}]}
        for i in range(9)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = recover(**{**recipe, "data": str(path), "steps": 1, "held_out": 2})
    assert result.samples()[0]["prompt"].startswith("Hi ")


def test_disk_full_while_writing(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that can't be written: one message, the earlier checkpoint stays, no partial files."""
    calls = []

    def full(tensors: Any, path: Path, **extra: Any) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("remend.files.run_directory.save_file", full)
    with pytest.raises(FileError, match=r"the disk is full: .*step-000004 could not be written"):
        recover(**recipe)
    kept = Path(recipe["out"]) / "checkpoints"
    assert [p.name for p in kept.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert recover(resume=recipe["out"]).summary["steps"] == 4


def test_teacher_with_nan_weights_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(recipe["teacher"])
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(recipe["teacher"]).save_pretrained(broken)
    with pytest.raises(InputError, match="not finite"):
        recover(**{**recipe, "teacher": str(broken)})


def test_report_escapes_what_a_model_wrote(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "evil.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"<script>alert({i})</script>"}) + "\n" for i in range(8)))
    page = recover(**{**recipe, "data": str(path), "steps": 1, "held_out": 2}).report.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page


def test_adamw_state_survives_exactly(recipe: dict[str, Any]) -> None:
    result = recover(**recipe)
    saved = RunDirectory(result.out).checkpoints()[-1]
    masters, moments = load_file(saved.path / "masters.safetensors"), load_file(saved.path / "optimizer.safetensors")
    assert set(moments) == {f"{n}.{k}" for n in masters for k in ("exp_avg", "exp_avg_sq")}
    assert not list(saved.path.rglob("*.pt"))
    assert not list(saved.path.rglob("*.bin"))


def test_lora_beside_a_grid_leaves_the_base_and_learns(longer: dict[str, Any]) -> None:
    student = Path(longer["student"])
    before = {p.name: p.read_bytes() for p in student.iterdir()}
    result = recover(**{**longer, "learning_rate": 2e-2, "lora": {"rank": 8}})
    assert {p.name: p.read_bytes() for p in student.iterdir()} == before
    names = {p.name for p in result.model.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"model.safetensors", "grid.safetensors"}
    assert result.summary["gap_closed"]["kl"] > 0.1
    source = find_model(str(result.model))
    loaded = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    stored = StoredGrid.read(student)
    assert stored is not None
    weights = dict(loaded.named_parameters())
    for name, (codes, grid) in stored.matrices.items():
        on_grid = weights[name.replace(".weight", ".base_layer.weight")]
        assert on_grid.equal(decode(codes, grid, stored.format))


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 64}, {"targets": ["q_proj", "down_proj"]}])
def test_every_lora_knob_changes_the_trajectory(recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    settings = {**recipe, "save_every": 0, "learning_rate": 1e-2}
    base = recover(**{**settings, "lora": {"rank": 4}, "out": str(tmp_path / "base")})
    other = recover(**{**settings, "lora": {"rank": 4, **change}, "out": str(tmp_path / "other")})
    assert [r["loss"] for r in base.metrics] != [r["loss"] for r in other.metrics]


def test_a_student_that_is_an_adapter_is_trained_as_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = {**recipe, "save_every": 0, "learning_rate": 1e-2}
    first = recover(**{**settings, "lora": {"rank": 4}, "out": str(tmp_path / "first")})
    second = recover(**{**settings, "student": str(first.model), "out": str(tmp_path / "second")})
    assert second.summary["degraded"]["kl"] == pytest.approx(first.summary["recovered"]["kl"])
    before, after = (load_file(r.model / "adapter_model.safetensors") for r in (first, second))
    assert before.keys() == after.keys()
    assert any(not before[k].equal(after[k]) for k in before)
    with pytest.raises(InputError, match="is an adapter, which is trained as it is; leave lora out"):
        recover(**{**settings, "student": str(first.model), "lora": {"rank": 2}, "out": str(tmp_path / "third")})


def test_lora_targets_are_checked_before_any_weight_is_loaded(recipe: dict[str, Any]) -> None:
    problems = remend.check(None, **{**recipe, "lora": {"targets": ["x_proj"]}}).problems
    assert len(problems) == 1
    assert "lora.targets: x_proj is no linear layer" in problems[0]
