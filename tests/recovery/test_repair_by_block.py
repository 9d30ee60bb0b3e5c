"""A repair whose models are read block by block gives the same model and the same figures, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.packed import needs_exact_unpacking
from helpers.tiny import build_model, prompts
from remend.errors import CheckError, FileError
from remend.models.blocks.journal import BlockJournal
from remend.recovery.by_block import BLOCKS
from remend.recovery.job import RecoverResult

SHARED: dict[str, Any] = {
    "steps": 0,
    "repair_samples": 24,
    "held_out": 6,
    "max_new_tokens": 8,
    "device": "cpu",
    "dtype": "float32",
}
TEXT = [{"prompt": f"Say {text}", "completion": text} for text in prompts(30)]
VARIES = ("seconds", "sha256", "peak_rss_mib")


@pytest.fixture
def healthy(tmp_path: Path, tokenizer: Any) -> Path:
    """A model of three blocks, whose files hold bfloat16 in several shards."""
    model = build_model(320, layers=3, tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "healthy", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "healthy")
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts(40))
    (tmp_path / "prompts.jsonl").write_text(rows)
    return tmp_path / "healthy"


def damaged(healthy: Path, kind: str) -> Path:
    student = healthy.with_name(kind)
    if kind == "mask":
        remend.prune(healthy, student, sparsity="2:4", probe=False)
    elif kind == "depth":
        remend.prune_depth(healthy, student, layers=[1], probe=False)
    else:
        remend.quantize(healthy, student, format=kind, skip=["*.1.mlp.up_proj"], probe=False)
    return student


def settings(student: Path, healthy: Path, out: str, **more: Any) -> dict[str, Any]:
    place = healthy.parent
    given = {"student": str(student), "teacher": str(healthy), "data": str(place / "prompts.jsonl")}
    return {**SHARED, **given, "out": str(place / out), **more}


def assert_same(one: RecoverResult, other: RecoverResult) -> None:
    """Models byte for byte but for the card, and figures but for what a clock says."""
    contents = [
        {
            str(p.relative_to(run.model)): p.read_bytes()
            for p in run.model.rglob("*")
            if p.is_file() and p.suffix != ".md"
        }
        for run in (one, other)
    ]
    assert contents[0] == contents[1]
    summaries = [{key: value for key, value in run.summary.items() if key not in VARIES} for run in (one, other)]
    for summary in summaries:
        del summary["repair"]["seconds"]
    assert summaries[0] == summaries[1]
    for name in ("held_out.jsonl", "held_out_repaired.jsonl", "samples.jsonl", "worst.jsonl", "baseline.json"):
        assert (one.out / name).read_bytes() == (other.out / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("int3-g32", {}),
        ("int3-g32", {"dtype": "auto", "max_shard_size": "100KB"}),
        ("nvfp4", {"placement": {"student": "disk"}}),
        ("mask", {"placement": {"teacher": "disk"}}),
        ("mask", {"diagnose_every": 1, "save_dtype": "bfloat16"}),
        ("depth", {}),
        ("int3-g32", {"repair_text": TEXT}),
    ],
)
def test_a_repair_block_by_block_is_the_same(healthy: Path, kind: str, more: dict[str, Any]) -> None:
    student = damaged(healthy, kind)
    placement = more.pop("placement", "disk")
    whole = remend.recover(**settings(student, healthy, "whole", **more))
    parts = remend.recover(**settings(student, healthy, "parts", placement=placement, **more))
    assert whole.summary["repair"]["kept"]
    assert_same(whole, parts)
    assert not (parts.out / BLOCKS).exists()


def test_a_repair_that_harms_is_undone(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = damaged(healthy, "int3-g32")
    monkeypatch.setattr("remend.models.activations.walk.Walked.worse", True)
    whole = remend.recover(**settings(student, healthy, "whole"))
    parts = remend.recover(**settings(student, healthy, "parts", placement="disk"))
    assert not parts.summary["repair"]["kept"]
    assert_same(whole, parts)


KILLED = """
import json, os, signal, sys
import remend
from remend.models.blocks.journal import BlockJournal

whole = BlockJournal.settle
def settle(self, index, block, about):
    if index == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, index, block, about)
BlockJournal.settle = settle
remend.recover(**json.loads(sys.argv[1]))
"""


def killed(given: dict[str, Any], block: int) -> None:
    command = [sys.executable, "-c", KILLED, json.dumps(given), str(block)]
    died = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()


@pytest.mark.parametrize(("kind", "block"), [("int3-g32", 0), ("int3-g32", 2), ("mask", 1)])
def test_a_killed_repair_goes_on_at_its_block(
    healthy: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = damaged(healthy, kind)
    whole = remend.recover(**settings(student, healthy, "whole"))
    killed(settings(student, healthy, "parts", placement="disk"), block)
    settled: list[int] = []
    settle = BlockJournal.settle
    monkeypatch.setattr(BlockJournal, "settle", lambda self, i, b, a: (settled.append(i), settle(self, i, b, a)))
    parts = remend.recover(resume=healthy.with_name("parts"))
    assert settled == list(range(block, 3))
    assert_same(whole, parts)


def test_a_block_that_changed_after_a_kill_is_refused(healthy: Path) -> None:
    student = damaged(healthy, "int3-g32")
    killed(settings(student, healthy, "parts", placement="disk"), 2)
    path = healthy.with_name("parts") / BLOCKS / "block-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"block-00001\.safetensors changed since it was written; remove it"):
        remend.recover(resume=healthy.with_name("parts"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"steps": 4}, "steps is 4, and training holds all weights in memory; set steps to 0"),
        ({"lora": {"rank": 2}}, "an adapter is trained"),
    ],
)
def test_placements_that_cannot_be(healthy: Path, more: dict[str, Any], words: str) -> None:
    student = damaged(healthy, "int3-g32")
    with pytest.raises(CheckError, match=words):
        remend.recover(**settings(student, healthy, "parts", placement="disk", **more))
    assert not healthy.with_name("parts").exists()


def test_a_disk_that_is_too_small_for_model_and_blocks_is_a_problem(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = damaged(healthy, "int3-g32")
    monkeypatch.setattr("remend.recovery.preflight.free_disk", lambda out: 100_000)
    said = r"the run writes up to .* MiB \(the model, the repaired blocks\) and 0\.1 MiB are free; free some space, or"
    with pytest.raises(CheckError, match=said):
        remend.recover(**settings(student, healthy, "parts", placement="disk"))
    assert not healthy.with_name("parts").exists()


@needs_exact_unpacking
def test_a_packed_student_is_not_read_block_by_block(healthy: Path) -> None:
    student = damaged(healthy, "int4-g32-sym")
    remend.export(student, healthy.with_name("packed"), format="compressed-tensors")
    with pytest.raises(CheckError, match=r"packed: its weights are packed by compressed-tensors.*format dense"):
        remend.recover(**settings(healthy.with_name("packed"), healthy, "parts", placement="disk"))


def test_auto_goes_by_the_free_memory(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = damaged(healthy, "int3-g32")

    def told(**more: Any) -> list[str]:
        plan = remend.check(**settings(student, healthy, "a", **more)).plan
        assert plan is not None
        said = [line for line in plan.chosen if line.startswith("placement: disk for ")]
        assert len(said) == plan.placed.student.by_block + plan.placed.teacher.by_block
        return said

    assert told() == []
    monkeypatch.setattr("remend.models.blocks.placement.free_bytes", lambda device: 10**6)
    assert len(told()) == 2
    assert told(steps=4) == []
