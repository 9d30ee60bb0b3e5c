"""Which of the texts that a model wrote are kept as prompts: filters on plain text, and a count of what each removed.

Texts are offered one by one and the first n that pass all filters are kept, so the order of the texts settles the
choice. Every threshold is a constant here. On what a 135M model wrote at temperature 1 only three filters ever acted:
not ended, template and openings; the others stand guard and are tested on hand-made text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from remend.errors import InputError

MIN_CHARACTERS, MAX_CHARACTERS = 8, 800
MIN_WORDS, MAX_WORDS = 3, 120
MIN_LETTERS = 0.5
"""Share of letters in what is not white space: code and sums pass, tables of numbers and ASCII art don't."""
MIN_ORDINARY = 0.95
"""Share of letters, digits, punctuation, white space and printable ASCII in all characters."""
MIN_DISTINCT = 0.7
"""Share of a text's word 3-grams that must be distinct, from REPETITION_WORDS words on."""
REPETITION_WORDS = 10
NEAR_DUPLICATE = 0.7
"""Jaccard similarity of two prompts' word 3-grams from which the later one is dropped."""
OPENING_SHARE, OPENING_LEAST = 0.05, 3
"""At most this share of the prompts asked for, and at least this many, may begin with the same two words."""

TRIES_A_PROMPT, FIRST_TRIES = 20, 128
"""Given up when fewer than one try in TRIES_A_PROMPT was kept after FIRST_TRIES: so the tries are bounded too."""

REASONS = {
    "not_ended": "not ended",
    "length": "too short or too long",
    "characters": "characters",
    "template": "parts of the chat template",
    "repetition": "repetition",
    "duplicate": "duplicates",
    "near_duplicate": "near-duplicates",
    "opening": "openings that are common already",
}
"""Why a try is dropped, in the order in which it is asked: a try counts for the first reason that holds."""


@dataclass(frozen=True)
class Counts:
    """What became of the tries: attempts = kept + the sum of `removed` (by REASONS, all of them, zeros too)."""

    attempts: int
    kept: int
    removed: dict[str, int]

    def describe(self) -> str:
        """What was removed, in words: 'not ended 31, repetition 2', or 'nothing'."""
        return ", ".join(f"{REASONS[r]} {count}" for r, count in self.removed.items() if count) or "nothing"


_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\s぀-ヿ㐀-䶿一-鿿]+")
_EDGE = re.compile(r"^[\W_]+|[\W_]+$")


def words_of(text: str) -> list[str]:
    """Words in lower case without the punctuation around them; each Chinese or Japanese character is one."""
    return [word for part in _WORD.findall(text.casefold()) if (word := _EDGE.sub("", part))]


def grams_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Word 3-grams; the words themselves where there are fewer than three."""
    return [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


def wrong_length(text: str) -> bool:
    """Outside MIN_… to MAX_CHARACTERS or MIN_… to MAX_WORDS."""
    fits = MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
    return not (fits and MIN_WORDS <= len(words_of(text)) <= MAX_WORDS)


def odd_characters(text: str) -> bool:
    """Undecodable bytes, control characters, too few letters (MIN_LETTERS), or too many odd symbols (MIN_ORDINARY)."""
    kinds = [unicodedata.category(c) for c in text]
    if "�" in text or any(k in ("Cc", "Cn", "Co", "Cs") and c not in "\n\t" for c, k in zip(text, kinds, strict=True)):
        return True
    solid = sum(not c.isspace() for c in text)
    letters = sum(k[0] in "LM" for k in kinds)
    ordinary = sum(k[0] in "LMNPZC" or c.isascii() for c, k in zip(text, kinds, strict=True))
    return letters < MIN_LETTERS * solid or ordinary < MIN_ORDINARY * len(text)


_HEADERS = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|^[#*\s]*(?:system|user|assistant|human|ai)[*\s]*(?::|$)"
    r"|^#{2,}\s*(?:instruction|response)\b",
    re.IGNORECASE | re.MULTILINE,
)
"""Turn markers of common templates, and lines that name a role."""


def template_leak(text: str, marks: Iterable[str] = ()) -> bool:
    """A role's header, a turn marker or a special token stands inside the text: it went on into the next turn."""
    return bool(_HEADERS.search(text)) or any(mark in text for mark in marks)


def degenerate(text: str) -> bool:
    """One character ten times, one word four times in a row, or too few distinct 3-grams (MIN_DISTINCT)."""
    if re.search(r"(\S)\1{9}", text):
        return True
    words = words_of(text)
    if any(len(set(words[i : i + 4])) == 1 for i in range(len(words) - 3)):
        return True
    grams = grams_of(words)
    return len(words) >= REPETITION_WORDS and len(set(grams)) < MIN_DISTINCT * len(grams)


@dataclass
class Sieve:
    """Keeps the first `n` texts that pass all filters, and counts what each filter removed.

    marks: special tokens as text; none may stand in a prompt.
    """

    n: int
    marks: Sequence[str] = ()
    kept: list[str] = field(default_factory=list)
    _attempts: int = 0
    _removed: Counter[str] = field(default_factory=Counter)
    _seen: set[tuple[str, ...]] = field(default_factory=set)
    _openings: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _sizes: list[int] = field(default_factory=list)  # distinct 3-grams of each kept text
    _holders: dict[tuple[str, ...], list[int]] = field(default_factory=dict)  # which kept texts hold a 3-gram

    @property
    def full(self) -> bool:
        """Whether n are kept."""
        return len(self.kept) >= self.n

    @property
    def counts(self) -> Counts:
        """Of everything offered so far."""
        return Counts(self._attempts, len(self.kept), {reason: self._removed[reason] for reason in REASONS})

    def offer(self, text: str | None) -> str | None:
        """Keep a text, or say why not (a key of REASONS). None is a text that did not end."""
        self._attempts += 1
        reason = self._reason(text)
        if reason:
            self._removed[reason] += 1
        else:
            assert text is not None
            self._keep(text)
        return reason

    def require_yield(self) -> None:
        """Raise InputError when too few tries were kept to go on; see TRIES_A_PROMPT."""
        if self._attempts < FIRST_TRIES or len(self.kept) * TRIES_A_PROMPT >= self._attempts:
            return
        worst = max(self._removed, key=lambda reason: self._removed[reason])
        advice = {
            "not_ended": "its turns don't end: raise max_new_tokens, or lower the temperature",
            "opening": "it always begins alike: raise the temperature, or ask for fewer prompts",
            "duplicate": "it repeats itself: raise the temperature, or ask for fewer prompts",
            "near_duplicate": "it repeats itself: raise the temperature, or ask for fewer prompts",
        }.get(worst, "it does not write usable text at this temperature: lower it, or take a healthier model")
        raise InputError(
            f"the model wrote {len(self.kept)} usable prompts of {self.n} in {self._attempts} tries, and fewer than "
            f"one in {TRIES_A_PROMPT} is too few to go on (removed: {self.counts.describe()}); {advice}, or give a "
            "file of prompts"
        )

    def _reason(self, text: str | None) -> str | None:
        if text is None:
            return "not_ended"
        if wrong_length(text):
            return "length"
        if odd_characters(text):
            return "characters"
        if template_leak(text, self.marks):
            return "template"
        if degenerate(text):
            return "repetition"
        words = words_of(text)
        if tuple(words) in self._seen:
            return "duplicate"
        if self._nearest(set(grams_of(words))) >= NEAR_DUPLICATE:
            return "near_duplicate"
        most = max(OPENING_LEAST, int(OPENING_SHARE * self.n))
        return "opening" if self._openings[tuple(words[:2])] >= most else None

    def _nearest(self, grams: set[tuple[str, ...]]) -> float:
        """The greatest Jaccard similarity |A ∩ B| / |A ∪ B| to a kept text, by an index so that n² stays cheap."""
        common = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        return max((c / (len(grams) + self._sizes[i] - c) for i, c in common.items()), default=0.0)

    def _keep(self, text: str) -> None:
        words = words_of(text)
        grams = set(grams_of(words))
        for gram in grams:
            self._holders.setdefault(gram, []).append(len(self.kept))
        self._sizes.append(len(grams))
        self._seen.add(tuple(words))
        self._openings[tuple(words[:2])] += 1
        self.kept.append(text)
