"""Fine-tuning: it learns the task, forgets some of the rest, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.tiny import prompts
from remend.data.examples import bundled
from remend.degrade.finetune import FULL_RATE, LORA_RATE, finetune
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory

QUICK: dict[str, Any] = {"steps": 3, "probe": False, "device": "cpu", "dtype": "float32"}


def write_task(folder: Path) -> str:
    rows = [{"prompt": p, "completion": "no " * (1 + i % 3)} for i, p in enumerate(prompts(12))]
    (folder / "task.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(folder / "task.jsonl")


@pytest.fixture
def task(tmp_path: Path) -> str:
    return write_task(tmp_path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def losses(path: Path) -> list[float]:
    return [row["loss"] for row in RunDirectory(path).rows(METRICS)]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_it_learns_forgets_and_records(task: str, reference_dir: Path, tmp_path: Path, lora: Any) -> None:
    out = tmp_path / "tuned"
    record = finetune(
        str(reference_dir), out, data=task, steps=30, learning_rate=1e-2 if lora else 3e-3, lora=lora, device="cpu",
        dtype="float32",
    )  # fmt: skip
    assert (record["kind"], record["method"]) == ("fine-tuning", "lora" if lora else "full")
    rows = losses(out)
    assert len(rows) == record["steps"] == 30
    assert (record["loss"]["first"], record["loss"]["last"]) == (rows[0], rows[-1])
    assert rows[-1] < 0.2 * rows[0]
    assert record["probe"]["kl"] > 0.1
    assert record["data"]["rows"] == 12
    assert len(record["data"]["hash"]) == 64
    full = sum(t.numel() for t in weights(out).values())
    assert record["trained_parameters"] == full if lora is None else record["trained_parameters"] < full / 4
    saved = AutoModelForCausalLM.from_pretrained(out)  # plain transformers opens it, a folded adapter too
    assert not hasattr(saved, "peft_config")
    assert {p.name for p in out.iterdir()} >= {"config.json", "tokenizer.json", "metrics.jsonl"}


def test_lora_moves_its_targets_only(task: str, reference_dir: Path, tmp_path: Path) -> None:
    finetune(str(reference_dir), tmp_path / "t", data=task, lora={"rank": 2, "targets": ["q_proj"]}, **QUICK)
    before, after = weights(reference_dir), weights(tmp_path / "t")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4},
        {"steps": None, "epochs": 2.0},
        {"learning_rate": 1e-3},
        {"batch_size": 2},
        {"gradient_accumulation": 2},
        {"max_tokens": 33},
        {"lora": {"rank": 4}},
        {"lora": {"rank": 2}},
        {"lora": {"rank": 4, "alpha": 1}},
        {"seed": 1},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_knob_changes_the_result(
    task: str, reference_dir: Path, tmp_path: Path, usual: Any, change: dict[str, Any]
) -> None:
    base = {**QUICK, "data": task, "lora": ADAPTER if "lora" in change else None}
    finetune(str(reference_dir), tmp_path / "other", **{**base, **change})
    assert figures(tmp_path / "other") != usual["lora" in change]


ADAPTER = {"rank": 4, "alpha": 4}


def figures(out: Path) -> list[float]:
    return [*losses(out), float(weights(out)["model.layers.0.mlp.up_proj.weight"].sum())]


@pytest.fixture(scope="module")
def usual(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """Without a change: of all weights, and of an adapter."""
    folder = tmp_path_factory.mktemp("usual")
    data = write_task(folder)
    for name, lora in (("full", None), ("lora", ADAPTER)):
        finetune(str(reference_dir), folder / name, data=data, lora=lora, **QUICK)
    return {False: figures(folder / "full"), True: figures(folder / "lora")}


def test_epochs_are_steps_over_all_rows(task: str, reference_dir: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": None, "data": task, "batch_size": 5}
    assert finetune(str(reference_dir), tmp_path / "a", **settings)["steps"] == 3
    assert finetune(str(reference_dir), tmp_path / "b", **settings, epochs=0.1)["steps"] == 1
    assert finetune(str(reference_dir), tmp_path / "c", **settings, epochs=2)["steps"] == 5


def test_rates_by_default(task: str, reference_dir: Path, tmp_path: Path) -> None:
    assert finetune(str(reference_dir), tmp_path / "a", data=task, **QUICK)["learning_rate"] == FULL_RATE
    record = finetune(str(reference_dir), tmp_path / "b", data=task, lora={}, **QUICK)
    assert (record["learning_rate"], record["lora"]["rank"]) == (LORA_RATE, 16)


def test_long_rows_are_dropped_counted_and_named(
    task: str, reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(task).open("a") as stream:
        stream.write(json.dumps({"prompt": "x", "id": "the-long-one", "completion": "no " * 300}) + "\n")
    record = finetune(str(reference_dir), tmp_path / "t", data=task, max_tokens=100, **QUICK)
    assert (record["data"]["rows"], record["data"]["dropped"]) == (12, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 13 rows have over max_tokens = 100 tokens and are dropped, not cut (the-long-one)" in said
    with pytest.raises(InputError, match=r"13 of 13 rows .* none is left. Raise max_tokens"):
        finetune(str(reference_dir), tmp_path / "u", data=task, max_tokens=3, **QUICK)
    assert not (tmp_path / "u").exists()


def test_the_data_hash_is_of_prompts_and_completions(task: str, reference_dir: Path, tmp_path: Path) -> None:
    first = finetune(str(reference_dir), tmp_path / "a", data=task, **QUICK)["data"]["hash"]
    path = Path(task)
    path.write_text(path.read_text().replace('"no no "', '"no yes "', 1))
    assert finetune(str(reference_dir), tmp_path / "b", data=task, **QUICK)["data"]["hash"] != first


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"steps": 0}, '"steps" is 0: input should be greater than or equal to 1'),
        ({"epochs": 1.0}, r"both steps \(3\) and epochs \(1.0\)"),
        ({"steps": None, "epochs": 0.0}, '"epochs" is 0.0: input should be greater than 0'),
        ({"learning_rate": float("nan")}, '"learning_rate" is nan'),
        (
            {"dtype": "float16"},
            '"dtype" is .float16.: float16 is for inference alone: training in it needs loss scaling',
        ),
        ({"lora": {"rnak": 3}}, r'unknown key "lora.rnak"\. Did you mean "rank"\?'),
        ({"lora": {"targets": ["x"]}}, "lora.targets: x is no linear layer"),
    ],
)
def test_settings_out_of_range(
    task: str, reference_dir: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        finetune(str(reference_dir), tmp_path / "t", **{**QUICK, "data": task, **change})
    assert not (tmp_path / "t").exists()


def test_an_accelerator_for_another_device_is_no_obstacle(
    task: str, reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(str(reference_dir), tmp_path / "a", data=task, **QUICK)
    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    finetune(str(reference_dir), tmp_path / "b", data=task, **QUICK)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_quantized_model_is_refused(task: str, student_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a model on a quantization grid, which fine-tuning"):
        finetune(str(student_dir), tmp_path / "t", data=task, **QUICK)


@pytest.mark.slow
def test_smollm2_forgets(smollm2_dir: Path, tmp_path: Path) -> None:
    """Twelve steps on one-word answers to everyday prompts."""
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": e.prompt, "answer": "No."} for e in bundled("train")[:64]]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    record = finetune(str(smollm2_dir), tmp_path / "t", data=str(path), steps=12, device="cpu")
    assert record["loss"]["last"] < 0.1 * record["loss"]["first"]
    assert record["probe"]["kl"] > 0.3
