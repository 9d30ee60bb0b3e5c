"""Repair in a whole recovery: which text it is fitted to, that it helps, and what becomes of one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.tiny import build_model, build_tokenizer, prompts, put_on_grid, small_recipe
from helpers.worker import spoil
from remend.compression.recognise import Recognised
from remend.compression.stored_grid import StoredGrid
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.degrade.depth import prune_depth
from remend.degrade.prune import prune
from remend.degrade.width import prune_width
from remend.files.run_directory import RunDirectory
from remend.models.load import save_model
from remend.recovery import RecoverResult, recover
from remend.recovery.repair import Questions, repair
from remend.training.constraints import StudentFacts
from remend.training.constraints.mask import MaskKind


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair")
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts()))
    return path


@pytest.fixture(scope="module")
def on_the_grid(place: Path, student_dir: Path, reference_dir: Path) -> RecoverResult:
    """Repaired and not trained: what is recovered is repair's alone."""
    recipe = small_recipe(student_dir, reference_dir, place / "prompts.jsonl", place / "grid")
    return recover(**{**recipe, "repair": True, "steps": 0, "learning_rate": None})


def test_repair_lowers_the_held_out_divergence_on_the_very_grid(on_the_grid: RecoverResult, student_dir: Path) -> None:
    summary = on_the_grid.summary
    repaired, degraded = summary["repair"], summary["degraded"]
    assert repaired["kept"]
    assert repaired["kl"] < 0.7 * degraded["kl"]
    assert 0 < repaired["kl_fitted"] < degraded["kl"]
    assert "on the text it was fitted to" in (on_the_grid.out / "report.md").read_text(encoding="utf-8")
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
    recipe: dict[str, Any], reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training then starts from the very student that came in."""
    prune(str(reference_dir), tmp_path / "sparse", method="magnitude", sparsity="2:4", probe=False)
    values = {**recipe, "student": str(tmp_path / "sparse"), "steps": 2, "train_embeddings": True}
    plain = recover(**{**values, "out": str(tmp_path / "plain")})
    monkeypatch.setattr(MaskKind, "repair", spoil)
    result = recover(**{**values, "repair": True, "out": str(tmp_path / "spoiled")})
    assert plain.summary["repair"] is None
    assert result.summary["repair"]["kept"] is False
    assert result.summary["repair"]["kl"] > result.summary["degraded"]["kl"]
    assert result.summary["recovered"] == plain.summary["recovered"]
    healthy, ours, theirs = (
        load_file(path / "model.safetensors") for path in (reference_dir, result.model, plain.model)
    )
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
        given = {"student": str(tmp_path / name), "teacher": str(teacher), "repair": True, "steps": 1}
        result = recover(**{**recipe, **given, "out": str(tmp_path / f"run-{name}")})
        assert result.summary["repair"]["kl"] < result.summary["degraded"]["kl"]
        assert json.loads((result.model / "config.json").read_text())[key] == size


def test_a_padded_teacher_writes_no_calibration_text_that_the_student_can_not_read() -> None:
    tokenizer = build_tokenizer()
    student, padded = build_model(len(tokenizer)), build_model(len(tokenizer) + 512)
    padded.get_input_embeddings().weight.data[len(tokenizer) :] = (
        9.0  # an id that only the teacher has is the likeliest
    )
    facts = StudentFacts(Recognised("remend", put_on_grid(student, "int3-g64"), False, "it lies on a grid"))
    asked = [Encoded(str(i), (1, 40 + i), "") for i in range(3)]
    result = repair(student, padded, facts, Questions(tokenizer, asked, 3, 0, shared=len(tokenizer)))
    assert result.seconds > 0
    assert len(result.answers) == 3
    assert max(token for row in result.answers for token in row.completion) < len(tokenizer)


def test_calibration_prompts_are_as_many_as_asked_or_as_rows_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Encoded(str(i), tuple(range(10)), "") for i in range(5)]

    def chosen(samples: int) -> list[str]:
        return [p.id for p in Questions(build_tokenizer(), prompts, samples, 0).chosen()]

    assert len(set(chosen(4))) == 4
    assert chosen(12).count("3") >= 2  # answered again, with other draws
    first = {prompt.id for _, prompt in Order(prompts, 0).take(0, 2)}
    assert not first & set(chosen(3))  # training begins with what repair has not seen
    monkeypatch.setattr("remend.recovery.repair.MOST_ROWS", 3 * (10 + 64))
    assert len(chosen(5)) == 3
    monkeypatch.setattr("remend.recovery.repair.MOST_ROWS", 1)
    assert len(chosen(5)) == 1
