"""Mixtures of experts and GPT-2 in containers that were made for linear layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from helpers.packed import needs_exact_unpacking
from helpers.tiny import build_tokenizer
from remend.compression.grids import GridFormat, decode, quantize
from remend.degrade.quantize import quantize as put_on_grid
from remend.errors import InputError
from remend.exporting import export
from remend.models.find import find_model
from remend.models.load import load_model

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {"group_0": {"format": "pack-quantized", "targets": ["Linear"], "weights": SCHEME}},
}


def whole(out: Path, kind: str = "qwen3_moe") -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer), "head_dim": 32, "num_experts": 3, "moe_intermediate_size": 64}
    config: Any = T.Qwen3MoeConfig(**sizes, num_experts_per_tok=2)
    if kind == "gpt2":
        config = T.GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    T.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def packed(directory: Path, also_experts: bool) -> dict[str, torch.Tensor]:
    """Pack the layers of a directory as other tools do; returns the weights that a reader should see."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    fmt, expected = GridFormat.parse("int4-g32-sym"), load_file(directory / "model.safetensors")
    files = dict(expected)
    for name, weight in list(expected.items()):
        if name.endswith("_proj.weight") and (also_experts or "experts" not in name):
            codes, grid = quantize(weight, fmt)
            expected[name], layer = decode(codes, grid, fmt), name.removesuffix("weight")
            files[f"{layer}weight_packed"] = pack_to_int32(codes.to(torch.int8) - 8, 4)
            files[f"{layer}weight_scale"] = grid.scales.half()
            files[f"{layer}weight_shape"] = torch.tensor(weight.shape)
            del files[name]
    save_file(files, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": PACKED}))
    return expected


@needs_exact_unpacking
def test_experts_that_were_packed_one_by_one_are_refused_and_can_be_taken_as_dense(tmp_path: Path, run: Any) -> None:
    teacher, student = whole(tmp_path / "whole"), whole(tmp_path / "packed")
    expected = packed(student, also_experts=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Tea."}\n{"prompt": "Rain."}\n{"prompt": "Maps."}\n')
    words = [
        "--student",
        student,
        "--teacher",
        teacher,
        "--data",
        tmp_path / "prompts.jsonl",
        "--out",
        tmp_path / "run",
    ]
    code, _, err = run("check", *words)
    assert code == 2
    assert "experts are packed one by one (model.layers.0.mlp.experts.0.down_proj)" in err
    assert "say --as dense" in err
    rest = ["steps=1", "batch_size=2", "max_new_tokens=4", "held_out=1", "learning_rate=1e-9", "device=cpu"]
    code, _, err = run("recover", *words, "--as", "dense", *rest)
    assert code == 0, err
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name].float(), weight, atol=1e-6, rtol=0)


def test_plain_experts_beside_packed_layers_are_refused_before_anything_is_loaded(tmp_path: Path, run: Any) -> None:
    student = whole(tmp_path / "packed")
    packed(student, also_experts=False)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Tea."}\n{"prompt": "Rain."}\n{"prompt": "Maps."}\n')
    words = ["--student", student, "--teacher", whole(tmp_path / "whole"), "--data", tmp_path / "prompts.jsonl"]
    code, _, err = run("check", *words, "--out", tmp_path / "run")
    assert code == 2
    assert "has plain experts (model.layers.0.mlp.experts.0.down_proj.weight) beside packed layers" in err


def test_compressed_tensors_is_refused_where_it_would_hold_no_experts(tmp_path: Path) -> None:
    for name, model, skip, said in (
        ("experts", whole(tmp_path / "a"), [], "but experts, which a model in transformers keeps in one tensor"),
        ("skipped", whole(tmp_path / "b"), ["*experts*"], r"the experts \(model.layers.0.mlp.experts.* on no grid"),
        ("gpt2", whole(tmp_path / "c", "gpt2"), [], "of the kind Conv1D, which holds inputs first"),
    ):
        put_on_grid(str(model), tmp_path / name, format="int4-g32-sym", skip=skip, probe=False)
        with pytest.raises(InputError, match=f"{said}.*use --format dense"):
            export(str(tmp_path / name), tmp_path / "out", format="compressed-tensors")


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2"])
def test_gguf_is_refused_by_architecture(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=f"a {kind} model can't be written as GGUF here; .* use --format dense"):
        export(str(whole(tmp_path / "whole", kind)), tmp_path / "out", format="gguf")


def test_gpt2_that_bitsandbytes_packed_has_its_own_layers_again(tmp_path: Path) -> None:
    plain = whole(tmp_path / "whole", "gpt2")
    config = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = T.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "packed")
    build_tokenizer().save_pretrained(tmp_path / "packed")
    export(str(tmp_path / "packed"), tmp_path / "dense", format="dense")
    ours, theirs = (T.AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "dense", plain))
    for name, weight in theirs.state_dict().items():
        got = ours.state_dict()[name]
        assert got.shape == weight.shape
        assert float((got - weight).norm()) <= 0.15 * float(weight.norm()), name
    loaded = load_model(find_model(str(tmp_path / "packed")), dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), ours.state_dict().values(), strict=True))
