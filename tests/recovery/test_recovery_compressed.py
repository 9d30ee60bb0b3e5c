"""Recovery of pruned, shallower, narrower and foreign students: repaired first, and held to what they came with."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remend
from helpers.killing import kill_at
from helpers.tiny import build_model, build_tokenizer
from remend.compression.stored_grid import StoredGrid
from remend.degrade.depth import prune_depth
from remend.degrade.finetune import finetune
from remend.degrade.prune import prune
from remend.degrade.width import prune_width
from remend.errors import CheckError, InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.models.find import find_model
from remend.models.layers import kept_weights
from remend.models.load import load_model, save_model
from remend.recovery import check, recover, run, settings
from remend.recovery.repair import Repaired
from remend.recovery.training import learning_rate
from remend.training.constraints.mask import Masked


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A healthy model of four layers."""
    path = tmp_path_factory.mktemp("deep") / "reference"
    save_model(build_model(len(tokenizer), layers=4), tokenizer, path)
    return path


@pytest.fixture
def sparse(reference_dir: Path, tmp_path: Path) -> Path:
    prune(str(reference_dir), tmp_path / "sparse", method="magnitude", sparsity="2:4", probe=False)
    return tmp_path / "sparse"


def zeros(path: Path) -> dict[str, torch.Tensor]:
    return {n: t == 0 for n, t in load_file(path / "model.safetensors").items() if "proj" in n}


@pytest.mark.parametrize("repair", [True, False])
def test_zeros_stay_zero_through_repair_training_and_saving(recipe: dict[str, Any], sparse: Path, repair: bool) -> None:
    result = recover(**{**recipe, "student": str(sparse), "repair": repair, "weight_decay": 0.1, "steps": 3})
    before, after = zeros(sparse), zeros(result.model)
    assert all(float(z.float().mean()) == pytest.approx(0.5, abs=0.01) for z in before.values())
    assert all(after[name].equal(z) for name, z in before.items())
    assert "(2:4)" in result.summary["constraint"]
    assert any("exactly zero, in the pattern 2:4" in note for note in result.summary["notes"])


def test_a_masked_run_killed_and_resumed_equals_uninterrupted(
    recipe: dict[str, Any], sparse: Path, tmp_path: Path
) -> None:
    """With repair: the checkpoint holds what came of it."""
    values = {**recipe, "student": str(sparse), "repair": True, "steps": 4}
    whole = recover(**{**values, "out": str(tmp_path / "whole")})
    kill_at({**values, "out": str(tmp_path / "torn")}, 3)
    resumed = recover(resume=str(tmp_path / "torn"))
    assert (tmp_path / "torn" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    ours, theirs = (load_file(r.model / "model.safetensors") for r in (whole, resumed))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert whole.summary["repair"]["kl"] == resumed.summary["repair"]["kl"]


def test_gradients_at_zeros_take_no_part_in_the_norm(sparse: Path) -> None:
    model = load_model(find_model(str(sparse)), dtype=torch.float32, device=torch.device("cpu"))
    held = Masked(model)
    for parameter in held.masters().values():
        parameter.grad = torch.ones_like(parameter)
    held.take_gradients()
    for name, kept in kept_weights(model).items():
        gradient = held.masters()[name].grad
        assert gradient is not None
        assert float(gradient.sum()) == float(kept.sum())


def test_a_model_without_zeros_has_no_mask(reference_dir: Path) -> None:
    model = load_model(find_model(str(reference_dir)), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(InputError, match="no sparsity mask to keep"):
        Masked(model)


def test_repair_lowers_the_held_out_divergence_before_the_first_step(recipe: dict[str, Any]) -> None:
    result = recover(**{**recipe, "repair": True, "steps": 0})
    repair, degraded = result.summary["repair"], result.summary["degraded"]
    assert repair["kl"] < 0.7 * degraded["kl"]
    assert 0 < repair["kl_fitted"] < degraded["kl"]
    assert "on the text it was fitted to" in (Path(result.out) / "report.md").read_text(encoding="utf-8")
    assert result.summary["recovered"]["kl"] == pytest.approx(repair["kl"], rel=1e-4)
    rows = RunDirectory(result.out).rows("held_out_repaired.jsonl")
    assert sum(r["kl_sum"] for r in rows) / sum(r["tokens"] for r in rows) == pytest.approx(repair["kl"])
    before, after = StoredGrid.read(Path(recipe["student"])), StoredGrid.read(result.model)
    assert before is not None
    assert after is not None
    assert all(grid.scales.equal(before.matrices[n][1].scales) for n, (_, grid) in after.matrices.items())


def test_a_repair_that_makes_things_worse_is_undone(
    recipe: dict[str, Any], sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training then starts from the very student that came in."""
    plain = recover(**{**recipe, "student": str(sparse), "repair": False, "out": str(tmp_path / "plain")})

    def spoil(student: Any, *_: Any, **_keywords: Any) -> Repaired:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.5)
        return Repaired(None, 1.0)

    monkeypatch.setattr(run, "repair", spoil)
    result = recover(**{**recipe, "student": str(sparse), "repair": True, "out": str(tmp_path / "spoiled")})
    assert result.summary["repair"]["kept"] is False
    assert result.summary["repair"]["kl"] > result.summary["degraded"]["kl"]
    assert result.summary["recovered"] == plain.summary["recovered"]
    ours, theirs = (load_file(r.model / "model.safetensors") for r in (result, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "undone" in (Path(result.out) / "report.md").read_text(encoding="utf-8")


def test_more_calibration_text_makes_another_repair(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = [
        recover(**{**recipe, "repair": True, "steps": 0, "repair_samples": n, "out": str(tmp_path / str(n))})
        for n in (1, 60)
    ]
    few, many = (result.summary["repair"]["kl"] for result in found)
    assert many < few


def test_a_padded_teacher_writes_no_calibration_text_that_the_student_can_not_read(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = build_tokenizer()
    padded = build_model(len(tokenizer) + 512)
    with torch.no_grad():  # an id that only the teacher has is always the likeliest
        padded.get_input_embeddings().weight[len(tokenizer) :] = 9.0
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    result = recover(**{**recipe, "teacher": str(tmp_path / "padded"), "repair": True, "steps": 0})
    assert result.summary["repair"]["kl"] >= 0


def test_without_repair_none_is_reported(recipe: dict[str, Any]) -> None:
    assert recover(**{**recipe, "steps": 0}).summary["repair"] is None


def test_a_shallower_student_is_repaired_through_its_layer_map(
    recipe: dict[str, Any], deep_dir: Path, tmp_path: Path
) -> None:
    prune_depth(str(deep_dir), tmp_path / "cut", layers=[1], method="list", probe=False)
    values = {**recipe, "student": str(tmp_path / "cut"), "teacher": str(deep_dir), "repair": True, "steps": 0}
    declared = recover(**{**values, "out": str(tmp_path / "a")}).summary["repair"]["kl"]
    wrong = recover(**{**values, "out": str(tmp_path / "b"), "layer_map": [0, 1, 2]}).summary["repair"]["kl"]
    (tmp_path / "cut" / "degradation.json").unlink()
    inferred = recover(**{**values, "out": str(tmp_path / "c")})
    assert inferred.summary["repair"]["kl"] == declared != wrong
    assert declared < inferred.summary["degraded"]["kl"]


def test_a_narrower_student_is_repaired_and_keeps_its_shape(
    recipe: dict[str, Any], reference_dir: Path, tmp_path: Path
) -> None:
    prune_width(str(reference_dir), tmp_path / "narrow", ffn=0.5, probe=False)
    summary = recover(**{**recipe, "student": str(tmp_path / "narrow"), "repair": True, "steps": 1}).summary
    assert summary["repair"]["kl"] < summary["degraded"]["kl"]
    assert json.loads((Path(recipe["out"]) / "model" / "config.json").read_text())["intermediate_size"] == 64


def test_a_fine_tuned_student_is_not_repaired(
    recipe: dict[str, Any], reference_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    rows = [{**json.loads(line), "completion": "No."} for line in prompt_file.read_text().splitlines()]
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(str(reference_dir), tmp_path / "tuned", data=str(data), steps=3, learning_rate=1e-2, probe=False)
    summary = recover(**{**recipe, "student": str(tmp_path / "tuned"), "repair": True, "steps": 1}).summary
    assert (summary["repair"], summary["constraint"]) == (None, "none")


def test_a_padded_vocabulary_alone_is_no_cut(
    recipe: dict[str, Any], reference_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = load_model(find_model(str(reference_dir)), dtype=torch.float32, device=torch.device("cpu"))
    padded: Any = copy.deepcopy(model)
    padded.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    save_model(padded, tokenizer, tmp_path / "padded")
    result = recover(**{**recipe, "student": str(tmp_path / "padded"), "repair": True, "steps": 0})
    assert result.summary["repair"] is None


def test_trained_embeddings_beside_an_adapter_are_warned_about(recipe: dict[str, Any], sparse: Path) -> None:
    given = {**recipe, "student": str(sparse), "train_embeddings": True}
    said = "train_embeddings has no effect, since an adapter is trained"
    assert said in check(**{**given, "lora": {"rank": 2}}).warnings
    assert said not in check(**given).warnings


def test_what_cant_be_held_is_refused_unless_it_is_taken_as_dense(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A grid whose file is gone: the record says that there was one."""
    student = tmp_path / "lost"
    student.mkdir()
    for file in Path(recipe["student"]).iterdir():
        if file.name != "grid.safetensors":
            (student / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckError, match=r"grid\.safetensors is missing"):
        recover(**{**recipe, "student": str(student)})
    assert recover(**{**recipe, "student": str(student), "as_dense": True}).summary["constraint"] == "none"


def test_changed_inputs_are_not_resumed(recipe: dict[str, Any], tmp_path: Path) -> None:
    kill_at({**recipe, "out": str(tmp_path / "torn")}, 3)
    data = Path(recipe["data"])
    data.write_text(data.read_text().replace("number 1.", "number one."))
    with pytest.raises(InputError, match=r"the files of data changed.*start a new run"):
        recover(resume=str(tmp_path / "torn"))


def test_an_unknown_tracker_is_named_with_the_known_ones(recipe: dict[str, Any]) -> None:
    found = check(**{**recipe, "report_to": "tensorbord"})
    assert any('unknown report_to "tensorbord"' in p and "tensorboard" in p for p in found.problems)


def test_remend_export_stays_a_function(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A module of that name would shadow it after its first use."""
    for name in ("a", "b"):
        done = remend.export(recipe["student"], tmp_path / name, format="dense")
        assert done["check"]["weights_equal"]


@pytest.mark.parametrize("sparsity", ["0.04", "0.3"])
def test_a_recorded_mask_is_held_whatever_its_share(
    recipe: dict[str, Any], reference_dir: Path, tmp_path: Path, sparsity: str
) -> None:
    prune(str(reference_dir), tmp_path / "thin", method="magnitude", sparsity=sparsity, probe=False)
    assert check(**{**recipe, "student": str(tmp_path / "thin")}).constraint.startswith("mask")


def test_a_recorded_mask_that_is_gone_is_a_problem(
    recipe: dict[str, Any], sparse: Path, reference_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(reference_dir / "model.safetensors", sparse)
    with pytest.raises(CheckError, match=r"50\.0% of the weights are zero, and the files hold no zeros"):
        recover(**{**recipe, "student": str(sparse)})
    assert check(**{**recipe, "student": str(sparse), "as_dense": True}).problems == []


def test_another_models_grid_is_refused_before_repair_hides_it(
    recipe: dict[str, Any], student_dir: Path, reference_dir: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(student_dir, stale)
    shutil.copy(reference_dir / "model.safetensors", stale)
    with pytest.raises(InputError, match="does not lie on its grid"):
        recover(**{**recipe, "student": str(stale), "repair": True})


def test_a_student_that_was_cut_short_is_one_message(recipe: dict[str, Any], sparse: Path) -> None:
    file = sparse / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckError, match="its weights can't be read"):
        recover(**{**recipe, "student": str(sparse)})


def test_a_gguf_student_that_was_cut_short_is_one_message(recipe: dict[str, Any], on_grid: Any, tmp_path: Path) -> None:
    remend.export(str(on_grid("gguf:q4_0")), tmp_path / "gguf", format="gguf:q4_0")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    assert check(**{**recipe, "student": str(file)}).problems == []
    file.write_bytes(file.read_bytes()[:-2000])
    assert any("its weights can't be read" in problem for problem in check(**{**recipe, "student": str(file)}).problems)


@pytest.mark.parametrize("given", [[0], [1, 0], [-1, 1]])
def test_a_layer_map_that_does_not_fit(recipe: dict[str, Any], given: list[int]) -> None:
    assert any("layer_map" in problem for problem in check(**{**recipe, "layer_map": given}).problems)


def test_adapters_and_masks_are_not_degraded_unseen(recipe: dict[str, Any], sparse: Path, tmp_path: Path) -> None:
    result = recover(**{**recipe, "steps": 1, "lora": {"rank": 2}, "out": str(tmp_path / "lora")})
    with pytest.raises(InputError, match="is an adapter on a base"):
        prune(str(result.model), tmp_path / "x", method="magnitude", sparsity="0.5", probe=False)
    with pytest.raises(InputError, match="is an adapter, which stays apart from its base"):
        remend.export(str(result.out), tmp_path / "y", format="dense")
    rows = tmp_path / "task.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match="a pruned model, which fine-tuning all together would give up"):
        finetune(str(sparse), tmp_path / "z", data=str(rows), probe=False)


def test_the_learning_rate_is_by_what_is_trained(
    recipe: dict[str, Any], sparse: Path, deep_dir: Path, on_grid: Any, tmp_path: Path
) -> None:
    values = {k: v for k, v in recipe.items() if k != "learning_rate"} | {"repair": True, "steps": 0}

    def rate(**change: Any) -> float:
        config = settings(None, {**values, **change})
        return learning_rate(config, check(**{**values, **change}))

    fine, coarse = str(on_grid("int4-g32-sym")), str(on_grid("int3-g64"))
    assert (rate(student=coarse), rate(student=fine), rate(student=str(sparse))) == (1e-4, 5e-5, 2e-4)
    assert rate(student=coarse, repair=False) == 2e-4
    prune_depth(str(deep_dir), tmp_path / "cut", layers=[1], method="list", probe=False)
    assert rate(student=str(tmp_path / "cut"), teacher=str(deep_dir)) == 2e-4
    assert (rate(student=fine, repair=False), rate(lora={"rank": 2})) == (2e-4, 2e-3)
    assert rate(student=fine, learning_rate=3e-3) == 3e-3


def test_the_recovered_model_keeps_its_students_record(
    recipe: dict[str, Any], reference_dir: Path, deep_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thin mask and a layer map outlive two recoveries, and an export finds the record from anywhere."""
    monkeypatch.chdir(tmp_path)
    prune(str(reference_dir), "thin", method="magnitude", sparsity="0.04", probe=False)
    prune_depth(str(deep_dir), "cut", layers=[1], method="list", probe=False)
    values = {**recipe, "steps": 1, "save_every": 0}
    first = recover(**{**values, "student": "thin", "out": "a"})
    second = recover(**{**values, "student": str(first.model), "out": "b"})
    assert second.summary["constraint"].startswith("mask, 4.0% zeros")
    assert all(zeros(second.model)[n].equal(z) for n, z in zeros(Path("thin")).items())
    shallow = recover(**{**values, "student": "cut", "teacher": str(deep_dir), "out": "c"})
    again = check(**{**values, "student": str(shallow.model), "teacher": str(deep_dir), "out": "d"})
    assert again.layer_map == [0, 2, 3]
    record = json.loads((tmp_path / "thin" / "degradation.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    remend.export(str(tmp_path / "b"), "out", format="dense")
    assert json.loads(Path("out/degradation.json").read_text()) == record


def test_a_record_that_is_no_longer_true_is_left_behind(
    recipe: dict[str, Any], student_dir: Path, sparse: Path, tmp_path: Path
) -> None:
    shutil.copytree(student_dir, tmp_path / "freed")
    (tmp_path / "freed" / "grid.safetensors").unlink()
    values = {**recipe, "steps": 0, "as_dense": True}
    freed = recover(**{**values, "student": str(tmp_path / "freed")})
    assert not (freed.model / "degradation.json").exists()
    assert check(**{**recipe, "student": str(freed.model), "out": str(tmp_path / "x")}).problems == []
    lora = recover(**{**recipe, "student": str(sparse), "steps": 0, "lora": {"rank": 2}, "out": str(tmp_path / "l")})
    assert not (lora.model / "degradation.json").exists(), "its base keeps the record"


@pytest.mark.parametrize("train", [False, True])
def test_healthy_embeddings_are_trained_only_when_asked(
    recipe: dict[str, Any], sparse: Path, reference_dir: Path, train: bool
) -> None:
    result = recover(**{**recipe, "student": str(sparse), "steps": 2, "train_embeddings": train})
    before, after = (load_file(path / "model.safetensors") for path in (reference_dir, result.model))
    name = "model.embed_tokens.weight"
    assert after[name].equal(before[name]) is not train
    assert not after["model.norm.weight"].equal(before["model.norm.weight"])
