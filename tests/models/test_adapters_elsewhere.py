"""Adapters on layers other than Linear, and adapters of other tools that hold more than updates of linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import remend
from helpers.architectures import VOCABULARY, build
from helpers.task_rows import write
from helpers.tiny import build_model, small_recipe
from remend.errors import InputError
from remend.models import adapters
from remend.models.find import find_model
from remend.models.load import load_config, load_model, save_model, skeleton

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 23).unsqueeze(0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def stir(model: Any) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def made_by_peft(base: Path, out: Path, *, rows: int | None = None, **settings: Any) -> Tensor:
    """An adapter as peft saves it, and the logits that it has there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if rows:
        model.resize_token_embeddings(rows)
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    stir(wrapped)
    wrapped.save_pretrained(out)
    return logits(wrapped)


def loaded(path: Path) -> Any:
    return load_model(find_model(str(path)), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt"])
def test_all_linear_finds_the_layers_of_other_architectures(name: str, tokenizer: Any, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base")
    plain = logits(model)
    adapters.add_lora(model, rank=2, base=str(tmp_path / "base"))
    assert logits(model).equal(plain)
    stir(model)
    assert not logits(model).equal(plain)
    save_model(model, tokenizer, tmp_path / "adapter")
    again = loaded(tmp_path / "adapter")
    assert logits(again).equal(logits(model))
    expected = logits(model)
    adapters.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_what_can_be_adapted_is_named_where_a_target_is_not_there() -> None:
    with pytest.raises(InputError, match=r"q_proj is no linear layer .*; allowed: .* c_attn, c_fc, c_proj"):
        adapters.check_targets(build("gpt2"), ["q_proj"])
    with pytest.raises(InputError, match=r"down_proj is no linear layer .*experts can't be one"):
        adapters.check_targets(build("mixtral"), ["down_proj"])


def test_experts_that_stay_as_they_are_are_named() -> None:
    said = adapters.untouched_experts(build("mixtral"))
    assert said is not None
    assert "leaves 89% of the decoder's matrix weights" in said
    assert "(down_proj, gate_up_proj)" in said
    assert adapters.untouched_experts(build("gpt2")) is None


def test_no_adapter_is_laid_on_a_vision_tower() -> None:
    model = build("gemma3-images")
    adapters.add_lora(model, rank=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert not any("vision" in name for name in trained)


def test_a_recovery_of_experts_says_that_the_adapter_leaves_them(
    tokenizer: Any, prompt_file: Path, tmp_path: Path
) -> None:
    build("mixtral", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = small_recipe(tmp_path / "base", tmp_path / "base", prompt_file, tmp_path / "run")
    assert any("experts" in text for text in remend.check(**recipe, lora={"rank": 2}).warnings)


MORE: dict[str, dict[str, Any]] = {
    "a norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "the tied embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a bias": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("what", sorted(MORE))
def test_an_adapter_that_holds_more_is_loaded_and_not_merged(
    what: str, reference_dir: Path, tokenizer: Any, prompt_file: Path, tmp_path: Path
) -> None:
    expected = made_by_peft(reference_dir, tmp_path / "adapter", **MORE[what])
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = loaded(tmp_path / "adapter")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    recipe = small_recipe(tmp_path / "adapter", reference_dir, prompt_file, tmp_path / "run")
    assert not any("merge" in text for text in remend.check(**recipe).problems)
    assert any("merge: true can't fold the adapter" in text for text in remend.check(**recipe, merge=True).problems)
    with pytest.raises((InputError, RuntimeError)):
        adapters.merge(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ],
)
def test_what_can_be_folded_is_folded(settings: dict[str, Any], tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    expected = made_by_peft(tmp_path / "base", tmp_path / "adapter", **settings)
    source = find_model(str(tmp_path / "adapter"))
    assert adapters.unmergeable(tmp_path / "adapter", skeleton(source, load_config(source))) is None
    model = loaded(tmp_path / "adapter")
    adapters.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded(tmp_path / "merged")), expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_an_adapter_of_a_resized_base_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    build_model(VOCABULARY, tied=False).save_pretrained(tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter", rows=VOCABULARY + 2, target_modules=["q_proj"], **settings)
    with pytest.raises(InputError, match=r"66 rows and the base's vocabulary 64, .*Resize the base likewise"):
        loaded(tmp_path / "adapter")


def test_an_embedding_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    build_model(VOCABULARY, tied=False).save_pretrained(tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter", target_modules=["embed_tokens"])
    changed = build_model(VOCABULARY, tied=False)
    changed.model.embed_tokens.weight.data += 1
    changed.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="of its own, which differs from"):
        loaded(tmp_path / "adapter")


def test_fine_tuning_gpt2_with_an_adapter(tokenizer: Any, tmp_path: Path) -> None:
    build("gpt2", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "pairs.jsonl", [{"prompt": f"Say {i}.", "completion": "Hi there"} for i in range(6)])
    settings = {"data": str(tmp_path / "pairs.jsonl"), "steps": 4, "probe": False, "lora": {"rank": 2}}
    record = remend.finetune(str(tmp_path / "base"), tmp_path / "out", **settings, device="cpu", dtype="float32")
    assert record["loss"]["last"] < record["loss"]["first"]
