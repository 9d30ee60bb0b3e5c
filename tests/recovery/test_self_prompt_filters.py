"""The filters on what a model wrote, as pure functions; near-duplicates against a slow comparison of all pairs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from remend.errors import InputError
from remend.recovery.self_prompt_filters import (
    FIRST_TRIES,
    NEAR_DUPLICATE,
    REASONS,
    TRIES_A_PROMPT,
    Counts,
    Sieve,
    degenerate,
    grams_of,
    odd_characters,
    template_leak,
    words_of,
    wrong_length,
)

GOOD = [
    "Can you provide a list of the five biggest challenges entrepreneurs face in today's world?",
    "What is 12 * (3 + 4), and how do I work it out in my head?",
    "Create a python function:\n```python\ndef largest(values):\n    return max(values)\n```\nWhy is it slow?",
    "I'm planning a 3-day trip… where should I begin?",
    "如何在三个月内学会弹吉他？",
    "नमस्ते, क्या आप मुझे चाय बनाना सिखा सकते हैं?",
    "Could you explain the word naïve — and the sign €5 — to a child? 🙂",
    "Human rights: what are they, and which user groups need an assistant?",
]


FILTERS: dict[str, Callable[[str], bool]] = {
    "length": wrong_length,
    "characters": odd_characters,
    "template": lambda text: template_leak(text, ("<repo_name>",)),
    "repetition": degenerate,
}


@pytest.mark.parametrize("text", GOOD)
def test_usable_prompts_pass_every_filter(text: str) -> None:
    assert not any(refuses(text) for refuses in FILTERS.values())
    assert Sieve(1, ("<|im_start|>", "<|im_end|>")).offer(text) is None


@pytest.mark.parametrize(
    ("reason", "texts"),
    [
        ("length", ["", "Hi", "Why though?", "a b c", "word " * 121, "a long word " + "x" * 800]),
        (
            "characters",
            [
                "What does the file say: caf\N{REPLACEMENT CHARACTER}?",
                "Ring the bell\a for me please",
                "A private\ue000 sign in the text",
                "12 31 44 2 19 88 3 and 4 61 90 17",
                "Draw this: +---+ | | +---+ /\\/\\/\\ ==== ****",
                "Which of these is best: ★★★☆☆ or ★★★★★?",
            ],
        ),
        (
            "template",
            [
                "What is rain?<|im_end|>\n<|im_start|>assistant\nWater.",
                "How do I forecast the weather?\nAssistant\nTo predict it, look up.",
                "Tell me a joke.\n\nUser: another one",
                "**Human:** Tell me a joke",
                "[INST] Tell me a joke [/INST]",
                "Tell me a joke<end_of_turn>",
                "Tell me a joke <｜Assistant｜> no",
                "### Response:\nHere is a joke",
                "Tell me <repo_name> a joke",
            ],
        ),
        (
            "repetition",
            [
                "Please fill this in: ___________",
                "Tell me about the the the the cat",
                "make a plan for me and make a plan for me and make a plan for me",
                "我们去吧我们去吧我们去吧我们去吧",
            ],
        ),
    ],
)
def test_what_each_filter_refuses(reason: str, texts: list[str]) -> None:
    assert [text for text in texts if not FILTERS[reason](text)] == []


def test_special_tokens_are_the_tokenizers() -> None:
    assert not template_leak("Tell me <repo_name> a joke")


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of('"Can you, CAN\'T you" — say:\nself-made?') == ["can", "you", "can't", "you", "say", "self-made"]
    assert words_of("学习 AI吧") == ["学", "习", "ai", "吧"]
    assert grams_of(["a", "b", "c", "d"]) == [("a", "b", "c"), ("b", "c", "d")]
    assert grams_of(["a", "b"]) == [("a", "b")]


def test_each_text_counts_for_the_first_reason_and_counts_add_up() -> None:
    sieve = Sieve(10, ("<repo_name>",))
    first = "Please tell me how bread is baked in a small oven at home."
    offered = {
        None: "not_ended",
        "Hi": "length",
        "12 31 44 2 19 88 3 and 4 61 90 17": "characters",
        "Tell me <repo_name> a joke": "template",
        "Tell me about the the the the cat": "repetition",
        first: None,
        first.upper().replace(".", "!!"): "duplicate",
        first.replace("home", "work"): "near_duplicate",
        "Please tell me a story": None,
        "Please tell someone else my address": None,
        "Please tell me everything about whales": "opening",
        "Please, explain whales to me": None,
    }
    assert [sieve.offer(text) for text in offered] == list(offered.values())
    assert sieve.counts == Counts(12, 4, dict.fromkeys(REASONS, 1))
    assert sieve.counts.attempts == sieve.counts.kept + sum(sieve.counts.removed.values())
    assert sieve.kept == [text for text, reason in offered.items() if reason is None]
    assert "near-duplicates 1" in sieve.counts.describe()
    assert Sieve(1).counts.describe() == "nothing"


@pytest.mark.parametrize(("n", "most"), [(1, 3), (60, 3), (80, 4), (512, 25)])
def test_openings_are_balanced(n: int, most: int) -> None:
    """Of 200 texts with one opening, 5% of n are kept and at least 3; another opening is not touched by them."""
    sieve, generator = Sieve(n), random.Random(0)
    texts = [f"Can you {' '.join(generator.choices('abcdefghijklmnop', k=8))} please explain" for _ in range(200)]
    reasons = [sieve.offer(text) for text in texts]
    assert reasons.count(None) == most
    assert set(reasons) <= {None, "opening"}
    assert sieve.offer("How might I travel there?") is None


def test_near_duplicates_equal_a_comparison_of_all_pairs() -> None:
    generator, kept, sieve = random.Random(1), [], Sieve(10_000)
    for _ in range(400):
        text = " ".join(generator.choices(["ash", "bell", "cat"], k=generator.randint(3, 7)))
        words = text.split()
        grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        if degenerate(text):
            continue
        nearest = max((len(grams & other) / len(grams | other) for _, other in kept), default=0.0)
        reason = "duplicate" if any(text == t for t, _ in kept) else None
        reason = reason or ("near_duplicate" if nearest >= NEAR_DUPLICATE else None)
        assert sieve.offer(text) == reason
        if reason is None:
            kept.append((text, grams))
    assert sieve.counts.removed["near_duplicate"] > 10
    assert len(kept) > 50


@pytest.mark.parametrize(
    ("text", "advice"),
    [(None, "raise max_new_tokens"), ("Can you help me?", "it repeats itself"), ("?", "does not write usable text")],
)
def test_too_low_a_yield_is_given_up(text: str | None, advice: str) -> None:
    sieve = Sieve(50)
    for _ in range(FIRST_TRIES - 1):
        sieve.offer(text)
        sieve.require_yield()
    sieve.offer(text)
    with pytest.raises(InputError, match=f"usable prompts of 50 in {FIRST_TRIES} tries.*removed: .*{advice}"):
        sieve.require_yield()


def test_a_kept_prompt_pays_for_as_many_tries() -> None:
    sieve = Sieve(50)
    texts = ["Why is the sky blue?", *(f"Tell {name} about rain" for name in "abcdefgh")]
    for text in texts:
        sieve.offer(text)
    for _ in range(len(texts) * TRIES_A_PROMPT - len(texts)):
        sieve.offer(None)
        sieve.require_yield()
    sieve.offer(None)
    with pytest.raises(InputError, match=f"{len(texts)} usable prompts of 50 in {len(texts) * TRIES_A_PROMPT + 1}"):
        sieve.require_yield()
