"""The real SmolLM2-135M-Instruct: quantized it is damaged, a few steps help, the real files hold what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remend.compression.grids import decode
from remend.compression.stored_grid import StoredGrid
from remend.degrade.quantize import quantize
from remend.models.find import find_model
from remend.models.load import load_model
from remend.recovery.job import check, recover
from remend.studies.demo import write_prompts

pytestmark = pytest.mark.slow
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def student(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a new directory each time: a worker that comes back to this file makes the student again
    path = tmp_path_factory.mktemp("real") / "int3"
    degradation = quantize(str(smollm2_dir), path, format="int3-g64", probe=False)
    assert degradation["matrices"] == 210
    assert degradation["bits_per_weight"] == 3.5
    return path


def test_three_steps_of_recovery_on_the_grid(smollm2_dir: Path, student: Path, tmp_path: Path) -> None:
    train, held_out = write_prompts(tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(held_out.read_text().splitlines(keepends=True)[:8]))
    result = recover(
        student=str(student),
        teacher=str(smollm2_dir),
        data=str(train),
        eval_data=str(few),
        out=str(tmp_path / "run"),
        steps=3,
        warmup_steps=1,
        learning_rate=4e-4,
        max_new_tokens=24,
        repair_samples=32,
        save_every=0,
        device="cpu",
    )
    summary = result.summary
    assert summary["degraded"]["kl"] > 1.5
    assert summary["recovered"]["kl"] < 0.75 * summary["degraded"]["kl"]
    assert summary["recovered"]["kl_on_policy"] < summary["degraded"]["kl_on_policy"]
    assert summary["recovered"]["top1_agreement"] > summary["degraded"]["top1_agreement"]
    stored, tensors = StoredGrid.read(result.model), load_file(result.model / "model.safetensors")
    assert stored is not None
    assert len(stored.matrices) == 210
    for name, (codes, grid) in stored.matrices.items():
        assert int(codes.max()) <= 7
        assert tensors[name].equal(decode(codes, grid, stored.format)), name


def test_a_step_on_prompts_that_the_reference_wrote(smollm2_dir: Path, student: Path, tmp_path: Path) -> None:
    result = recover(
        student=str(student),
        teacher=str(smollm2_dir),
        data="self",
        self_prompts=8,
        held_out=2,
        out=str(tmp_path / "run"),
        steps=1,
        warmup_steps=0,
        batch_size=4,
        max_new_tokens=16,
        save_every=0,
        device="cpu",
        repair=False,
    )
    written = [json.loads(line)["prompt"] for line in (result.out / "prompts.jsonl").read_text().splitlines()]
    assert len(set(written)) == 8
    assert json.loads((result.out / "manifest.json").read_text())["prompts"] == {"train": 6, "held_out": 2}
    assert result.metrics[0]["tokens"] > 0
    assert result.summary["recovered"]["kl"] > 0


def test_embedded_reference_lies_on_a_four_bit_grid(smollm2_dir: Path) -> None:
    """It is a dequantized Q4_1, so asymmetric 4-bit groups of 32 damage next to nothing: pages with figures say so."""
    from remend.compression.grids import GridFormat
    from remend.degrade.making.onto_grid import quantize_in_place

    model = load_model(find_model(str(smollm2_dir)), dtype=torch.float32, device=torch.device("cpu"))
    name = "model.layers.3.mlp.up_proj.weight"
    before = model.get_parameter(name).detach().clone()
    quantize_in_place(model, GridFormat.parse("int4-g32-asym"))
    after = model.get_parameter(name).detach()
    assert (after - before).norm() / before.norm() < 0.01


@pytest.mark.parametrize(("name", "key"), [("tooluse", "golden_answer"), ("science", "answer")])
def test_real_task_data_passes_the_checks(
    smollm2_dir: Path, student: Path, tmp_path: Path, name: str, key: str
) -> None:
    data = SHARED / name / "train.jsonl"
    if not data.is_file():
        pytest.skip(f"{data} is not on this machine")
    assert key in json.loads(data.read_text().split("\n")[0])
    recipe = {"student": str(student), "teacher": str(smollm2_dir), "data": str(data), "out": str(tmp_path / "run")}
    longest = 1024 if name == "science" else 8192  # the tools' descriptions are long
    checked = check(**recipe, max_prompt_tokens=longest)
    assert checked.plan is not None, checked.problems
    assert len(checked.plan.prompts.main.train) > 50
    assert checked.plan.constraint == "int3-g64-asym"
    assert max(len(p.tokens) for p in checked.plan.prompts.main.train) <= longest
