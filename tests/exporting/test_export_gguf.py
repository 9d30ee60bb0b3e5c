"""GGUF: written by the gguf package, read back by it and by transformers, equal bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from helpers.llama_cpp import LlamaCpp
from helpers.texts import TEXTS
from helpers.tiny import SKIPPED, build_model, build_tokenizer, put_on_grid
from remend.compression.containers.gguf_tokenizer import pre_tokenizer_name
from remend.degrade.quantize import quantize
from remend.errors import InputError
from remend.exporting import export
from remend.models.find import find_model
from remend.models.gguf_pre_tokenizers import PRE_TOKENIZERS
from remend.models.load import eos_ids, load_model, load_tokenizer, save_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def built(family: str, vocabulary: int, **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **SIZES, **changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


GGUF_TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq2_0"]


def tensors_of(directory: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(directory / "model.gguf").tensors}


def fields_of(directory: Path) -> dict[str, Any]:
    return {n: f.contents() for n, f in gguf.GGUFReader(directory / "model.gguf").fields.items()}


def load(file: Path) -> Any:
    return load_model(find_model(str(file)), dtype=torch.float32, device=torch.device("cpu"))


def llama_rows(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """The permutation as convert_hf_to_gguf.py spells it."""
    return weight_OI.reshape(heads, 2, weight_OI.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight_OI.shape)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_gguf_package_reads_the_measured_weights_bit_for_bit(on_grid: Any, tmp_path: Path, kind: str) -> None:
    student = on_grid(f"gguf:{kind}")
    result = export(str(student), tmp_path / "out", format=f"gguf:{kind}")
    assert result["check"]["weights_equal"]
    assert result["check"]["max_logit_difference"] == 0
    measured = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).state_dict()
    tensors = tensors_of(tmp_path / "out")
    pairs = {
        "attn_q": llama_rows(measured["model.layers.0.self_attn.q_proj.weight"].numpy(), 4),
        "attn_k": llama_rows(measured["model.layers.0.self_attn.k_proj.weight"].numpy(), 2),
        "attn_v": measured["model.layers.0.self_attn.v_proj.weight"].numpy(),
        "ffn_down": measured["model.layers.0.mlp.down_proj.weight"].numpy(),
    }
    for name, expected in pairs.items():
        tensor = tensors[f"blk.0.{name}.weight"]
        assert tensor.tensor_type.name == kind.upper()
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected)


def test_what_is_off_the_grid_goes_as_f32(on_grid: Any, tmp_path: Path) -> None:
    export(str(on_grid("gguf:q4_0")), tmp_path / "out", format="gguf")
    kinds = {name: t.tensor_type.name for name, t in tensors_of(tmp_path / "out").items()}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert SKIPPED == "model.layers.1.mlp.up_proj"
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert "output.weight" not in kinds, "the head is tied to the embeddings"


def test_a_model_on_no_grid_goes_as_f32_with_its_head(tmp_path: Path, tokenizer: Any) -> None:
    save_model(build_model(len(tokenizer), tied=False), tokenizer, tmp_path / "free")
    result = export(str(tmp_path / "free"), tmp_path / "out", format="gguf")
    assert result["container"] == "gguf:f32"
    assert {t.tensor_type.name for t in tensors_of(tmp_path / "out").values()} == {"F32"}
    assert "output.weight" in tensors_of(tmp_path / "out")
    with pytest.raises(InputError, match="would change its weights"):
        export(str(tmp_path / "free"), tmp_path / "q8", format="gguf:q8_0")


@pytest.mark.parametrize(("name", "kind"), [("int4-g32-sym", "q4_0"), ("int8-g32-sym", "q8_0"), ("mxfp4", "mxfp4")])
def test_grids_with_the_values_of_a_gguf_type_go_under_its_name(
    on_grid: Any, tmp_path: Path, name: str, kind: str
) -> None:
    result = export(str(on_grid(name)), tmp_path / "out", format=f"gguf:{kind}")
    assert result["check"]["weights_equal"]
    assert tensors_of(tmp_path / "out")["blk.0.attn_q.weight"].tensor_type.name == kind.upper()


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_keeps_its_rows_biases_and_norms(tmp_path: Path, tokenizer: Any, family: str) -> None:
    torch.manual_seed(0)
    if family == "Qwen2":
        model = built(family, len(tokenizer), tie_word_embeddings=True)
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.data.normal_()
    else:
        model = built(family, len(tokenizer), head_dim=128)
    directory = tmp_path / family
    stored = put_on_grid(model, "gguf:q5_1")
    save_model(model, tokenizer, directory)
    stored.write(directory)
    result = export(str(directory), tmp_path / "out", format="gguf:q5_1")
    assert result["check"]["weights_equal"]
    assert result["check"]["max_logit_difference"] == 0
    tensor = tensors_of(tmp_path / "out")["blk.1.attn_q.weight"]
    np.testing.assert_array_equal(
        gguf.dequantize(tensor.data, tensor.tensor_type), model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    )


def test_hyperparameters_and_vocabulary_travel(on_grid: Any, tmp_path: Path, tokenizer: Any) -> None:
    student = on_grid("gguf:q4_0")
    export(str(student), tmp_path / "out", format="gguf")
    fields = fields_of(tmp_path / "out")
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.block_count"], fields["llama.context_length"]) == (2, 512)
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.rope.freq_base"] == 10000.0
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1], "special tokens are control tokens"
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.padding_token_id"]) == (2, 0)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "<|im_start|>user\nTell me about bread number 3.<|im_end|>"
    assert back(text).input_ids == tokenizer(text).input_ids


def test_embeddings_without_a_token_are_padded_as_unused(tmp_path: Path, tokenizer: Any) -> None:
    save_model(build_model(len(tokenizer) + 12), tokenizer, tmp_path / "wide")
    result = export(str(tmp_path / "wide"), tmp_path / "out", format="gguf")
    assert result["check"]["weights_equal"]
    fields = fields_of(tmp_path / "out")
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 11}]"
    assert fields["tokenizer.ggml.token_type"][-12:] == [5] * 12


def test_pre_tokenizers_get_llama_cpp_s_name_or_are_refused(tokenizer: Any) -> None:
    def named(*steps: Any, normalizer: Any = None, ignore_merges: bool = False) -> str:
        changed = copy.deepcopy(tokenizer)
        changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        changed.backend_tokenizer.model.ignore_merges = ignore_merges
        if normalizer:
            changed.backend_tokenizer.normalizer = normalizer
        return pre_tokenizer_name(changed)

    digits, plain = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    bytes_alone = pre_tokenizers.ByteLevel(False, use_regex=False)
    assert pre_tokenizer_name(tokenizer) == named(plain) == "gpt-2"
    assert named(plain, normalizer=normalizers.NFC()) == "olmo"
    assert named(digits, plain) == "smollm"
    assert named(digits, plain, normalizer=normalizers.NFC()) == "command-r"
    llama3 = PRE_TOKENIZERS["llama-bpe"].rules[0]["pattern"]["Regex"]
    for behavior, invert in (("isolated", False), ("removed", True)):
        split = pre_tokenizers.Split(Regex(llama3), behavior=behavior, invert=invert)
        assert named(split, bytes_alone) == "smaug-bpe"
        assert named(split, bytes_alone, ignore_merges=True) == "llama-bpe"
    for unknown in (
        [pre_tokenizers.Digits(individual_digits=False), plain],
        [pre_tokenizers.Split(Regex("a"), behavior="isolated"), bytes_alone],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Whitespace()],
    ):
        with pytest.raises(InputError, match="no known name"):
            named(*unknown)
    with pytest.raises(InputError, match="as smollm does, but with ignore_merges: true"):
        named(digits, plain, ignore_merges=True)
    with pytest.raises(InputError, match="changes text before it cuts it"):
        named(plain, normalizer=normalizers.Lowercase())


def test_llama_cpp_tokenizes_and_renders_as_the_model_did(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(("<|more|>",))
    named = {"default": tokenizer.chat_template, "tool_use": "{{ messages[0]['content'] }}!"}
    tokenizer.chat_template = named
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    model = build_model(len(tokenizer))
    model.generation_config.eos_token_id = [2, 0]
    save_model(model, tokenizer, tmp_path / "m")
    result = export(str(tmp_path / "m"), tmp_path / "out", format="gguf")
    assert "note" not in result
    file = tmp_path / "out" / "model.gguf"
    engine, back = LlamaCpp(file), load_tokenizer(find_model(str(file)))
    for text in [*TEXTS, "<|im_start|>user\nHi 12<|im_end|>\n<|more|> 3"]:
        assert engine.tokens(text) == tokenizer.encode(text) == back.encode(text)
    assert back.chat_template == named
    fields = fields_of(tmp_path / "out")
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert "tokenizer.ggml.eom_token_id" not in fields
    assert eos_ids(load(file), back) == (0, 2)
    messages = [{"role": "user", "content": "1. a\n 2"}]
    assert engine.ask("apply-template", messages=messages)["prompt"] == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_what_gguf_can_t_hold_of_a_tokenizer_is_noted(tmp_path: Path, run: Any) -> None:
    tokenizer = build_tokenizer(("<|more|>", "<|other|>"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    model = build_model(len(tokenizer))
    model.generation_config.eos_token_id = [2, 0, 1, len(tokenizer) - 1]
    save_model(model, tokenizer, tmp_path / "m")
    code, out, _ = run("export", tmp_path / "m", "--format", "gguf", "--out", tmp_path / "out")
    assert code == 0
    for text in (out, (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")):
        assert "other" in text
        assert "no field left" in text
        assert "composes text first" in text
    fields = fields_of(tmp_path / "out")
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (0, 1)


def test_tokens_and_templates_that_gguf_would_change_are_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer) + 1)
    tokenizer.chat_template = {"default": "a", "tool-use": "b"}
    save_model(model, tokenizer, tmp_path / "named")
    with pytest.raises(InputError, match='"tool-use" can\'t be written under its name'):
        export(str(tmp_path / "named"), tmp_path / "out", format="gguf")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", rstrip=True)])
    save_model(model, tokenizer, tmp_path / "strips")
    with pytest.raises(InputError, match=r"'<\|tool\|>' takes the blanks"):
        export(str(tmp_path / "strips"), tmp_path / "out", format="gguf")


@pytest.mark.parametrize("name", ["int3-g64-asym", "gguf:q4_0"])
def test_any_grid_goes_unpacked_as_f32(on_grid: Any, tmp_path: Path, name: str) -> None:
    result = export(str(on_grid(name)), tmp_path / "out", format="gguf:f32")
    assert (result["container"], result["grid"]) == ("gguf:f32", name)
    assert result["check"]["weights_equal"]
    assert {t.tensor_type.name for t in tensors_of(tmp_path / "out").values()} == {"F32"}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope is scaled"),
        ("Llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("Llama", {"mlp_bias": True}, "has biases"),
        ("Qwen3", {"head_dim": 16}, "heads are 16 wide"),
        ("Olmo", {}, "allowed are llama, qwen2, qwen3"),
    ],
)
def test_what_gguf_or_its_readers_would_lose_is_refused(
    tmp_path: Path, tokenizer: Any, family: str, changes: dict[str, Any], reason: str
) -> None:
    save_model(built(family, len(tokenizer), **changes), tokenizer, tmp_path / "m")
    with pytest.raises(InputError, match=reason):
        export(str(tmp_path / "m"), tmp_path / "out", format="gguf")


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(("<|extra|>",))
    save_model(build_model(len(tokenizer) - 1), tokenizer, tmp_path / "small")
    with pytest.raises(InputError, match="embeds only"):
        export(str(tmp_path / "small"), tmp_path / "out", format="gguf")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"])
def test_llama_cpp_opens_the_embedded_model(smollm2_dir: Path, tmp_path: Path, kind: str) -> None:
    """Ids and template are equal; f32 answers as transformers does.

    Packed weights are multiplied with 8-bit activations there, which no transformers model does.
    """
    source = smollm2_dir
    if kind != "f32":
        source = tmp_path / "student"
        quantize(str(smollm2_dir), source, format=f"gguf:{kind}", method="rtn", probe=False)
    export(str(source), tmp_path / "out", format=f"gguf:{kind}")
    engine = LlamaCpp(tmp_path / "out" / "model.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert [engine.tokens(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    messages = [{"role": "user", "content": "Name three fruits:\n\n1. apple\n2."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert engine.ask("apply-template", messages=messages)["prompt"] == text
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = tokenizer.encode(text)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0][len(ids) :].tolist()
    reply = engine.ask("completion", prompt=ids, n_predict=24, temperature=0, return_tokens=True, ignore_eos=True)
    assert len(reply["tokens"]) == 24
    if kind == "f32":
        ended = expected.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in expected else len(expected)
        assert reply["tokens"][:ended] == expected[:ended]
        assert ended > 12
