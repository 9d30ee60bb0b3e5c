"""A byte-level BPE tokenizer as llama.cpp stores it: tokens, types, merges, ends, templates, and its rules by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.gguf_header import parsed_once
from remend.models.gguf_pre_tokenizers import PRE_TOKENIZERS, name_of
from remend.models.gguf_tokenizer import build_tokenizer
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.vocabulary import PROBES

_ELSE = "use --format dense"


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text.

    Raises InputError for a tokenizer that is not byte-level BPE, and for rules that have no name.
    """
    core = _core(tokenizer)
    model = core["model"]
    normalizer = core.get("normalizer") or {}
    if normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = next(iter(normalizer["normalizers"]), {})
    if normalizer.get("type") not in (None, "NFC"):
        raise InputError(
            f"the tokenizer changes text before it cuts it ({normalizer['type']}), and llama.cpp does not; {_ELSE}"
        )
    parts = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if parts:
        raise InputError(f"the tokenizer's BPE has {' and '.join(parts)}, which llama.cpp has not; {_ELSE}")
    rules = core.get("pre_tokenizer")
    whole, nfc = bool(model.get("ignore_merges")), normalizer.get("type") == "NFC"
    name = name_of(rules, ignore_merges=whole, nfc=nfc)
    if name is None:
        other = name_of(rules, ignore_merges=not whole, nfc=nfc)
        reason = (
            f"as {other} does, but with ignore_merges: {str(whole).lower()}, for which llama.cpp has no name"
            if other
            else f"in a way that llama.cpp has no known name for ({json.dumps(rules, ensure_ascii=False)[:200]})"
        )
        raise InputError(f"the tokenizer cuts text {reason}, so it would tokenize differently there; {_ELSE}")
    return name


def _core(tokenizer: Tokenizer) -> JsonObject:
    core = getattr(tokenizer, "backend_tokenizer", None)
    layout: JsonObject = json.loads(core.to_str()) if core is not None else {}
    if layout.get("model", {}).get("type") != "BPE" or (layout.get("decoder") or {}).get("type") != "ByteLevel":
        raise InputError(
            "only byte-level BPE tokenizers can be written as GGUF here (those of GPT-2, Llama 3, Qwen and SmolLM); "
            f"this one is {layout.get('model', {}).get('type', 'no fast tokenizer')}; {_ELSE}"
        )
    return layout


def add_vocabulary(writer: gguf.GGUFWriter, model: CausalLM, tokenizer: Tokenizer) -> list[str]:
    """Write the tokenizer and its chat templates into a GGUFWriter.

    Returns:
        Sentences on what the file can't hold, or llama.cpp does otherwise.

    Raises:
        InputError: a tokenizer that can't be written so that llama.cpp tokenizes as it does.
    """
    name = pre_tokenizer_name(tokenizer)
    core = _core(tokenizer)
    size = model.get_input_embeddings().num_embeddings
    tokens, types = _tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["model"]["merges"]])
    notes = _add_special(writer, model, tokenizer, size)
    _add_templates(writer, tokenizer)
    if core.get("normalizer") and core["normalizer"] != {"type": "Sequence", "normalizers": []}:
        notes.append(
            "the tokenizer composes text first (Unicode NFC) and llama.cpp does not: letters with separate accents are "
            "tokenized otherwise there"
        )
    if PRE_TOKENIZERS[name].differs:
        notes.append(f"llama.cpp's {name} {PRE_TOKENIZERS[name].differs}")
    return notes


def _tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """By id up to `size`, the rows of the embedding; rows that no token has are unused."""
    added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise InputError(f"the tokenizer has ids up to {max(by_id)}, but the model embeds only {size} tokens")
    greedy = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
    if greedy:
        raise InputError(
            f"the token {greedy[0]!r} takes the blanks around it, or stands as a word alone, which GGUF has no field "
            f"for, so it would tokenize differently there; {_ELSE}"
        )
    types = []
    for i in range(size):
        if i not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], types


def _add_special(writer: gguf.GGUFWriter, model: CausalLM, tokenizer: Tokenizer, size: int) -> list[str]:
    """Special ids, what is put around plain text, and the ends of answers; what has no field is returned."""
    ids: dict[str, int | None] = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    for role in ("bos", "eos", "pad"):  # the tokenizer's own go before what it leaves open
        other = getattr(model.config, f"{role}_token_id", None)
        if ids[role] is None and isinstance(other, int) and 0 <= other < size:
            ids[role] = other
    for role, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{role}_token_id")(i)
    text = tokenizer.encode("a", add_special_tokens=False)
    around = tokenizer.encode("a", add_special_tokens=True)
    known = {
        (*before, *text, *after): (bool(before), bool(after))
        for before in ([], [ids["bos"]])
        for after in ([], [ids["eos"]])
    }
    if tuple(around) not in known:
        raise InputError(
            f"the tokenizer puts other tokens around text than its beginning and its end ({tokenizer.decode(around)!r} "
            f"for 'a'), which GGUF has no field for; {_ELSE}"
        )
    bos, eos = known[tuple(around)]
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    ends = [i for i in eos_ids(model, tokenizer) if i != ids["eos"] and i < size]
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False):
        add(i)
    lost = [f"{tokenizer.decode([i])!r} ({i})" for i in ends[2:]]
    return [f"answers also end at {', '.join(lost)}, for which GGUF has no field left"] if lost else []


def _add_templates(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    template = tokenizer.chat_template
    if not template:
        return
    if isinstance(template, str):
        writer.add_chat_template(template)
        return
    odd = [name for name in template if not re.fullmatch(r"\w+", name, re.ASCII)]
    if odd:
        raise InputError(
            f'the chat template "{odd[0]}" can\'t be written under its name: GGUF takes letters, digits and _ alone; '
            f"rename it, or {_ELSE}"
        )
    writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def require_same_tokens(file: Path, tokenizer: Tokenizer) -> None:
    """Raises InputError when the tokenizer that is built of the file is not the one that was written."""
    with parsed_once():
        back = build_tokenizer(gguf.GGUFReader(file), file.name)
    special = "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    for text in (*PROBES, "a" + special + "a"):
        if back.encode(text, add_special_tokens=True) != tokenizer.encode(text, add_special_tokens=True):
            raise InputError(
                f"the tokenizer can't be written as GGUF: read back, it cuts {text[:60]!r} otherwise; {_ELSE}"
            )
