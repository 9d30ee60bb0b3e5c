"""Containers: what is written reads back as what was measured, and what fits none is refused with the reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.made_reports import made_summary
from helpers.packed import needs_exact_unpacking
from helpers.patching import replace_everywhere
from helpers.tiny import build_model
from remend.compression.containers import CONTAINERS, Container
from remend.compression.stored_grid import StoredGrid
from remend.errors import FileError, InputError
from remend.exporting import check, export, verify
from remend.files.atomic import write_json
from remend.models.load import save_model
from remend.registry import Registry


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("name", ["int3-g64-asym", "nf4", "gguf:q4_0"])
def test_dense_holds_any_grid_and_opens_with_plain_transformers(on_grid: Any, tmp_path: Path, name: str) -> None:
    student = on_grid(name)
    result = export(str(student), tmp_path / "out", format="dense")
    assert result["check"]["weights_equal"]
    assert result["check"]["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(original))
    assert StoredGrid.read(tmp_path / "out") is not None


@needs_exact_unpacking
def test_tokenizer_template_generation_config_card_and_degradation_travel(on_grid: Any, tmp_path: Path) -> None:
    student = on_grid("int4-g32-sym")
    for name in ("dense", "compressed-tensors"):
        out = tmp_path / name
        export(str(student), out, format=name)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert (
            tokenizer("Tell me about rain").input_ids
            == AutoTokenizer.from_pretrained(student)("Tell me about rain").input_ids
        )
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(student).chat_template
        assert json.loads((out / "degradation.json").read_text())["format"] == "int4-g32-sym"
        assert (out / "generation_config.json").is_file()
        assert "int4-g32-sym" in (out / "README.md").read_text()
        assert json.loads((out / "export.json").read_text())["check"]["weights_equal"] is True


def test_pruned_exports_as_dense_with_zeros_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    model = build_model(len(tokenizer))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data.view(-1, 4)[:, :2] = 0
    save_model(model, tokenizer, tmp_path / "pruned")
    result = export(str(tmp_path / "pruned"), tmp_path / "out", format="dense")
    assert "dense with zeros" in result["container"]
    assert "2:4" in result["container"]


@pytest.mark.parametrize(
    ("grid", "container", "reason"),
    [
        ("int3-g64-asym", "gguf", "576 are no multiple"),
        ("int3-g64-asym", "compressed-tensors", "real number"),
        ("int3-g64-sym", "compressed-tensors", "4 or 8 bits"),
        ("int4-g32-asym", "gguf", "real number"),
        ("nf4", "compressed-tensors", "none has its values"),
        ("nf4", "gguf", "none has its values"),
        ("gguf:q4_0", "gguf:q8_0", "would change its weights"),
    ],
)
def test_a_grid_that_fits_no_such_container_is_refused_with_the_reason(
    on_grid: Any, tmp_path: Path, grid: str, container: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        export(str(on_grid(grid)), tmp_path / "out", format=container)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_unknown_format_and_occupied_directory_are_refused_before_loading(reference_dir: Path, tmp_path: Path) -> None:
    for name in ("onnx", "bitsandbytes"):  # the second is only read
        with pytest.raises(InputError, match=f'unknown container "{name}"; known: compressed-tensors, dense, gguf'):
            export(str(reference_dir), tmp_path / "out", format=name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export(str(reference_dir), tmp_path, format="dense")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_writer_that_changes_a_weight_is_an_error_and_leaves_nothing(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(measured: Any, target: Path, kind: str) -> dict[str, str]:
        measured.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-6
        save_model(measured.model, measured.tokenizer, target)
        return {"container": "careless"}

    registry: Registry[Container] = Registry("container")
    registry.register("dense", source="this test")(replace(CONTAINERS.get("dense"), write=careless))
    replace_everywhere(monkeypatch, CONTAINERS, registry)
    with pytest.raises(FileError, match=r"not what was measured.*mlp\.up_proj"):
        export(str(reference_dir), tmp_path / "out", format="dense")
    assert not (tmp_path / "out").exists()


def test_verify_sees_one_changed_weight(reference_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_dir, tmp_path / "copy")
    same = verify(tmp_path / "copy", reference_dir)
    assert same["weights_equal"]
    assert same["max_logit_difference"] == 0
    model = AutoModelForCausalLM.from_pretrained(reference_dir, dtype=torch.float32)
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 0.5
    model.save_pretrained(tmp_path / "copy")
    changed = verify(tmp_path / "copy", reference_dir)
    assert changed["different"] == ["model.layers.1.self_attn.v_proj.weight"]
    assert changed["max_weight_difference"] == pytest.approx(0.5)
    assert changed["max_logit_difference"] > 0


def test_strangers_read_in_a_process_without_remend(reference_dir: Path, own_process: None) -> None:
    done = verify(reference_dir, reference_dir)
    version = transformers.__version__
    assert done["read_by"] == f"transformers {version} (auto, which is float32; bfloat16; float16)"
    assert done["strangers"][0]["dtypes"]["auto"] == {"dtype": "float32", "kl": 0.0, "max_logit_difference": 0.0}


def test_a_stranger_whose_process_dies_read_nothing(tmp_path: Path, own_process: None) -> None:
    found = check.ask_stranger("nobody", {"path": "no such directory"})
    assert "its process ended with 1: " in found["error"]


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"dtypes": {"auto": {"error": "RuntimeError: unequal dtypes"}}}, "as auto: RuntimeError: unequal dtypes"),
        ({"dtypes": {"auto": {"dtype": "float32", "kl": 2.5}}}, "by a KL of 2.5 nats per token"),
        ({"tokens_equal": False}, "other tokens than the measured model's tokenizer"),
        ({"error": "ValueError: it gives no answer"}, "what was written: ValueError: it gives no answer"),
    ],
)
def test_what_no_stranger_reads_is_not_kept(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], fault: str
) -> None:
    monkeypatch.setattr(check, "ask_stranger", lambda reader, asked: {"reader": reader, **found})
    with pytest.raises(FileError, match=fault):
        export(str(reference_dir), tmp_path / "out", format="dense")
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_a_stranger_can_not_run_is_not_claimed(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes = {"auto": {"dtype": "float32", "kl": 0.0}, "float16": {"error": "ValueError: not finite"}}
    monkeypatch.setattr(check, "ask_stranger", lambda reader, asked: {"reader": reader, "dtypes": dtypes})
    done = export(str(reference_dir), tmp_path / "out", format="dense")
    assert done["check"]["read_by"] == "transformers (auto, which is float32)"
    assert "as float16: ValueError: not finite" in " ".join(capsys.readouterr().err.split())


def test_compare_reports_a_parameter_that_one_model_lacks(tokenizer: Any) -> None:
    tied, untied = build_model(len(tokenizer)), build_model(len(tokenizer), tied=False)
    assert "lm_head.weight" in check.compare(untied, tied)["different"]


def test_a_run_exports_its_recovered_model_and_its_figures(on_grid: Any, tmp_path: Path) -> None:
    student, mine = on_grid("int4-g32-sym"), tmp_path / "mine"
    write_json(mine / "manifest.json", {"recipe": {"student": str(student), "steps": 40, "teacher": "<b>t</b>"}})
    with pytest.raises(InputError, match="no recovered model yet"):
        export(str(mine), tmp_path / "out", format="dense")
    shutil.copytree(student, mine / "model")
    (mine / "model" / "degradation.json").unlink()
    write_json(mine / "summary.json", made_summary())
    export(str(mine), tmp_path / "out", format="dense")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "64% of the KL gap closed (95% interval 61% to 67%" in card
    assert "base_model_relation" not in card, "no base model is known"
    assert "steps: 24" in card
    assert "<b>" not in card
    assert json.loads((tmp_path / "out" / "degradation.json").read_text())["format"] == "int4-g32-sym"
