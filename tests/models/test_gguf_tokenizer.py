"""A GGUF file's tokenizer is llama.cpp's: compared with llama.cpp itself, which reads the same tiny files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from helpers.llama_cpp import LlamaCpp, tiny_file
from helpers.texts import CAPITALS, DECOMPOSED, MARKS, TEXTS, WIDE_BLANK
from remend.errors import FileError, InputError
from remend.models.find import find_model
from remend.models.gguf_pre_tokenizers import PRE_TOKENIZERS, name_of
from remend.models.load import load_tokenizer

ODD = MARKS + CAPITALS + DECOMPOSED + WIDE_BLANK
"""Where llama.cpp is known not to do as the models that a name stands for."""

ASKED = ["default", "llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-llm", "tekken", "command-r", "starcoder"]
ASKED += ["stablelm2", "olmo", "gpt-4o"]
DISTINCT = list({id(kind): name for name, kind in reversed(PRE_TOKENIZERS.items())}.values())
NAMES = list(dict.fromkeys(ASKED + DISTINCT))

SPECIAL = ["<|end|>", "<|user|>"]


@pytest.fixture(scope="module")
def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges of a vocabulary that is trained without borders, so that a missing border shows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 3 + ODD * 9, trainer)
    model = json.loads(core.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


Written = Callable[..., Path]


@pytest.fixture
def written(byte_level: tuple[list[str], list[str]], tmp_path: Path) -> Written:
    """Writes a tiny file with the byte-level vocabulary and more header fields."""
    tokens, merges = byte_level

    def write(pre: str | None, **header: Any) -> Path:
        fields = {"bos_token_id": 1, "eos_token_id": 0} | ({"pre": pre} if pre else {}) | header
        named = {name if "." in name else f"tokenizer.ggml.{name}": value for name, value in fields.items()}
        types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
        return tiny_file(tmp_path / "model.gguf", tokens, types, merges=merges, header=named)

    return write


def loaded(file: Path) -> Any:
    return load_tokenizer(find_model(str(file)))


def differing(engine: LlamaCpp, tokenizer: Any, texts: list[str]) -> list[tuple[str, Any, Any]]:
    pairs = [(text, engine.tokens(text), tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return [pair for pair in pairs if pair[1] != pair[2]]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_pre_tokenizer_cuts_as_llama_cpp_does(written: Written, name: str) -> None:
    file, kind = written(name), PRE_TOKENIZERS[name]
    engine, tokenizer = LlamaCpp(file), loaded(file)
    joined = "<|end|>\n".join(f"<|user|>{text}" for text in TEXTS)
    assert differing(engine, tokenizer, [*TEXTS, joined]) == []
    assert engine.tokens("a 1", add_special=True) == tokenizer.encode("a 1")
    assert bool(differing(engine, tokenizer, MARKS + CAPITALS + WIDE_BLANK)) == bool(kind.differs)
    assert bool(differing(engine, tokenizer, DECOMPOSED)) == (kind.nfc or "combining marks" in kind.differs)


def test_names_of_the_same_rules_are_written_as_the_first() -> None:
    for name in DISTINCT:
        kind = PRE_TOKENIZERS[name]
        for rules in (kind.rules, *kind.other_rules):
            steps = {"type": "Sequence", "pretokenizers": list(rules)} if len(rules) > 1 else rules[0]
            assert name_of(steps, ignore_merges=kind.ignore_merges, nfc=kind.nfc) == name
    assert name_of({"type": "Whitespace"}, ignore_merges=False, nfc=False) is None
    assert name_of(None, ignore_merges=False, nfc=False) is None


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_a_saved_directory_has_the_same_tokenizer(written: Written, tmp_path: Path, config: Any) -> None:
    tokenizer = loaded(written("qwen2"))
    tokenizer.save_pretrained(tmp_path / "saved")
    config().save_pretrained(tmp_path / "saved")
    back: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [back.encode(text) for text in TEXTS + ODD] == [tokenizer.encode(text) for text in TEXTS + ODD]
    assert back.decode(back.encode("a  1 ,b")) == "a  1 ,b"


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, False)])
def test_the_file_says_what_is_put_around_text(written: Written, bos: bool, eos: bool) -> None:
    file = written("llama-bpe", add_bos_token=bos, add_eos_token=eos)
    tokenizer = loaded(file)
    assert LlamaCpp(file).tokens("a", add_special=True) == tokenizer.encode("a")
    assert len(tokenizer.encode("a")) == 1 + bos + eos


def test_a_file_without_a_name_is_cut_by_the_default_with_a_warning(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(None)
    assert differing(LlamaCpp(file), loaded(file), TEXTS) == []
    assert "does not name its pre-tokenizer" in capsys.readouterr().err


def test_what_is_not_known_is_refused_by_name(written: Written) -> None:
    with pytest.raises(InputError, match=r'"smolm" .* Did you mean "?smollm.*original directory'):
        loaded(written("smolm"))
    with pytest.raises(InputError, match="kimi-k2"):
        loaded(written("kimi-k2"))
    for kind in ("bert", "t5", "rwkv", "plamo2"):
        with pytest.raises(InputError, match=f"of the kind '{kind}'.*gpt2, llama, gemma4"):
            loaded(written("default", **{"tokenizer.ggml.model": kind}))
    with pytest.raises(FileError, match="wants a bos token"):
        loaded(written("llama-bpe", bos_token_id=100_000))


def test_templates_are_read_with_their_names(written: Written) -> None:
    assert loaded(written("gpt-2")).chat_template is None
    assert loaded(written("gpt-2", **{"tokenizer.chat_template": "one"})).chat_template == "one"
    named = {"tokenizer.chat_templates": ["tool_use", "rag"], "tokenizer.chat_template.tool_use": "with tools"}
    assert loaded(written("gpt-2", **named)).chat_template == {"tool_use": "with tools"}
    both = loaded(written("gpt-2", **named, **{"tokenizer.chat_template": "plain"}))
    assert both.chat_template == {"default": "plain", "tool_use": "with tools"}


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def pieces() -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores as SentencePiece has them."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, min_frequency=2, show_progress=False, limit_alphabet=150)
    core.train_from_iterator([line for text in TEXTS * 3 for line in text.split("\n")], trainer)
    model = json.loads(core.to_str())["model"]
    merged = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    letters = [token for token in model["vocab"] if len(token) == 1]
    named = ["<|user|>", "<tool>", "<|endoftext|>"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *merged, *letters, *named]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters)) + [3, 4, 3]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged))] + [-1e6] * len(letters) + [0.0] * 3
    return tokens, types, scores


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False},
        {"tokenizer.ggml.add_eos_token": True},
        {"general.name": "Phi-3 mini"},
    ],
    ids=["llama", "gemma", "eos", "phi-3"],
)
def test_sentencepiece_joins_as_llama_cpp_does(
    pieces: tuple[list[str], list[int], list[float]], tmp_path: Path, header: dict[str, Any]
) -> None:
    tokens, types, scores = pieces
    file = tiny_file(tmp_path / "m.gguf", tokens, types, model="llama", scores=scores, header=header)
    engine, tokenizer = LlamaCpp(file), loaded(file)
    joined = "</s>\n".join(f"<s><|user|> {text}\n<tool>x<tool> y" for text in TEXTS)
    assert differing(engine, tokenizer, [*TEXTS, *ODD, joined, "<unk> x"]) == []
    assert engine.tokens("a 1", add_special=True) == tokenizer.encode("a 1")
    text = "a  1 été\n你 ,b"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_gemma4_merges_characters_as_llama_cpp_does(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), "isolated")
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=500, min_frequency=2, show_progress=False))
    model = json.loads(core.to_str())["model"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *sorted(model["vocab"], key=model["vocab"].get)]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260)
    merges = [" ".join(pair) for pair in model["merges"]]
    header = {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}
    file = tiny_file(tmp_path / "m.gguf", tokens, types, model="gemma4", merges=merges, header=header)
    engine, tokenizer = LlamaCpp(file), loaded(file)
    joined = "<eos>\n".join(f"<bos>{text}" for text in TEXTS)
    assert differing(engine, tokenizer, [*TEXTS, *ODD, joined]) == []
    assert engine.tokens("a 1", add_special=True) == tokenizer.encode("a 1")
    assert tokenizer.decode(tokenizer.encode(joined, add_special_tokens=False)) == joined


def test_sentencepiece_without_bytes_is_refused(
    pieces: tuple[list[str], list[int], list[float]], tmp_path: Path
) -> None:
    tokens, types, scores = pieces
    named = [token.replace("<0x1F>", "<other>") for token in tokens]
    file = tiny_file(tmp_path / "m.gguf", named, types, model="llama", scores=scores)
    with pytest.raises(InputError, match="no token for each byte"):
        loaded(file)


@pytest.mark.slow
def test_the_embedded_model_is_tokenized_as_llama_cpp_does(smollm2_dir: Path) -> None:
    source = find_model("smollm2")
    assert source.path is not None
    assert gguf.GGUFReader(source.path).fields["tokenizer.ggml.pre"].contents() == "smollm"
    engine, tokenizer = LlamaCpp(source.path), load_tokenizer(source)
    saved: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    assert differing(engine, tokenizer, TEXTS + ODD) == []
    assert [saved.encode(text) for text in TEXTS + ODD] == [tokenizer.encode(text) for text in TEXTS + ODD]
    messages = [{"role": "user", "content": "Name three fruits:\n\n1. apple\n2."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert engine.ask("apply-template", messages=messages)["prompt"] == text
    assert engine.tokens("\n\n1. a") == [1116, 33, 30, 253]
