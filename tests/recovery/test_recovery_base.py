"""`teacher: base`: an adapter's own base is the reference, in the same memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.patching import replace_everywhere
from remend.models.adapters import add_lora, save_adapter
from remend.models.load import load_model
from remend.recovery.job import check, recover


@pytest.fixture
def adapted(recipe: dict[str, Any], reference_dir: Path, tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose student is an adapter on the reference, and is damaged by it."""
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    add_lora(model, rank=2, base=str(reference_dir))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    path = tmp_path / "adapter"
    save_adapter(model, path)
    tokenizer.save_pretrained(path)
    return {**recipe, "student": str(path), "save_every": 0, "learning_rate": 1e-2}


def test_the_base_is_the_reference_and_no_second_copy(
    adapted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(source: Any, **rest: Any) -> Any:
        loaded.append(source.spec)
        return load_model(source, **rest)

    replace_everywhere(monkeypatch, load_model, counted)
    result = recover(**{**adapted, "teacher": "base", "eval_every": 2})
    student, out = adapted["student"], str(result.model)
    # the base is read once; the adapter is laid on it as it came, and once more as saved
    assert [name for name in loaded if name in (student, out)] == [student, out]
    assert len(loaded) == 3
    apart = recover(**{**adapted, "eval_every": 2, "out": str(tmp_path / "apart")})
    assert result.summary["degraded"]["kl"] == pytest.approx(apart.summary["degraded"]["kl"], rel=1e-5)
    assert result.summary["recovered"]["kl"] == pytest.approx(apart.summary["recovered"]["kl"], rel=1e-3)
    assert result.summary["recovered"]["kl"] < result.summary["degraded"]["kl"]
    hashes = [json.loads((r.out / "manifest.json").read_text())["models"]["teacher"] for r in (result, apart)]
    assert hashes[0] == hashes[1]
    # merged, it is measured against the base too
    merged = recover(**{**adapted, "teacher": "base", "eval_every": 2, "merge": True, "out": str(tmp_path / "merged")})
    assert merged.summary["recovered"]["kl"] == pytest.approx(result.summary["recovered"]["kl"], rel=1e-3)


def test_streams_may_have_the_base_alone(adapted: dict[str, Any]) -> None:
    values = {k: v for k, v in adapted.items() if k not in ("teacher", "data", "held_out")}
    streams = {"recover": {"data": adapted["data"], "teacher": "base", "held_out": 4}}
    assert check(**{**values, "streams": streams}).problems == []
