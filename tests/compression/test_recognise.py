"""Students made by other tools' own writers: gguf, compressed-tensors, bitsandbytes; and plain pruned directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.packed import needs_exact_unpacking
from helpers.tiny import build_model, put_on_grid
from remend.compression.containers.dense import ZEROS
from remend.compression.grids import decode
from remend.compression.recognise import recognise
from remend.compression.stored_grid import StoredGrid
from remend.errors import FileError, InputError
from remend.exporting import export
from remend.models.find import find_model
from remend.models.load import check_weights, load_model, save_model
from remend.models.packed_weights import exact_products
from remend.training.constraints import OnGrid

CPU = torch.device("cpu")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: Any, kinds: dict[str, str]) -> None:
    """As llama.cpp's converter and quantizer do it, with the gguf package alone."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("tiny")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, block, part = name.removesuffix(".weight").split(".", 3)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            target = f"blk.{block}.{NAMES[part]}.weight"
        else:
            part = ""
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        kind = gguf.GGMLQuantizationType[kinds.get(part, kinds.get("*", "F32")) if values.ndim == 2 and part else "F32"]
        if kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, np.ascontiguousarray(values))
        elif kind is gguf.GGMLQuantizationType.Q6_K:  # the package can't write it; any bytes are a valid block
            rows, columns = values.shape
            blocks = np.random.default_rng(0).integers(0, 40, (rows, columns // 256 * 210)).astype(np.uint8)
            writer.add_tensor(target, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_lies_on(stored: StoredGrid, model: Any) -> None:
    for name, (codes, grid) in stored.matrices.items():
        assert torch.equal(decode(codes, grid, stored.format), model.get_parameter(name)), name
    OnGrid(model, stored)  # refuses weights off the grid


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_a_gguf_file_of_one_type_is_its_grid_in_transformers_row_order(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", build_model(320), {"*": kind})
    held = recognise(tmp_path / "m.gguf")
    assert held.stored is not None
    assert (held.kind, held.stored.format.name) == ("gguf", f"gguf:{kind.lower()}")
    assert len(held.stored.matrices) == 14
    loaded = load_model(find_model(str(tmp_path / "m.gguf")), dtype=torch.float32, device=CPU)
    assert_lies_on(held.stored, loaded)


def test_floating_point_matrices_stay_off_a_gguf_grid(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", build_model(320), {"*": "Q4_0", "mlp.down_proj": "F16"})
    held = recognise(tmp_path / "m.gguf")
    assert held.stored is not None
    assert not any("down_proj" in name for name in held.stored.matrices)
    assert len(held.stored.matrices) == 12


def test_two_types_that_could_each_be_held_are_refused_unless_taken_as_dense(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", build_model(320), {"*": "Q4_0", "mlp.down_proj": "Q8_0"})
    with pytest.raises(
        InputError, match=r"12 Q4_0 and 2 Q8_0 linear matrices, and one grid a model is held.*--as dense"
    ):
        recognise(tmp_path / "m.gguf")
    held = recognise(tmp_path / "m.gguf", as_dense=True)
    assert (held.stored, held.why) == (None, "held as dense: m.gguf has 12 Q4_0 and 2 Q8_0 linear matrices")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"*": "Q4_0", "mlp.down_proj": "Q6_K"}, "12 Q4_0 and 2 Q6_K"),
        ({"*": "Q6_K"}, "14 Q6_K"),
        ({}, "only floating"),
    ],
)
def test_k_quants_are_held_as_dense_and_it_is_said(tmp_path: Path, kinds: dict[str, str], said: str) -> None:
    write_gguf(tmp_path / "m.gguf", build_model(320, width=256), kinds)
    held = recognise(tmp_path / "m.gguf")
    assert held.stored is None
    assert held.why.startswith("held as dense")
    assert said in held.why


def compress(directory: Path, dtype: torch.dtype, args: dict[str, Any], tokenizer: Any, **scheme: Any) -> Any:
    """What llm-compressor does: its library fits the scales, compresses and describes."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = build_model(len(tokenizer)).to(dtype)
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": args, **scheme}},
        ignore=["lm_head"],
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    for _, module in model.named_modules():
        wanted = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if wanted is None:
            continue
        weight = module.weight.detach()
        grouped = (weight.shape[0], -1, wanted.group_size)
        shape = {"group": grouped, "tensor_group": grouped, "channel": (weight.shape[0], 1, -1)}
        low, high = torch.aminmax(weight.view(shape.get(wanted.strategy, (1, 1, -1))), dim=-1)
        scale, zero = calculate_qparams(low, high, wanted)
        module.weight_scale.data = scale.to(dtype).view(module.weight_scale.shape)
        if not wanted.symmetric:
            module.weight_zero_point.data = zero
        if wanted.strategy == "tensor_group":
            module.weight_global_scale.data.fill_(1.0)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    compressor.update_config(str(directory))
    return model


SCHEMES = {
    "int4-g32-sym": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    "int4-g64-zp": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    "int8-g32-zp": {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    "int8-g64-sym": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "int4-g64-zp by row": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "fp8-e4m3": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}


@needs_exact_unpacking
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_compressed_tensors_directory_is_loaded_exactly_on_its_grid(
    tmp_path: Path, tokenizer: Any, name: str, dtype: torch.dtype
) -> None:
    compress(tmp_path / "m", dtype, SCHEMES[name], tokenizer)
    held = recognise(tmp_path / "m")
    assert held.stored is not None
    assert (held.kind, held.stored.format.name) == ("compressed-tensors", name.partition(" ")[0])
    assert len(held.stored.matrices) == 14
    loaded = load_model(find_model(str(tmp_path / "m")), dtype=torch.float32, device=CPU)
    assert_lies_on(held.stored, loaded)
    original = build_model(len(tokenizer)).get_parameter("model.layers.0.mlp.up_proj.weight")
    error = (loaded.get_parameter("model.layers.0.mlp.up_proj.weight") - original).abs().mean() / original.abs().mean()
    assert error < 0.12, "these are the model's weights, rounded"


@needs_exact_unpacking
def test_a_loaded_compressed_model_saves_as_a_plain_one(tmp_path: Path, tokenizer: Any) -> None:
    compress(tmp_path / "m", torch.bfloat16, SCHEMES["int4-g32-sym"], tokenizer)
    loaded = load_model(find_model(str(tmp_path / "m")), dtype=torch.float32, device=CPU)
    save_model(loaded, tokenizer, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load_model(find_model(str(tmp_path / "plain")), dtype=torch.float32, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))


def test_a_model_whose_cache_alone_is_quantized_lies_on_no_grid(tmp_path: Path, tokenizer: Any) -> None:
    save_model(build_model(len(tokenizer)), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    packing = {"quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen"}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {**packing, "config_groups": {}, "ignore": [], "kv_cache_scheme": cache}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its weights are not quantized, only its key/value cache"):
        recognise(tmp_path / "m")


@needs_exact_unpacking
def test_what_is_asked_of_activations_and_cache_is_carried_into_the_next_export(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    compress(tmp_path / "m", torch.bfloat16, SCHEMES["fp8-e4m3"], tokenizer, input_activations=activations)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    scales = {f"model.layers.{i}.self_attn.{side}_scale": torch.rand(1) for i in range(2) for side in "kv"}
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, **scales}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    held = recognise(tmp_path / "m")
    assert held.stored is not None
    assert "float-quantized" in held.why
    assert "its kv_cache_scheme and input_activations are not trained or measured" in held.why
    model = load_model(find_model(str(tmp_path / "m")), dtype=torch.float32, device=CPU)
    told = " ".join(capsys.readouterr().err.split())
    assert "scales of its key/value cache are neither trained nor measured" in told
    assert "left out" not in told
    assert_lies_on(held.stored, model)
    save_model(model, tokenizer, tmp_path / "recovered")  # as a recovery does it
    OnGrid(model, held.stored).save(tmp_path / "recovered")
    export(str(tmp_path / "recovered"), tmp_path / "out", format="compressed-tensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["kv_cache_scheme"] == cache
    theirs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    assert written["config_groups"]["group_0"]["input_activations"] == theirs
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensors[name].equal(scale) for name, scale in scales.items())


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True}, "groups are 16"),
        ({"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": True}, "3 bits"),
        ({"num_bits": 8, "strategy": "tensor", "symmetric": True}, "shared by a tensor"),
    ],
)
def test_a_compressed_scheme_without_a_grid_is_refused_unless_taken_as_dense(
    tmp_path: Path, tokenizer: Any, args: dict[str, Any], reason: str
) -> None:
    compress(tmp_path / "m", torch.bfloat16, args, tokenizer)
    with pytest.raises(InputError, match=rf"{reason}.*--as dense"):
        recognise(tmp_path / "m")
    held = recognise(tmp_path / "m", as_dense=True)
    assert held.stored is None
    assert reason in held.why


@pytest.mark.parametrize(
    ("local", "made", "said"),
    [
        ("weight_global_scale", lambda _: torch.ones(1), "hold {}.weight_global_scale, which .* pack-quantized"),
        ("weight_scale", lambda t: t[:, :1].contiguous(), r"{}.weight_scale is \[128, 1\] .* \[128, 2\]"),
        ("weight_zero_point", lambda _: torch.ones(16, 2), r"weight_zero_point is \[16, 2\] .* \[128, 2\]"),
        ("weight_packed", lambda t: t.repeat(1, 2), r"{}.weight_packed is \[128, 16\] .* \[128, 8\]"),
        ("weight", lambda _: torch.ones(128, 64), "{} has a weight and a weight_packed"),
    ],
)
def test_packed_tensors_that_the_configuration_does_not_describe_are_refused(
    tmp_path: Path, tokenizer: Any, local: str, made: Any, said: str
) -> None:
    compress(tmp_path / "m", torch.bfloat16, SCHEMES["int4-g32-sym"], tokenizer)
    path, module = tmp_path / "m" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    save_file({**tensors, f"{module}.{local}": made(tensors.get(f"{module}.{local}"))}, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=said.format(module)):
        check_weights(find_model(str(tmp_path / "m")))
    with pytest.raises(FileError, match=said.format(module)):
        load_model(find_model(str(tmp_path / "m")), dtype=torch.float32, device=CPU)


PARTS = {
    "int4-g32-sym": ["weight_packed", "weight_scale", "weight_shape"],
    "int4-g64-zp": ["weight_zero_point"],
    "nvfp4": ["weight_global_scale", "weight_scale", "weight_packed"],
}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


@pytest.mark.parametrize("kind", PARTS)
def test_packed_tensors_that_are_missing_are_named_before_anything_is_loaded(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    compress(tmp_path / "m", torch.bfloat16, SCHEMES.get(kind, NVFP4), tokenizer)
    path, module = tmp_path / "m" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    for local in PARTS[kind]:
        rest = {name: tensor for name, tensor in tensors.items() if name != f"{module}.{local}"}
        assert len(rest) < len(tensors)
        save_file(rest, path, metadata={"format": "pt"})
        with pytest.raises(FileError, match=rf"incomplete: 1 tensors are missing \({module}.{local}\)"):
            check_weights(find_model(str(tmp_path / "m")))


@needs_exact_unpacking
def test_a_layer_of_another_group_than_transformers_takes_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """It unpacks all layers by the first group; the second is another way only where its numbers say so."""
    compress(tmp_path / "m", torch.bfloat16, SCHEMES["int4-g32-sym"], tokenizer)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    (first,) = groups.values()
    groups["other"] = {**first, "targets": ["re:.*down_proj$"]}
    path.write_text(json.dumps(config))
    assert check_weights(find_model(str(tmp_path / "m"))) == []
    groups["other"] = {**groups["other"], "weights": {**first["weights"], "symmetric": False}}
    path.write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"describes model\.layers\.0\.mlp\.down_proj by other, and transformers"):
        check_weights(find_model(str(tmp_path / "m")))


@needs_exact_unpacking
def test_transformed_activations_are_refused_and_transformed_weights_are_not(tmp_path: Path, tokenizer: Any) -> None:
    compress(tmp_path / "m", torch.bfloat16, SCHEMES["int4-g32-sym"], tokenizer)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    apply: dict[str, Any] = {"targets": ["re:.*up_proj$"], "location": "weight_input"}
    groups = {"u": {"type": "hadamard", "apply": [apply]}}
    config["quantization_config"]["transform_config"] = {"config_groups": groups}
    path.write_text(json.dumps(config))
    assert check_weights(find_model(str(tmp_path / "m"))) == []
    apply["location"] = "input"
    path.write_text(json.dumps(config))
    with pytest.raises(FileError, match="transforms its activations"):
        check_weights(find_model(str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("form", "said"),
    [("sparse-24-bitmask", r"stored sparse \(sparse-24-bitmask\)"), ("dense", "plain weights with zeros")],
)
def test_sparse_compressed_tensors_say_what_to_do(tmp_path: Path, tokenizer: Any, form: str, said: str) -> None:
    model = build_model(len(tokenizer))
    prune(model, 2, 4)
    save_model(model, tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    sparse = {"format": form, "sparsity_structure": "2:4", "targets": ["Linear"]}
    changed = {**config, "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": sparse}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    for as_dense in (False, True):
        with pytest.raises(InputError, match=said):
            recognise(tmp_path / "m", as_dense=as_dense)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert recognise(tmp_path / "m").pattern == "2:4"


def test_float32_scales_that_float16_would_round_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    compress(tmp_path / "m", torch.float32, SCHEMES["int4-g32-sym"], tokenizer)
    with pytest.raises(InputError, match=r"float32.*not all exact in float16"):
        recognise(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_nf4_is_held(
    tmp_path: Path, reference_dir: Path, tokenizer: Any, dtype: torch.dtype, double: bool
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(
        reference_dir, dtype=dtype, quantization_config=packing, device_map="cpu"
    )
    save_model(model, tokenizer, tmp_path / "m")
    held = recognise(tmp_path / "m")
    assert held.stored is not None
    assert held.stored.format.name == "nf4"
    assert len(held.stored.matrices) == 14
    loaded = load_model(find_model(str(tmp_path / "m")), dtype=torch.float32, device=CPU)
    assert_lies_on(held.stored, loaded)
    save_model(loaded, tokenizer, tmp_path / "plain")  # what a recovery does at its end
    again = load_model(find_model(str(tmp_path / "plain")), dtype=torch.float32, device=CPU)
    pairs = zip(loaded.named_parameters(), again.named_parameters(), strict=True)
    assert all(a[0] == b[0] and a[1].equal(b[1]) for a, b in pairs)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_packing_that_transformers_can_not_open_here_is_refused_with_its_reason(
    reference_dir: Path, tmp_path: Path, tokenizer: Any, method: str
) -> None:
    save_model(build_model(len(tokenizer)), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for as_dense in (False, True):
        with pytest.raises(InputError, match=f"packed by {method}, which transformers can't open here"):
            recognise(tmp_path / "m", as_dense=as_dense)


def prune(model: Any, keep: int, of: int) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            groups = layer.weight.data.view(-1, of)
            groups.scatter_(1, groups.abs().argsort(1)[:, : of - keep], 0.0)


@pytest.mark.parametrize(("keep", "of", "pattern"), [(2, 4, "2:4"), (4, 8, "4:8"), (8, 16, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_zeros_are_a_mask_with_share_and_pattern(
    tmp_path: Path, tokenizer: Any, keep: int, of: int, pattern: str | None, dtype: torch.dtype
) -> None:
    model = build_model(len(tokenizer)).to(dtype)
    prune(model, keep, of)
    save_model(model, tokenizer, tmp_path / "m")
    held = recognise(tmp_path / "m")
    assert held.mask
    assert held.sparsity == pytest.approx(0.5)
    assert held.pattern == pattern
    assert "50.0%" in held.why


def test_a_healthy_model_has_no_mask_and_remend_s_own_grid_goes_first(reference_dir: Path, student_dir: Path) -> None:
    held = recognise(reference_dir)
    assert (held.kind, held.mask, held.stored) == ("plain", False, None)
    held = recognise(student_dir)
    assert (held.kind, held.mask, held.stored.format.name) == ("remend", False, "int3-g64-asym")


def test_zeros_of_a_dequantized_grid_are_no_mask(tmp_path: Path, tokenizer: Any) -> None:
    model = build_model(len(tokenizer))
    put_on_grid(model, "gguf:q4_0")
    save_model(model, tokenizer, tmp_path / "m")
    held = recognise(tmp_path / "m")
    assert held.sparsity is not None
    assert held.sparsity > ZEROS
    assert not held.mask
    assert "quantized, not pruned" in held.why


def test_an_older_transformers_that_unpacks_otherwise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.integrations.compressed_tensors.CompressedTensorsDequantize", raising=False)
    with pytest.raises(FileError, match="can't be unpacked exactly by the versions of transformers"), exact_products():
        pass
