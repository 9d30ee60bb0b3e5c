"""Recovery of compressed students: recognised by their files, repaired first, and held to what they came with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.recovering import assert_equal_runs, forget_hashes, torn_copy, weights
from helpers.tiny import build_model, small_recipe
from helpers.worker import spoil
from remend.compression.stored_grid import StoredGrid
from remend.degrade.depth import prune_depth
from remend.degrade.finetune import finetune
from remend.degrade.prune import prune
from remend.degrade.width import prune_width
from remend.errors import CheckError, InputError
from remend.files.run_directory import RunDirectory
from remend.models.load import save_model
from remend.recovery.job import RecoverResult, check, recover
from remend.training.constraints.mask import MaskKind


@pytest.fixture(scope="module")
def sparse(place: Path, reference_dir: Path) -> Path:
    prune(str(reference_dir), place / "sparse", method="magnitude", sparsity="2:4", probe=False)
    return place / "sparse"


@pytest.fixture(scope="module")
def masked(place: Path, sparse: Path, reference_dir: Path) -> RecoverResult:
    recipe = small_recipe(sparse, reference_dir, place / "prompts.jsonl", place / "masked")
    return recover(**{**recipe, "repair": True, "repair_samples": 16, "weight_decay": 0.1, "learning_rate": None})


def zeros(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor == 0 for name, tensor in weights(directory).items() if "proj" in name}


def test_zeros_stay_zero_through_repair_training_and_saving(masked: RecoverResult, sparse: Path) -> None:
    before, after, summary = zeros(sparse), zeros(masked.model), masked.summary
    assert all(float(z.float().mean()) == pytest.approx(0.5, abs=0.01) for z in before.values())
    assert all(after[name].equal(z) for name, z in before.items())
    assert summary["repair"]["kl"] < summary["degraded"]["kl"]
    assert "(2:4)" in summary["constraint"]
    assert summary["learning_rate"] == 2e-4
    assert any("exactly zero, in the pattern 2:4" in note for note in summary["notes"])


def test_embeddings_that_the_damage_left_alone_are_not_trained(masked: RecoverResult, reference_dir: Path) -> None:
    before, after = weights(reference_dir), weights(masked.model)
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])
    assert not after["model.norm.weight"].equal(before["model.norm.weight"])


def test_a_masked_run_resumes_exactly(masked: RecoverResult, tmp_path: Path) -> None:
    """The checkpoint holds what came of repair."""
    assert_equal_runs(masked, recover(resume=torn_copy(masked.out, tmp_path / "torn", 2)))


@pytest.fixture(scope="module")
def on_the_grid(place: Path, student_dir: Path, reference_dir: Path) -> RecoverResult:
    """Repaired and not trained: what is recovered is repair's alone."""
    recipe = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", place / "only-repaired")
    return recover(**{**recipe, "repair": True, "steps": 0, "learning_rate": None, "repair_samples": 16})


def test_repair_lowers_the_held_out_divergence_on_the_very_grid(on_the_grid: RecoverResult, student_dir: Path) -> None:
    summary = on_the_grid.summary
    repaired, degraded = summary["repair"], summary["degraded"]
    assert repaired["kept"]
    assert repaired["kl"] < 0.7 * degraded["kl"]
    assert 0 < repaired["kl_fitted"] < degraded["kl"]
    assert "the text that it was fitted to has KL" in (on_the_grid.out / "report.md").read_text(encoding="utf-8")
    assert summary["recovered"]["kl"] == pytest.approx(repaired["kl"], rel=1e-4)
    assert (summary["constraint"], summary["learning_rate"]) == ("int3-g64-asym", 1e-4)
    rows = RunDirectory(on_the_grid.out).rows("held_out_repaired.jsonl")
    assert sum(r["kl_sum"] for r in rows) / sum(r["tokens"] for r in rows) == pytest.approx(repaired["kl"])
    before, after = StoredGrid.read(student_dir), StoredGrid.read(on_the_grid.model)
    assert all(grid.scales.equal(before.matrices[n][1].scales) for n, (_, grid) in after.matrices.items())


def test_more_calibration_text_makes_a_better_repair(
    on_the_grid: RecoverResult, recipe: dict[str, Any], tmp_path: Path
) -> None:
    one = recover(**{**recipe, "repair": True, "steps": 0, "repair_samples": 1})
    assert on_the_grid.summary["repair"]["kl"] < one.summary["repair"]["kl"]


def test_a_repair_that_makes_things_worse_is_undone(
    recipe: dict[str, Any], sparse: Path, reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training then starts from the very student that came in."""
    values = {**recipe, "student": str(sparse), "steps": 2, "train_embeddings": True}
    plain = recover(**{**values, "out": str(tmp_path / "plain")})
    monkeypatch.setattr(MaskKind, "repair", spoil)
    result = recover(**{**values, "repair": True, "repair_samples": 6, "out": str(tmp_path / "spoiled")})
    assert plain.summary["repair"] is None
    assert result.summary["repair"]["kept"] is False
    assert result.summary["repair"]["kl"] > result.summary["degraded"]["kl"]
    assert result.summary["recovered"] == plain.summary["recovered"]
    healthy, ours, theirs = (weights(path) for path in (reference_dir, result.model, plain.model))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert not ours["model.embed_tokens.weight"].equal(healthy["model.embed_tokens.weight"])  # as train_embeddings asks
    assert "undone" in (Path(result.out) / "report.md").read_text(encoding="utf-8")


def test_smaller_students_are_repaired_and_keep_their_shape(
    recipe: dict[str, Any], reference_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    save_model(build_model(len(tokenizer), layers=4), tokenizer, tmp_path / "deep")
    prune_depth(str(tmp_path / "deep"), tmp_path / "cut", layers=[1], method="list", probe=False)
    prune_width(str(reference_dir), tmp_path / "narrow", ffn=0.5, probe=False)
    for name, teacher, key, size in (
        ("cut", tmp_path / "deep", "num_hidden_layers", 3),
        ("narrow", reference_dir, "intermediate_size", 64),
    ):
        given = {
            "student": str(tmp_path / name),
            "teacher": str(teacher),
            "repair": True,
            "repair_samples": 8,
            "steps": 1,
        }
        result = recover(**{**recipe, **given, "out": str(tmp_path / f"run-{name}")})
        assert result.summary["repair"]["kl"] < result.summary["degraded"]["kl"]
        assert json.loads((result.model / "config.json").read_text())[key] == size


def test_trained_embeddings_beside_an_adapter_are_warned_about(recipe: dict[str, Any], sparse: Path) -> None:
    given = {**recipe, "student": str(sparse), "train_embeddings": True}
    said = "train_embeddings has no effect, since an adapter is trained"
    assert said in check(**{**given, "lora": {"rank": 2}}).warnings
    assert said not in check(**given).warnings


@pytest.mark.parametrize("sparsity", ["0.04", "0.3"])
def test_a_recorded_mask_is_held_whatever_its_share(
    recipe: dict[str, Any], reference_dir: Path, tmp_path: Path, sparsity: str
) -> None:
    prune(str(reference_dir), tmp_path / "thin", method="magnitude", sparsity=sparsity, probe=False)
    assert "held to mask" in check(**{**recipe, "student": str(tmp_path / "thin")}).verdict()


def test_files_that_are_not_what_they_say_are_refused_in_one_message(
    recipe: dict[str, Any], sparse: Path, student_dir: Path, reference_dir: Path, tmp_path: Path
) -> None:
    """Zeros that are gone, another model's grid (which repair would hide), and a file that was cut short."""
    for name, student in (("filled", sparse), ("stale", student_dir)):
        shutil.copytree(student, tmp_path / name)
        shutil.copy(reference_dir / "model.safetensors", tmp_path / name)
        forget_hashes(tmp_path / name)
    filled = {**recipe, "student": str(tmp_path / "filled")}
    with pytest.raises(CheckError, match=r"50\.0% of the weights are zero, and the files hold no zeros"):
        recover(**filled)
    assert check(**{**filled, "as_dense": True}).problems == []
    with pytest.raises(InputError, match="does not lie on its grid"):
        recover(**{**recipe, "student": str(tmp_path / "stale"), "repair": True})
    file = tmp_path / "filled" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckError, match="its weights can't be read"):
        recover(**filled)


def test_a_gguf_student_that_was_cut_short_is_one_message(recipe: dict[str, Any], on_grid: Any, tmp_path: Path) -> None:
    remend.export(str(on_grid("gguf:q4_0")), tmp_path / "gguf", format="gguf:q4_0")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    assert check(**{**recipe, "student": str(file)}).problems == []
    file.write_bytes(file.read_bytes()[:-2000])
    problems = check(**{**recipe, "student": str(file)}).problems
    assert any("model.gguf of" in problem and "changed or can't be read" in problem for problem in problems)
    for record in ("export.json", "degradation.json"):
        (tmp_path / "gguf" / record).unlink(missing_ok=True)
    problems = check(**{**recipe, "student": str(file)}).problems
    assert any("model.gguf can't be understood" in problem for problem in problems), problems


def test_adapters_and_masks_are_not_degraded_unseen(recipe: dict[str, Any], sparse: Path, tmp_path: Path) -> None:
    result = recover(**{**recipe, "student": str(sparse), "steps": 0, "lora": {"rank": 2}})
    assert not (result.model / "degradation.json").exists(), "its base keeps the record"
    with pytest.raises(InputError, match="is an adapter on a base"):
        prune(str(result.model), tmp_path / "x", method="magnitude", sparsity="0.5", probe=False)
    with pytest.raises(InputError, match="is an adapter, which stays apart from its base"):
        remend.export(str(result.out), tmp_path / "y", format="dense")
    rows = tmp_path / "task.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match="a pruned model, which fine-tuning all together would give up"):
        finetune(str(sparse), tmp_path / "z", data=str(rows), probe=False)


def test_the_recovered_model_keeps_its_students_record(
    recipe: dict[str, Any], reference_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thin mask outlives two recoveries, a layer map one, and an export finds the record from anywhere."""
    monkeypatch.chdir(tmp_path)
    save_model(build_model(len(tokenizer), layers=4), tokenizer, Path("deep"))
    prune(str(reference_dir), "thin", method="magnitude", sparsity="0.04", probe=False)
    prune_depth("deep", "cut", layers=[1], method="list", probe=False)

    def record(directory: Path) -> dict[str, Any]:
        facts = dict(json.loads((directory / "degradation.json").read_text()))
        return {key: value for key, value in facts.items() if key not in ("files", "sha256")}  # of one directory

    values = {**recipe, "steps": 1, "save_every": 0}
    first = recover(**{**values, "student": "thin", "out": "a"})
    second = recover(**{**values, "student": str(first.model), "out": "b"})
    assert second.summary["constraint"].startswith("mask, 4.0% zeros")
    assert all(zeros(second.model)[n].equal(z) for n, z in zeros(Path("thin")).items())
    shallow = recover(**{**values, "student": "cut", "teacher": "deep", "out": "c"})
    assert record(shallow.model) == record(Path("cut"))
    assert record(shallow.model)["layer_map"] == [0, 2, 3]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    remend.export(str(tmp_path / "b"), "out", format="dense")
    assert record(Path("out")) == record(tmp_path / "thin")


def test_a_record_that_is_no_longer_true_is_left_behind(
    recipe: dict[str, Any], student_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(student_dir, tmp_path / "freed")
    (tmp_path / "freed" / "remend" / "grid.safetensors").unlink()
    forget_hashes(tmp_path / "freed")
    freed = recover(**{**recipe, "steps": 0, "as_dense": True, "student": str(tmp_path / "freed")})
    assert freed.summary["constraint"] == "none"
    assert not (freed.model / "degradation.json").exists()
    assert check(**{**recipe, "student": str(freed.model), "out": str(tmp_path / "x")}).problems == []
