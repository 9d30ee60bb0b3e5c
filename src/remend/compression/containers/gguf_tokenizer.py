"""A byte-level BPE tokenizer as llama.cpp stores it: tokens, types, merges, special ids, pre-tokenizer."""

from __future__ import annotations

import json
import tempfile

import gguf

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.protocols import CausalLM, Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}
"""Regular expressions that cut text before merging, and what llama.cpp calls them (llama-vocab.cpp)."""


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text. Raises InputError for one that it has no name for here."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    layout = json.loads(core.to_str()) if core is not None else {}
    if layout.get("model", {}).get("type") != "BPE" or (layout.get("decoder") or {}).get("type") != "ByteLevel":
        raise InputError(
            "only byte-level BPE tokenizers can be written as GGUF here (those of GPT-2, Llama 3, Qwen and SmolLM); "
            f"this one is {layout.get('model', {}).get('type', 'no fast tokenizer')}; use --format dense"
        )
    steps = layout.get("pre_tokenizer") or {}
    name = _name_of(steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps])
    if name is None:
        raise InputError(
            "the tokenizer cuts text in a way that llama.cpp has no known name for, so it would tokenize differently; "
            f"known: gpt-2, smollm, {', '.join(SPLITS.values())}; use --format dense"
        )
    return name


def _name_of(steps: list[JsonObject]) -> str | None:
    kinds = [s.get("type") for s in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        return "smollm" if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") else None
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def add_vocabulary(writer: gguf.GGUFWriter, model: CausalLM, tokenizer: Tokenizer) -> None:
    """Write the tokenizer and its chat template into a GGUFWriter. Raises InputError for one that can't be written."""
    name = pre_tokenizer_name(tokenizer)
    size = model.get_input_embeddings().num_embeddings
    added = tokenizer.added_tokens_decoder
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise InputError(f"the tokenizer has ids up to {max(by_id)}, but the model embeds only {size} tokens")
    tokens, types = [], []
    for i in range(size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.chat_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    for role in ("bos", "eos", "pad", "unk"):  # the tokenizer's own ids go before what its files leave open
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            special.special_token_ids[role] = token
    special.add_to_gguf(writer, quiet=True)
