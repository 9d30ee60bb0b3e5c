"""The tokenizer of a GGUF file, built as llama.cpp tokenizes: the file has its vocabulary, and its rules by name only.

transformers builds some of these as those of another model (of SmolLM2 as GPT-2's), which moves borders between tokens.
Source: llama.cpp, llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from remend.console import warn
from remend.data.tokenizer import Tokenizer
from remend.errors import FileError, InputError, did_you_mean
from remend.files.atomic import JsonObject
from remend.models.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    import gguf

_GIVE = "give the model's original directory (safetensors with its tokenizer.json) in place of the file"

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of tokens, as gguf.TokenType numbers them."""

_ALWAYS_WHOLE = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<EOT>"}
_ALWAYS_WHOLE |= {"<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"}
_ALWAYS_WHOLE |= {"<end_of_utterance>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"}
_ALWAYS_WHOLE |= {"<|repo_name|>", "<|file_sep|>"}
"""llama.cpp takes these for control tokens, whatever type the file gives them."""


def build_tokenizer(reader: gguf.GGUFReader, spec: str) -> Tokenizer:
    """The tokenizer that a file's header describes.

    Args:
        reader: of the file.
        spec: what the user called the model, for messages.

    Raises:
        FileError: the header lacks a part, or its parts don't fit each other.
        InputError: a kind of vocabulary or a pre-tokenizer that is not known here.
    """
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerFast

    header = _Header(reader, spec)
    kind = header.text("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
    if kind not in builders:
        raise InputError(
            f"the tokenizer of {spec} is of the kind {kind or 'none'!r} (tokenizer.ggml.model), which can't be built "
            f"from the file so that it is llama.cpp's; kinds that can: {', '.join(builders)}. To go on, {_GIVE}"
        )
    parts, bos_by_default = builders[kind](header)
    special = {role: header.id_of(role, kind) for role in ("bos", "eos", "unknown", "padding", "seperator", "mask")}
    core = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": header.whole_tokens(special.values()),
        "post_processor": _ends(header, bos_by_default, special["bos"], special["eos"]),
        **parts,
    }
    try:
        built = Core.from_str(json.dumps(core))
    except Exception as error:  # tokenizers raises plain exceptions
        raise FileError(f"the tokenizer of {spec} can't be put together: {str(error)[:200]}") from None
    names = {"unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token"}
    named = {names.get(r, f"{r}_token"): header.tokens[i] for r, i in special.items() if i is not None}
    tokenizer: Tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, **named)
    tokenizer.chat_template = header.templates()
    return tokenizer


def more_ends(reader: gguf.GGUFReader) -> list[int]:
    """Ids that end an answer beside the end-of-sequence token: the ends of a turn and of a message."""
    fields = (reader.fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eom"))
    return [int(field.contents()) for field in fields if field]


def _byte_level(header: _Header) -> tuple[JsonObject, bool]:
    """Byte-level BPE: merges in the file, rules by name."""
    rules = _named_rules(header)
    merges = header.strings("tokenizer.ggml.merges")
    if not merges:
        raise FileError(f"the file {header.spec} has no merges (tokenizer.ggml.merges); {_GIVE}")
    steps = list(rules.rules)
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": {"type": "NFC"} if rules.nfc else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": decoder,
        "model": _bpe(header, [merge.split(" ", 1) for merge in merges], ignore_merges=rules.ignore_merges),
    }, rules.add_bos


def _named_rules(header: _Header) -> PreTokenizer:
    name = header.text("tokenizer.ggml.pre")
    if not name:
        warn(
            f"{header.spec} does not name its pre-tokenizer (tokenizer.ggml.pre), so it is tokenized by llama.cpp's "
            "default rules, which may not be those of its training; a newer conversion of the model names them"
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f'the file {header.spec} names the pre-tokenizer "{name}" (tokenizer.ggml.pre), which is not known here, '
            f"so its text would be cut otherwise than by its model.{did_you_mean(name, list(PRE_TOKENIZERS))} To "
            f"go on, {_GIVE}. Known are {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece(header: _Header) -> tuple[JsonObject, bool]:
    """BPE over characters with SentencePiece's scores in place of merges: the best-scored pair is joined first."""
    prefix = header.flag("tokenizer.ggml.add_space_prefix", True)
    return _characters(header, _merges_by_score(header), prefix=prefix), True


def _gemma4(header: _Header) -> tuple[JsonObject, bool]:
    """BPE over characters with merges in the file; lines are apart from the breaks between them."""
    merges = [merge.split(" ", 1) for merge in header.strings("tokenizer.ggml.merges")]
    lines = {"type": "Split", "pattern": {"Regex": r"[^\n]+|[\n]+"}, "behavior": "Isolated", "invert": False}
    return {**_characters(header, merges, prefix=False), "pre_tokenizer": lines}, True


def _characters(header: _Header, merges: list[list[str]], *, prefix: bool) -> JsonObject:
    """BPE over characters in which ▁ stands for a blank, and bytes for what has no token."""
    if not all(f"<0x{byte:02X}>" in header.ids for byte in range(256)):
        raise InputError(
            f"the vocabulary of {header.spec} has no token for each byte, so what it does with unknown characters is "
            f"not known here. To go on, {_GIVE}"
        )
    blank: JsonObject = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # before every stretch of text between special tokens, as llama.cpp does
    before: list[JsonObject] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    after: list[JsonObject] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    text: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, blank]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*text, *after]},
        "model": {**_bpe(header, merges), "byte_fallback": True, "fuse_unk": True},
    }


def _merges_by_score(header: _Header) -> list[list[str]]:
    """Every way to make a token of two, the best-scored token first."""
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) != len(header.tokens):
        raise FileError(f"the file {header.spec} has {len(header.tokens)} tokens and {len(scores)} scores; {_GIVE}")
    ids = header.ids
    merges = [
        (-scores[i], i, cut)
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [[header.tokens[i][:cut], header.tokens[i][cut:]] for _, i, cut in sorted(merges)]


def _bpe(header: _Header, merges: list[list[str]], *, ignore_merges: bool = False) -> JsonObject:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": header.ids,
        "merges": merges,
    }


def _ends(header: _Header, bos_by_default: bool, bos: int | None, eos: int | None) -> JsonObject:
    """What is put before and after plain text."""
    around: dict[str, int] = {}
    for role, i, default in (("bos", bos, bos_by_default), ("eos", eos, False)):
        if not header.flag(f"tokenizer.ggml.add_{role}_token", default):
            continue
        if i is None:
            raise FileError(f"the file {header.spec} wants a {role} token around text and names none; {_GIVE}")
        around[role] = i

    def at(role: str, sequence: int) -> list[JsonObject]:
        return [{"SpecialToken": {"id": header.tokens[around[role]], "type_id": sequence}}] if role in around else []

    def text(name: str, sequence: int) -> list[JsonObject]:
        return [*at("bos", sequence), {"Sequence": {"id": name, "type_id": sequence}}, *at("eos", sequence)]

    named = {}
    for i in around.values():
        named[header.tokens[i]] = {"id": header.tokens[i], "ids": [i], "tokens": [header.tokens[i]]}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": named,
    }


@dataclass(frozen=True)
class _Header:
    """What a file's header says of its tokenizer."""

    reader: gguf.GGUFReader
    spec: str

    def _value(self, name: str) -> Any:
        field = self.reader.fields.get(name)
        return None if field is None else field.contents()

    def text(self, name: str) -> str:
        return str(self._value(name) or "")

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name)
        return default if value is None else bool(value)

    def strings(self, name: str) -> list[str]:
        return [str(value) for value in self._value(name) or []]

    def numbers(self, name: str) -> list[float]:
        return [float(value) for value in self._value(name) or []]

    @cached_property
    def tokens(self) -> list[str]:
        """By id, none twice."""
        tokens = self.strings("tokenizer.ggml.tokens")
        if not tokens:
            raise FileError(f"the file {self.spec} has no vocabulary (tokenizer.ggml.tokens); {_GIVE}")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if len(set(tokens)) < len(tokens):
            raise FileError(f"the vocabulary of {self.spec} has a token twice; convert the model anew")
        return tokens

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def types(self) -> list[int]:
        """By id; those of a file that gives none are normal."""
        types = [int(value) for value in self._value("tokenizer.ggml.token_type") or []]
        if types and len(types) != len(self.tokens):
            raise FileError(f"the file {self.spec} has {len(self.tokens)} tokens and {len(types)} types of tokens")
        return types or [1] * len(self.tokens)

    def id_of(self, role: str, kind: str) -> int | None:
        """The id of the special token of a role, e.g. 'bos'; None where there is none. `kind` is the vocabulary's."""
        value = self._value(f"tokenizer.ggml.{role}_token_id")
        if value is None and kind == "llama":  # as SentencePiece numbers them
            value = {"unknown": 0, "bos": 1, "eos": 2}.get(role)
        return int(value) if value is not None and 0 <= int(value) < len(self.tokens) else None

    def whole_tokens(self, special: Iterable[int | None]) -> list[JsonObject]:
        """Tokens that are found in text as they stand, before it is cut."""
        named = {i for i in special if i is not None}
        # of Phi-3, which the file tells by its name alone
        strips = any(phi in self.text("general.name").lower() for phi in ("phi-3", "phi3"))
        keeps = ("<unk>", "<s>", "<|endoftext|>")
        whole = []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            control = kind in (_UNKNOWN, _CONTROL) or token in _ALWAYS_WHOLE or i in named
            if control or kind == _USER_DEFINED:
                whole.append(
                    {
                        "id": i,
                        "content": token,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": strips and token not in keeps,
                        "normalized": False,
                        "special": control,
                    }
                )
        return whole

    def templates(self) -> str | dict[str, str] | None:
        """The chat template, or several by name."""
        default = self.text("tokenizer.chat_template")
        names = self.strings("tokenizer.chat_templates")
        texts = {name: self.text(f"tokenizer.chat_template.{name}") for name in names}
        named = {name: template for name, template in texts.items() if template}
        if not named:
            return default or None
        return {"default": default, **named} if default else named
