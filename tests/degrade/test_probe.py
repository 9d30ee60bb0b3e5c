"""What was made is saved before it is measured, and measuring may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.architectures import build
from helpers.task_rows import write
from helpers.tiny import TEMPLATE, build_model, build_tokenizer
from remend.degrade.finetune import finetune
from remend.degrade.making import job
from remend.degrade.quantize import quantize
from remend.files.reading import read_object
from remend.files.signed import signed

SYSTEM = (
    "{% if add_generation_prompt and messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TEMPLATE
)
INT4 = {"format": "int4-g32-sym", "device": "cpu"}


@pytest.fixture
def strict(tmp_path: Path) -> tuple[Path, PreTrainedTokenizerFast]:
    """A model whose template wants a system turn, which bundled prompts don't have."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = SYSTEM
    build_model(len(tokenizer)).save_pretrained(tmp_path / "strict")
    tokenizer.save_pretrained(tmp_path / "strict")
    return tmp_path / "strict", tokenizer


def rows(path: Path, count: int, **more: Any) -> str:
    turns = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Hello number {i}"}]
        for i in range(count)
    ]
    write(path, [{"prompt": turn, **more} for turn in turns])
    return str(path)


def test_own_data_is_probed_too_where_the_template_refuses_the_bundled_prompts(
    strict: tuple[Path, Any], tmp_path: Path
) -> None:
    model, data = str(strict[0]), rows(tmp_path / "rows.jsonl", 9)
    record = quantize(model, tmp_path / "q", **INT4, method="gptq", data=data, samples=4)
    assert record["probe"]["prompts"] == 4
    pairs = rows(tmp_path / "pairs.jsonl", 6, completion="Hi there")
    record = finetune(model, tmp_path / "ft", data=pairs, steps=2, device="cpu", dtype="float32")
    assert record["probe"]["prompts"] == 4
    assert read_object(tmp_path / "ft" / "degradation.json") == signed(record)


def test_calibration_and_probe_take_different_rows(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, encode = [], job.encode_within

    def noted(tokenizer: Any, examples: Any, *limits: Any, **more: Any) -> Any:
        seen.extend(example.id for example in examples)
        return encode(tokenizer, examples, *limits, **more)

    monkeypatch.setattr(job, "encode_within", noted)
    write(tmp_path / "rows.jsonl", [{"prompt": f"Tell me about number {i}."} for i in range(7)])
    quantize(str(reference_dir), tmp_path / "q", **INT4, method="gptq", data=str(tmp_path / "rows.jsonl"), samples=4)
    assert len(seen) == len(set(seen)) == 7


def test_a_probe_that_fails_loses_nothing_and_says_what_repeats_it(
    strict: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = quantize(str(strict[0]), tmp_path / "q", **INT4)
    assert "probe" not in record
    assert (tmp_path / "q" / "model.safetensors").is_file()
    assert read_object(tmp_path / "q" / "degradation.json") == signed(record)
    err = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'q'} is saved, but what it lost could not be measured" in err
    assert f"remend diagnose --reference {strict[0]} --student {tmp_path / 'q'} --data PROMPTS.jsonl" in err


def test_logits_that_are_no_numbers_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer) + 4, tied=False)
    with torch.no_grad():
        model.lm_head.weight[-1] = 3e38  # finite, but its products are not
    model.save_pretrained(tmp_path / "huge")
    tokenizer.save_pretrained(tmp_path / "huge")
    assert "probe" not in quantize(str(tmp_path / "huge"), tmp_path / "q", **INT4)
    assert "could not be measured" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["falcon-h1", "jamba", "mamba"])
def test_models_with_states_are_probed(name: str, tokenizer: Any, tmp_path: Path) -> None:
    build(name, vocabulary=len(tokenizer)).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    pairs = tmp_path / "pairs.jsonl"
    write(pairs, [{"prompt": f"Say {i}.", "completion": "Hi there"} for i in range(6)])
    record = finetune(str(tmp_path / name), tmp_path / "out", data=str(pairs), steps=2, device="cpu", dtype="float32")
    assert record["probe"]["kl"] > 0
