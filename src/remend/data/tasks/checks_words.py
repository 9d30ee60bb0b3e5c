"""Checks of a response's words, letters and marks. See checks.py for how they are written."""

from __future__ import annotations

import re

from remend.data.tasks.checks import OWN, check, one_of

WANTED = 4
"""A topic's first words may be asked for, the others forbidden: the two never meet in one prompt."""

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]{1,80}\]")
_EMPHASIS = re.compile(r"(?<![*\w])(\*{1,2})[^\s*](?:[^*\n]{0,200}[^\s*])?\1(?![*\w])")


def count_word(response: str, word: str) -> int:
    """How often a word stands in a text, whole and in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE))


def count_letter(response: str, letter: str) -> int:
    """How often a letter stands in a text, in any case."""
    return response.lower().count(letter.lower())


# Words


@check("required_words", "Use each of the words {words}.", group="required",
       draw=lambda rng, words: {"words": rng.sample(words[:WANTED], rng.randint(2, 3))})  # fmt: skip
def required_words(response: str, words: list[str]) -> bool:
    return all(count_word(response, word) for word in words)


@check("forbidden_words", "Don't use any of the words {words}.", group="forbidden",
       draw=lambda rng, words: {"words": rng.sample(words[WANTED:], rng.randint(2, 3))})  # fmt: skip
def forbidden_words(response: str, words: list[str]) -> bool:
    return not any(count_word(response, word) for word in words)


@check("keyword_at_least", 'Use the word "{word}" at least {n} times.', group="keyword",
       draw=lambda rng, words: {"word": rng.choice(words[:WANTED]), "n": rng.randint(2, 4)})  # fmt: skip
def keyword_at_least(response: str, word: str, n: int) -> bool:
    return count_word(response, word) >= n


@check("keyword_exactly", 'Use the word "{word}" exactly {n} times.', group="keyword", source=OWN,
       draw=lambda rng, words: {"word": rng.choice(words[:WANTED]), "n": rng.randint(2, 3)})  # fmt: skip
def keyword_exactly(response: str, word: str, n: int) -> bool:
    return count_word(response, word) == n


# Letters


@check("letter_at_least", 'Let the letter "{letter}" appear at least {n} times.', group="letters",
       draw=one_of(letter="aehinorst", n=(10, 15, 20)))  # fmt: skip
def letter_at_least(response: str, letter: str, n: int) -> bool:
    return count_letter(response, letter) >= n


@check("letter_at_most", 'Let the letter "{letter}" appear at most {n} times.', group="letters",
       clashes=("required", "keyword", "opening", "closing"),
       draw=one_of(letter="bfgkpvwy", n=range(2, 6)))  # fmt: skip
def letter_at_most(response: str, letter: str, n: int) -> bool:
    return count_letter(response, letter) <= n


@check("forbidden_letter", 'Don\'t use the letter "{letter}" anywhere.', group="letters", source=OWN,
       clashes=("required", "keyword", "opening", "closing"),
       draw=one_of(letter="bfkpvwxz"))  # fmt: skip
def forbidden_letter(response: str, letter: str) -> bool:
    return count_letter(response, letter) == 0


# Marks


@check("no_commas", "Don't use any commas.", group="commas")
def no_commas(response: str) -> bool:
    return "," not in response


@check("no_digits", "Don't use any digits; spell numbers out.", group="digits", source=OWN)
def no_digits(response: str) -> bool:
    return not any(c.isdigit() for c in response)


@check("no_exclamations", "Don't use exclamation marks or question marks.", group="exclamations", source=OWN)
def no_exclamations(response: str) -> bool:
    return not set("!?") & set(response)


@check("placeholders", "Leave at least {n} placeholders in square brackets, such as [name], for the reader to fill in.",
       group="placeholders", draw=one_of(n=range(2, 5)))  # fmt: skip
def placeholders(response: str, n: int) -> bool:
    return len(_PLACEHOLDER.findall(response)) >= n


@check("emphasis", "Emphasise at least {n} parts of your answer with asterisks, like *this*.", group="emphasis",
       draw=one_of(n=range(2, 5)))  # fmt: skip
def emphasis(response: str, n: int) -> bool:
    """At least n parts between single or double asterisks, each on one line."""
    return len(_EMPHASIS.findall(response)) >= n
