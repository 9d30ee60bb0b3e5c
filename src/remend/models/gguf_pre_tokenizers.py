"""How llama.cpp cuts text before it merges, by the name that a GGUF file has under `tokenizer.ggml.pre`.

The rules are written as `tokenizers` writes them into tokenizer.json, so a tokenizer can be built of them, and the
rules of a tokenizer can be compared with them. Where llama.cpp's own engine only comes near a model's expression (it
knows no classes of capitals), the model's expression stands here. Source: llama.cpp, llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remend.files.atomic import JsonObject

Rules = tuple[JsonObject, ...]


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text into the pieces within which tokens are merged.

    Attributes:
        rules: steps of a `tokenizers` pre-tokenizer, in order.
        ignore_merges: a piece that is a token is that token, whatever the merges make of it.
        add_bos: text begins with the beginning-of-sequence token where the file does not say otherwise.
        nfc: the models of that name compose their text first (Unicode NFC), which llama.cpp does not do.
        other_rules: what other tokenizers write for the same.
        differs: what llama.cpp does otherwise than the models, said of it; "" where it does the same.
    """

    rules: Rules
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    other_rules: tuple[Rules, ...] = ()
    differs: str = ""


def _split(expression: str) -> JsonObject:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> JsonObject:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _of(*expressions: str) -> Rules:
    """Split by each expression in turn, and spell the bytes of what is left as characters."""
    return (*(_split(expression) for expression in expressions), _BYTES)


_GPT2 = _byte_level(use_regex=True)
_BYTES = _byte_level(use_regex=False)
_DIGIT: JsonObject = {"type": "Digits", "individual_digits": True}

_PLAIN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's expression, which ByteLevel has in itself."""
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_BLANKS}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
)
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_GPT4O = rf"{_LOWER}{_CONTRACTION}?|{_UPPER}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_WHOLE = (_LLAMA3, _QWEN2, _QWEN35, _TEKKEN, _GPT4O)
"""Expressions that leave nothing between their matches."""
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛ"
    "ὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)  # some as numbers: composing this file's text (NFC) would turn them into others
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
)
_BY_THREE = "[0-9][0-9][0-9]"

_NO_CASES = (
    "cuts words at combining marks (as Thai, Hindi and pointed Hebrew have), and not before a capital beyond A to Z, "
    "where this tokenizer does otherwise"
)
_WIDE_BLANK = "joins a wide blank (U+3000) with the word after it, which this tokenizer cuts off"

_GROUPS: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert jais trillion granite-docling exaone4": PreTokenizer((_GPT2,)),
    "olmo mpt": PreTokenizer((_GPT2,), nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer((_DIGIT, _GPT2)),
    "command-r": PreTokenizer((_DIGIT, _GPT2), nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        _of(_LLAMA3), ignore_merges=True, add_bos=True
    ),
    "smaug-bpe dbrx glm4 chatglm-bpe": PreTokenizer(_of(_LLAMA3)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": PreTokenizer(_of(_QWEN2), nfc=True),
    "stablelm2 hunyuan solar-open grok-2": PreTokenizer(_of(_QWEN2)),
    "qwen35": PreTokenizer(_of(_QWEN35), nfc=True),
    "tekken": PreTokenizer(_of(_TEKKEN), ignore_merges=True, add_bos=True, differs=_NO_CASES),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer(_of(_GPT4O), differs=_NO_CASES),
    "deepseek-llm": PreTokenizer(
        _of(*_DEEPSEEK_LLM, r"\p{N}+"), other_rules=((*_of(*_DEEPSEEK_LLM)[:-1], _DIGIT, _BYTES),), differs=_WIDE_BLANK
    ),
    "deepseek-coder": PreTokenizer(
        _of(*_DEEPSEEK_CODER, r"\p{N}"),
        other_rules=((*_of(*_DEEPSEEK_CODER)[:-1], _DIGIT, _BYTES),),
        differs=_WIDE_BLANK,
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(_of(*_DEEPSEEK_V3)),
    "seed-coder": PreTokenizer(_of(rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}")),
    "ufakzeka": PreTokenizer(_of(rf"{_WORD}|\p{{N}}|{_MARKS}|{_BLANKS}")),
    "laguna": PreTokenizer(_of(r"[^\n]+|[\n]+", _QWEN2)),
    "minicpm5": PreTokenizer(
        _of(r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_MARKS}|{_BLANKS}"), ignore_merges=True
    ),
    "falcon": PreTokenizer(_of(r"[\p{P}\$\+<=>\^~\|`]+", _PLAIN, _BY_THREE)),
    "poro-chat bloom gpt3-finnish": PreTokenizer(_of(_BLOOM)),
    "viking": PreTokenizer(_of(_BLOOM, r"\p{N}")),
    "default": PreTokenizer(_of(r"[\p{P}\$\+<=>\^~\|]+", _PLAIN, r"\p{N}+", _BY_THREE)),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for names, kind in _GROUPS.items() for name in names.split()}
"""By name; of several names for the same the first is the one to write."""


def name_of(pre_tokenizer: JsonObject | None, *, ignore_merges: bool, nfc: bool) -> str | None:
    """The name of a pre-tokenizer's rules, None for those that have none.

    Args:
        pre_tokenizer: as tokenizer.json has it.
        ignore_merges: the setting of the BPE model beside it.
        nfc: whether text is composed first. A name without it is given where there is none with it.
    """
    step = pre_tokenizer or {}
    steps = tuple(_plain(s) for s in (step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]))
    fitting = [
        (name, kind)
        for name, kind in PRE_TOKENIZERS.items()
        if kind.ignore_merges == ignore_merges
        and any(steps == tuple(_plain(s) for s in rules) for rules in (kind.rules, *kind.other_rules))
    ]
    exact = [name for name, kind in fitting if kind.nfc == nfc]
    return next(iter(exact or [name for name, _ in fitting]), None)


def _plain(step: Mapping[str, object]) -> dict[str, object]:
    """A step without what moves no border."""
    kept = {key: value for key, value in step.items() if key != "trim_offsets"}
    matches_alone = (kept.get("behavior"), kept.get("invert")) == ("Removed", True)
    if matches_alone and any(kept.get("pattern") == {"Regex": expression} for expression in _WHOLE):
        return {**kept, "behavior": "Isolated", "invert": False}
    return kept
