"""Checks of a response's shape: its length, form, case, opening and closing. See checks.py for how they are written."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from remend.data.tasks.checks import OWN, check, one_of

OPENINGS = ("Here is what I know", "Let me explain this", "Thanks for the question", "This is my view")
CLOSINGS = ("That is all for now.", "I hope this helps you.", "Ask me if you want more.", "Those are my thoughts.")
KEYS = ("title", "summary", "reason", "example", "advice")
BREAK = "******"

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
_NUMBER = re.compile(r"^[ \t]*(\d{1,3})[.)][ \t]+\S", re.MULTILINE)
_SECTION = re.compile(r"^[ \t#*]*Section (\d{1,3})\b", re.MULTILINE)
_TITLE = re.compile(r"<<([^<>\n]{1,200})>>")
_POSTSCRIPT = re.compile(r"^[ \t]*P\. ?S\.[ \t]*\S", re.MULTILINE)

# A JSON value leaves no room for words around it, and its brackets and commas are part of it.
AROUND_JSON = ("opening", "closing", "quotes", "sentences", "case", "commas", "placeholders", "emphasis", "letters")


def words_of(text: str) -> list[str]:
    """Words: letters and digits, joined inside by apostrophes and hyphens ("don't", "well-known")."""
    return _WORD.findall(text)


def sentences_of(text: str) -> list[str]:
    """Sentences: what ends with . ! or ? before a blank, and lines; "e.g. this" counts as two."""
    return [part for part in _SENTENCE_END.split(text) if _WORD.search(part)]


def paragraphs_of(text: str) -> list[str]:
    """Paragraphs: what empty lines separate."""
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return ["\n".join(part) for part in parts if part]


# Length


@check("words_at_least", "Use at least {n} words.", group="words",
       draw=one_of(n=(60, 80, 100, 120, 150)))  # fmt: skip
def words_at_least(response: str, n: int) -> bool:
    return len(words_of(response)) >= n


@check("words_at_most", "Use at most {n} words.", group="words",
       draw=one_of(n=(60, 75, 90, 120)))  # fmt: skip
def words_at_most(response: str, n: int) -> bool:
    return len(words_of(response)) <= n


@check("words_between", "Use between {low} and {high} words.", group="words", source=OWN,
       draw=one_of(low=(60, 80, 100), high=(140, 160, 180)))  # fmt: skip
def words_between(response: str, low: int, high: int) -> bool:
    return low <= len(words_of(response)) <= high


@check("sentences_at_least", "Write at least {n} sentences.", group="sentences", clashes=("form",),
       draw=one_of(n=range(4, 9)))  # fmt: skip
def sentences_at_least(response: str, n: int) -> bool:
    return len(sentences_of(response)) >= n


@check("sentences_at_most", "Write at most {n} sentences.", group="sentences",
       draw=one_of(n=range(3, 7)), clashes=("form", "words_at_least", "words_between"))  # fmt: skip
def sentences_at_most(response: str, n: int) -> bool:
    return len(sentences_of(response)) <= n


@check("short_sentences", "No sentence may have more than {n} words.", group="sentences", clashes=("form",), source=OWN,
       draw=one_of(n=range(12, 21)))  # fmt: skip
def short_sentences(response: str, n: int) -> bool:
    return all(len(words_of(sentence)) <= n for sentence in sentences_of(response))


# Form


@check("paragraphs", "Write exactly {n} paragraphs, with an empty line between them.", group="form",
       clashes=("title", "postscript"), draw=one_of(n=range(2, 6)))  # fmt: skip
def paragraphs(response: str, n: int) -> bool:
    return len(paragraphs_of(response)) == n


@check("bullets", 'Give exactly {n} bullet points, each on a line that starts with "- ".', group="form",
       clashes=("emphasis",), draw=one_of(n=range(3, 8)))  # fmt: skip
def bullets(response: str, n: int) -> bool:
    """Exactly n lines that start with a bullet (-, * or •) and a blank."""
    return len(_BULLET.findall(response)) == n


@check("numbered", "Give a numbered list of exactly {n} items, from 1. to {n}., each on its own line.", group="form",
       clashes=("digits",), draw=one_of(n=range(3, 8)), source=OWN)  # fmt: skip
def numbered(response: str, n: int) -> bool:
    """Lines numbered from 1 to n, in this order, and no other numbered line."""
    return [int(number) for number in _NUMBER.findall(response)] == list(range(1, n + 1))


@check("lines", "Write exactly {n} lines and leave none of them empty.", group="form", source=OWN,
       clashes=("title", "postscript"), draw=one_of(n=range(4, 9)))  # fmt: skip
def lines(response: str, n: int) -> bool:
    written = response.strip().split("\n")
    return len(written) == n and all(line.strip() for line in written)


@check("sections", "Split your answer into {n} sections, each under a line that reads Section 1, Section 2 and so on.",
       group="form", clashes=("digits", "all_capitals", "all_lower"),
       draw=one_of(n=range(2, 5)))  # fmt: skip
def sections(response: str, n: int) -> bool:
    """Lines that start with Section 1 to Section n, in this order, and no other such line."""
    return [int(number) for number in _SECTION.findall(response)] == list(range(1, n + 1))


@check("two_answers", f"Give two different answers, with {BREAK} between them and nowhere else.", group="form",
       clashes=("emphasis",))  # fmt: skip
def two_answers(response: str) -> bool:
    """Two different texts with six asterisks between them."""
    parts = [part.strip() for part in response.split(BREAK)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


@check("json_object", "Answer with one JSON object that has the keys {keys}, and with nothing else.", group="form",
       clashes=AROUND_JSON, draw=lambda rng, words: {"keys": rng.sample(KEYS, rng.randint(2, 3))})  # fmt: skip
def json_object(response: str, keys: list[str]) -> bool:
    """Nothing but a JSON object (a code fence around it is allowed) with at least these keys."""
    value = _json(response)
    return isinstance(value, dict) and set(keys) <= set(value)


@check("json_list", "Answer with one JSON list of exactly {n} strings, and with nothing else.", group="form",
       clashes=AROUND_JSON, draw=one_of(n=range(3, 8)), source=OWN)  # fmt: skip
def json_list(response: str, n: int) -> bool:
    """Nothing but a JSON list (a code fence around it is allowed) of n strings."""
    value = _json(response)
    return isinstance(value, list) and len(value) == n and all(isinstance(item, str) for item in value)


def _json(response: str) -> object:
    """The response as JSON, or None."""
    text = response.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[:-3].partition("\n")[2]

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)  # Python reads NaN and Infinity, which are no JSON

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


# Case


@check("all_capitals", "Write in capital letters only.", group="case",
       clashes=("starts_with", "ends_with", "postscript"))  # fmt: skip
def all_capitals(response: str) -> bool:
    return any(c.isalpha() for c in response) and not any(c.islower() for c in response)


@check("all_lower", "Write in small letters only, without any capital.", group="case",
       clashes=("starts_with", "ends_with", "postscript"))  # fmt: skip
def all_lower(response: str) -> bool:
    return any(c.isalpha() for c in response) and not any(c.isupper() for c in response)


@check("capital_words", "Write at least {n} words in capital letters only.", group="case",
       draw=one_of(n=range(2, 6)))  # fmt: skip
def capital_words(response: str, n: int) -> bool:
    """At least n words of two letters or more in capitals."""
    return sum(word.isupper() and sum(map(str.isalpha, word)) > 1 for word in words_of(response)) >= n


# Opening and closing


@check("starts_with", 'Begin with exactly these words: "{text}".', group="opening",
       draw=one_of(text=OPENINGS), source=OWN)  # fmt: skip
def starts_with(response: str, text: str) -> bool:
    """The text stands at the start, in the same case."""
    return response.lstrip().startswith(text)


@check("title", "Give your answer a title in double angular brackets, like <<this>>.", group="opening")
def title(response: str) -> bool:
    return any(text.strip() for text in _TITLE.findall(response))


@check("ends_with", 'End with exactly these words, and write nothing after them: "{text}"', group="closing",
       draw=one_of(text=CLOSINGS))  # fmt: skip
def ends_with(response: str, text: str) -> bool:
    """The text stands at the end, in the same case."""
    return response.rstrip().endswith(text)


@check("postscript", "Add a postscript at the end, on a line that starts with P.S.", group="closing")
def postscript(response: str) -> bool:
    return _POSTSCRIPT.search(response) is not None


@check("quoted", 'Put your whole answer in double quotation marks ("…").', group="quotes",
       clashes=("opening", "closing", "form"))  # fmt: skip
def quoted(response: str) -> bool:
    """The first and the last character is a double quotation mark, with some text between."""
    text = response.strip()
    return len(text) > 2 and (text[0], text[-1]) in {('"', '"'), ("“", "”")}
