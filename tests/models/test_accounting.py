"""Every tensor of the files is in the model that is read, and nothing in the model is from nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config

import remend
from helpers.families import FAMILIES, made, tensors_of, with_tensors
from helpers.gguf_files import rewritten
from helpers.tiny import build_model, build_tokenizer
from remend.compression.recognise import recognise
from remend.errors import FileError, InputError, RemendError
from remend.models import adapters
from remend.models.accounting import LEFT_OUT
from remend.models.find import find_model
from remend.models.load import check_weights, load_config, load_model, load_tokenizer, save_model, skeleton
from remend.models.protocols import CausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    where = tmp_path_factory.mktemp("families")

    def directory(name: str) -> Path:
        path = where / re.sub(r"\W+", "-", name)
        return path if path.is_dir() else made(name, path)

    return directory


def load(path: Path) -> CausalLM:
    return load_model(find_model(str(path)), dtype=torch.float32, device=CPU)


def refused(path: Path, kind: type[RemendError] = FileError) -> str:
    """What loading says, which the look at headers says too."""
    source = find_model(str(path))
    with pytest.raises(kind) as ahead:
        check_weights(source)
    with pytest.raises(kind) as at_work:
        load_model(source, dtype=torch.float32, device=CPU)
    assert str(ahead.value) == str(at_work.value)
    return str(at_work.value)


def kinds(tensors: dict[str, Tensor]) -> list[str]:
    """The last name of every kind: of all experts and layers the last one's."""
    return sorted({re.sub(r"\d+", "#", name): name for name in tensors}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_in_the_files_comes_out_again(family: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """The judge is transformers' own saving: what the model did not take can't be in it."""
    path = family(name)
    assert check_weights(find_model(str(path))) == []
    source = find_model(str(path))
    save_model(load(path), load_tokenizer(source), tmp_path / "again")
    before, after = tensors_of(path), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "again" / "README.md").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_tensor_is_missed(family: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = family(name)
    tensors = tensors_of(path)
    for gone in kinds(tensors):
        fewer = with_tensors(path, tmp_path / "fewer", {k: v for k, v in tensors.items() if k != gone})
        with pytest.raises(FileError) as said:
            check_weights(find_model(str(fewer)))
        named = gone.replace("block_sparse_moe.gate", "mlp.gate")  # the model's own names are given
        layer = re.match(r"(.*\.\d+\.\w+)\.", named)
        assert (named.split(".")[0] if "experts" in gone or not layer else layer[1]) in str(said.value), gone


@pytest.mark.parametrize("name", FAMILIES)
def test_what_has_no_place_is_refused_by_name(family: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = family(name)
    tensors = tensors_of(path)
    first = kinds(tensors)[0]
    for more in (f"{first}_scale", f"{first.removesuffix('.weight')}.zero_point", "score.weight"):
        message = refused(with_tensors(path, tmp_path / "more", {**tensors, more: torch.ones(1)}))
        assert f"hold 1 tensors that its model has no place for ({more})" in message


def test_a_renamed_tensor_is_both(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = family("llama, biased")
    tensors = tensors_of(path)
    tensors["model.layers.1.self_attn.q_proj.bais"] = tensors.pop("model.layers.1.self_attn.q_proj.bias")
    message = refused(with_tensors(path, tmp_path / "renamed", tensors))
    assert "incomplete: 1 tensors are missing (model.layers.1.self_attn.q_proj.bias)" in message


def test_a_gap_in_the_experts_is_not_closed(family: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers takes experts in their order, whatever their numbers: 0, 1, 2, 5 would be 0, 1, 2, 3."""
    path = family("qwen3-moe")
    tensors = {re.sub(r"experts\.3\.", "experts.5.", key): value for key, value in tensors_of(path).items()}
    assert "no run of numbers from 0" in refused(with_tensors(path, tmp_path / "gap", tensors))


def test_an_expert_too_many_is_counted(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = family("mixtral")
    more = {"model.layers.1.block_sparse_moe.experts.4.w1.weight": torch.ones(64, 32)}
    message = refused(with_tensors(path, tmp_path / "five", {**tensors_of(path), **more}))
    assert (
        "model.layers.1.mlp.experts.gate_up_proj is made of 5 x model.layers.1.block_sparse_moe.experts.*.w1" in message
    )
    assert "and 4 x model.layers.1.block_sparse_moe.experts.*.w3.weight" in message


def test_two_tensors_for_one_place_are_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = family("llama, tied")
    tensors = tensors_of(path)
    tensors["layers.0.mlp.up_proj.weight"] = torch.zeros_like(tensors["model.layers.0.mlp.up_proj.weight"])
    assert "layers.0.mlp.up_proj.weight" in refused(with_tensors(path, tmp_path / "twice", tensors))


def test_a_tensor_in_two_shards_is_refused_where_its_numbers_differ(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    path = family("llama, tied")
    tensors, first = tensors_of(path), "model.norm.weight"
    target = with_tensors(path, tmp_path / "shards", tensors)
    (target / "model.safetensors").rename(target / "a.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.layers.0.input_layernorm.weight": "b.safetensors"}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    again = {name: tensors[name] for name in (first, "model.layers.0.input_layernorm.weight")}
    save_file(again, target / "b.safetensors", metadata={"format": "pt"})
    assert check_weights(find_model(str(target))) == []
    assert torch.equal(load(target).get_parameter(first), tensors[first])
    save_file({**again, first: again[first] * 3}, target / "b.safetensors", metadata={"format": "pt"})
    assert f"{first} twice, in a.safetensors and b.safetensors" in refused(target)


def test_biases_that_the_configuration_denies_are_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = with_tensors(family("llama, biased"), tmp_path / "denied", tensors_of(family("llama, biased")))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    assert "hold 8 tensors that its model has no place for (model.layers.0.self_attn.k_proj.bias" in refused(path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_both_shapes_are_named(family: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    tensors = tensors_of(family("llama, tied"))
    tensors[name] = tensors[name].repeat_interleave(2, 0)
    got, needed = list(tensors[name].shape), list(tensors_of(family("llama, tied"))[name].shape)
    message = refused(with_tensors(family("llama, tied"), tmp_path / "shape", tensors))
    assert f"{name} is {got} in the files, and {needed} by config.json" in message
    assert "above report" not in message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(family: Callable[[str], Path], tmp_path: Path, number: float) -> None:
    tensors = tensors_of(family("gpt2"))
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = number
    path = with_tensors(family("gpt2"), tmp_path / "broken", tensors)
    with pytest.raises(FileError, match=r"1 of 4096 numbers of transformer.h.1.mlp.c_fc.weight are NaN or infinite"):
        load(path)
    with pytest.raises(FileError, match="are NaN or infinite"):
        remend.export(str(path), tmp_path / "out", format="dense")


def test_buffers_that_old_files_hold_are_harmless(family: Callable[[str], Path], tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    path = family("llama, tied")
    assert check_weights(find_model(str(with_tensors(path, tmp_path / "l", {**tensors_of(path), **more})))) == []
    more = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    path = family("gpt2")
    with_mask = with_tensors(path, tmp_path / "g", {**tensors_of(path), **more})
    assert check_weights(find_model(str(with_mask))) == []
    assert getattr(load(with_mask).config, LEFT_OUT, None) is None
    learned = {**tensors_of(path), "transformer.h.0.attn.bias": torch.ones(32)}
    assert "transformer.h.0.attn.bias" in refused(with_tensors(path, tmp_path / "b", learned))


def mtp(path: Path, target: Path) -> Path:
    """A DeepSeek with one more layer, for multi-token prediction, as its files hold it."""
    tensors = tensors_of(path)
    more = {re.sub(r"layers\.1\.", "layers.2.", k): v.clone() for k, v in tensors.items() if "layers.1." in k}
    more |= {"model.layers.2.eh_proj.weight": torch.ones(32, 64), "model.layers.2.enorm.weight": torch.ones(32)}
    with_tensors(path, target, {**tensors, **more})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return target


def test_what_is_left_out_is_told_and_on_the_card(
    family: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mtp(family("deepseek-v3"), tmp_path / "mtp")
    (said,) = check_weights(find_model(str(path)))
    assert "model.layers.2.eh_proj.weight" in said
    assert "are left out" in said
    remend.export(str(path), tmp_path / "dense", format="dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "model.layers.2.eh" in card
    assert card.count("gate") == 4, "experts of one layer are one line"
    saved = find_model(str(tmp_path / "dense"))
    assert check_weights(saved) == []
    save_model(load(tmp_path / "dense"), load_tokenizer(saved), tmp_path / "again")
    assert "model.layers.2.eh_proj.weight" in (tmp_path / "again" / "README.md").read_text()


def test_another_layer_too_many_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = family("llama, tied")
    tensors = tensors_of(path)
    more = {re.sub(r"layers\.1\.", "layers.2.", k): v.clone() for k, v in tensors.items() if "layers.1." in k}
    assert "hold 9 tensors" in refused(with_tensors(path, tmp_path / "deep", {**tensors, **more}))


def test_towers_and_prediction_heads_of_a_text_model_are_told(family: Callable[[str], Path], tmp_path: Path) -> None:
    for name, more in {
        "gemma3": "vision_tower.vision_model.embeddings.position_embedding.weight",
        "qwen3-moe": "mtp.layers.0.mlp.experts.0.up_proj.weight",
    }.items():
        with_tower = with_tensors(family(name), tmp_path / name, {**tensors_of(family(name)), more: torch.ones(2, 2)})
        (said,) = check_weights(find_model(str(with_tower)))
        assert more.replace("experts.0", "experts.*") in said


def fp8(path: Path, target: Path, *, scale: str | None) -> Path:
    """Matrices as Model-Optimizer stores them, without a word in config.json."""
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(path).items():
        if "_proj.weight" in name:
            factor = value.abs().max() / 448
            tensors[name] = (value / factor).to(torch.float8_e4m3fn)
            if scale:
                tensors[name.replace("weight", scale)] = factor.reshape(())
        else:
            tensors[name] = value
    return with_tensors(path, target, tensors)


def test_fp8_without_a_scheme_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = family("llama, tied")
    for scale in ("weight_scale", "weight_scale_inv", None):
        message = refused(fp8(path, tmp_path / "fp8", scale=scale))
        assert "14 weights that are no floating-point numbers" in message
        assert "model.layers.0.mlp.down_proj.weight is F8_E4M3" in message


def test_fp8_with_a_scheme_and_without_scales_is_refused_for_those(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    path = fp8(family("llama, tied"), tmp_path / "fp8", scale=None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (path / "config.json").write_text(json.dumps(config))
    assert "F8_E4M3), and the files hold no scales for them, by which config.json says" in refused(path)


def test_a_file_that_was_cut_short_is_one_problem(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = with_tensors(family("llama, tied"), tmp_path / "cut", tensors_of(family("llama, tied")))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(path)
    assert "model.safetensors" in message
    assert "fetch or copy it again" in message
    with pytest.raises(FileError) as recognised:
        recognise(path)
    assert str(recognised.value) == message


def test_integers_without_a_scheme_are_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    path, tensors = family("llama, tied"), tensors_of(family("llama, tied"))
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(64, 32, dtype=torch.int8)
    assert "model.layers.0.mlp.up_proj.weight is I8" in refused(with_tensors(path, tmp_path / "int8", tensors))


def test_model_optimizer_is_known_by_its_own_file(family: Callable[[str], Path], tmp_path: Path) -> None:
    path = fp8(family("llama, tied"), tmp_path / "modelopt", scale="weight_scale")
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (path / "hf_quant_config.json").write_text(json.dumps(content))
    assert "packed by modelopt, which transformers can't open here" in refused(path, InputError)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where, tokenizer = tmp_path_factory.mktemp("gguf"), build_tokenizer()
    save_model(build_model(len(tokenizer)), tokenizer, where / "model")
    remend.export(str(where / "model"), where / "gguf", format="gguf")
    return where / "gguf" / "model.gguf"


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_gguf_file_that_lacks_a_tensor(gguf_file: Path, tmp_path: Path, gone: str, named: str) -> None:
    message = refused(rewritten(gguf_file, tmp_path / "m.gguf", drop=[gone]))
    assert "tensors are missing" in message
    assert named in message


def test_a_gguf_file_with_more_than_the_model_takes(gguf_file: Path, tmp_path: Path) -> None:
    assert check_weights(find_model(str(gguf_file))) == []
    biases = {f"blk.{i}.attn_q.bias": np.full(64, 0.5, np.float32) for i in range(2)}
    message = refused(rewritten(gguf_file, tmp_path / "biased.gguf", tensors=biases))
    assert "hold 2 tensors that its model has no place for (blk.0.attn_q.bias, blk.1.attn_q.bias)" in message
    renamed = rewritten(gguf_file, tmp_path / "m.gguf", rename={"blk.1.ffn_up.weight": "blk.1.ffn_upp.weight"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(renamed)


def test_a_gguf_file_whose_matrix_has_another_shape(gguf_file: Path, tmp_path: Path) -> None:
    other = {"blk.0.ffn_up.weight": np.ones((100, 64), np.float32)}
    path = rewritten(gguf_file, tmp_path / "m.gguf", drop=list(other), tensors=other)
    with pytest.raises(FileError, match=r"up_proj.weight is \[100, 64\] in the files, and \[128, 64\] by the header"):
        load(path)


def test_the_base_of_an_adapter_is_looked_at(family: Callable[[str], Path], tmp_path: Path) -> None:
    base = with_tensors(family("llama, biased"), tmp_path / "base", tensors_of(family("llama, biased")))
    model = load(base)
    adapters.add_lora(model, rank=2, base=str(base))
    save_model(model, load_tokenizer(find_model(str(base))), tmp_path / "adapter")
    assert check_weights(find_model(str(tmp_path / "adapter"))) == []
    fewer = load_file(base / "model.safetensors")
    del fewer["model.norm.weight"]
    with_tensors(family("llama, biased"), base, fewer)
    assert "model.norm.weight" in refused(tmp_path / "adapter")


def test_a_configuration_without_a_causal_model(tmp_path: Path) -> None:
    T5Config(d_model=8, num_layers=1, d_ff=8, num_heads=2).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    source = find_model(str(tmp_path))
    for open_it in (lambda s: skeleton(s, load_config(s)), check_weights):
        with pytest.raises(InputError, match="is a T5 model, of which transformers has no causal language model"):
            open_it(source)
