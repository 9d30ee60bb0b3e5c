"""general: every kind of check with responses that follow it and not, and prompts that can be followed."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import combinations
from random import Random
from typing import Any

import pytest

from remend.data import tasks
from remend.data.tasks import checks_shape, general
from remend.data.tasks.checks import CHECKS, compatible, describe, holds, holds_loosely, variants
from remend.data.tasks.topics import TOPICS
from remend.errors import InputError

TICKS = "```"
TASK = tasks.get("general")

# kind, arguments, responses that follow it, responses that don't
KINDS: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words_at_least", {"n": 3}, ["one two three", "don't be well-known"], ["one two", "one - two"]),
    ("words_at_most", {"n": 3}, ["one two three", "one"], ["one two three four"]),
    ("words_between", {"low": 2, "high": 3}, ["one two", "one two three"], ["one", "a b c d"]),
    ("sentences_at_least", {"n": 2}, ["One. Two!", "One\nTwo", "He said “no.” Then yes."], ["One", "Version 1.5 is."]),
    ("sentences_at_most", {"n": 2}, ["One. Two?", "One..."], ["One. Two. Three."]),
    ("short_sentences", {"n": 3}, ["One two three. Four five."], ["One two three four."]),
    ("paragraphs", {"n": 2}, ["a\n\nb", "a\nc\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("bullets", {"n": 2}, ["- a\n- b", "Two:\n* a\n • b\nend"], ["- a", "- a\n- b\n- c", "-a\n-b"]),
    ("numbered", {"n": 2}, ["1. a\n2. b", "So:\n1) a\n2) b"], ["1. a", "1. a\n3. b", "2. a\n1. b", "1. a\n2. b\n3. c"]),
    ("lines", {"n": 2}, ["a\nb", "\na\nb\n"], ["a", "a\n\nb", "a\nb\nc"]),
    ("sections", {"n": 2}, ["Section 1\na\nSection 2\nb", "## Section 1: x\na\n**Section 2**\nb"],
     ["Section 1\na", "Section 1\na\nSection 3\nb", "In Section 1 and Section 2"]),
    ("two_answers", {}, ["a\n******\nb", "a ****** b"], ["a", "a ****** a", "a ******", "a ****** b ****** c"]),
    ("json_object", {"keys": ["reason", "title"]}, ['{"title": 1, "reason": [2], "x": 0}',
     f'{TICKS}json\n{{"title": 1, "reason": 2}}\n{TICKS}'],
     ['{"title": 1}', 'Here: {"title": 1, "reason": 2}', '["title", "reason"]', '{"title": NaN, "reason": 2}', "{"]),
    ("json_list", {"n": 2}, ['["a", "b"]', f'{TICKS}\n["a", "b"]\n{TICKS}'],
     ['["a"]', '["a", 1]', '{"a": "b", "c": "d"}', "a, b", "[" * 3000]),
    ("all_capitals", {}, ["HELLO, 2 YOU!"], ["HELLo", "123"]),
    ("all_lower", {}, ["hello, 2 you!"], ["Hello", "123"]),
    ("capital_words", {"n": 2}, ["The BIG and COLD sea", "NATO-2 and UNO"], ["The BIG sea", "I and A", "2 33 44"]),
    ("starts_with", {"text": "Let me"}, ["Let me see", "\n Let me"], ["let me see", "Now. Let me see"]),
    ("title", {}, ["<<Ice>>\nIt floats.", "It floats. << a b >>"], ["<Ice>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("ends_with", {"text": "That is all."}, ["So. That is all.\n"], ["That is all. Bye", "that is all."]),
    ("postscript", {}, ["a\nP.S. b", "a\n  P. S. b"], ["a", "a P.S. b", "a\nP.S.", "a\nPS b"]),
    ("quoted", {}, ['"a b"', "“a b”\n"], ["a b", '"a" b', '""', '"']),
    ("required_words", {"words": ["sea", "ice"]}, ["Ice on the sea.", "sea-ICE"], ["Ice only", "seal of ice"]),
    ("forbidden_words", {"words": ["sea", "ice"]}, ["The seal eats rice"], ["The SEA", "dry ice"]),
    ("keyword_at_least", {"word": "sea", "n": 2}, ["Sea, sea, sea", "the sea; a SEA"], ["sea seal seas"]),
    ("keyword_exactly", {"word": "sea", "n": 2}, ["Sea, seas and sea"], ["sea", "sea sea sea"]),
    ("letter_at_least", {"letter": "o", "n": 3}, ["Oh, good", "ooo"], ["good"]),
    ("letter_at_most", {"letter": "o", "n": 2}, ["good", "hi"], ["Oh, good"]),
    ("forbidden_letter", {"letter": "z"}, ["a cat"], ["a zoo", "A ZOO"]),
    ("no_commas", {}, ["a; b"], ["a, b"]),
    ("no_digits", {}, ["two cats"], ["2 cats", "H₂O has ٣"]),
    ("no_exclamations", {}, ["Fine."], ["Fine!", "Fine?"]),
    ("placeholders", {"n": 2}, ["Dear [name], on [the day]"], ["Dear [name]", "[] []", "[a\nb] [c]"]),
    ("emphasis", {"n": 2}, ["*a* and **b c**"], ["*a* and b", "* a * b *", "2*3*4 and *a*", "- *a*\n* b\n* c"]),
]  # fmt: skip
CASES = [(k, a, text, ok) for k, a, yes, no in KINDS for ok, texts in ((True, yes), (False, no)) for text in texts]


@pytest.mark.parametrize(("kind", "arguments", "text", "ok"), CASES)
def test_checks(kind: str, arguments: dict[str, Any], text: str, ok: bool) -> None:
    assert holds(text, {"kind": kind, **arguments}) is ok


def test_every_kind_is_tried_both_ways() -> None:
    assert sorted(kind for kind, *_ in KINDS) == CHECKS.names()
    assert len(CHECKS.names()) >= 15
    assert all(yes and no for *_, yes, no in KINDS)
    assert all(not holds(" \n", {"kind": kind, **arguments}) for kind, arguments, *_ in KINDS)


@pytest.mark.parametrize(("kind", "arguments"), [case[:2] for case in KINDS])
def test_descriptions_name_their_arguments(kind: str, arguments: dict[str, Any]) -> None:
    text = describe({"kind": kind, **arguments})
    assert text[0].isupper()
    assert not set("{}") & set(text)
    for value in arguments.values():
        assert all(str(part) in text for part in (value if isinstance(value, list) else [value]))


def test_lists_are_read_as_words() -> None:
    words = {"kind": "required_words", "words": ["a", "b", "c"]}
    assert describe(words) == 'Use each of the words "a", "b" and "c".'


# Strict and loose


def test_variants_are_those_of_ifeval() -> None:
    assert variants("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "a\nb"]
    assert variants("a") == ["a", ""]


@pytest.mark.parametrize(
    ("item", "response", "strict", "loose"),
    [
        ({"kind": "starts_with", "text": "So"}, "Sure:\nSo it is.", False, True),
        ({"kind": "starts_with", "text": "So"}, "**So** it is.", False, True),
        ({"kind": "ends_with", "text": "Done."}, "It is. Done.\nBye", False, True),
        ({"kind": "json_list", "n": 1}, 'Here:\n["a"]\nBye', False, True),
        ({"kind": "all_lower"}, "Sure:\nso it is", False, True),
        ({"kind": "words_at_least", "n": 3}, "a b", False, False),
        ({"kind": "no_commas"}, "a, b\nc", False, True),
        ({"kind": "no_commas"}, "a, b", False, False),
        ({"kind": "emphasis", "n": 1}, "*a*", True, True),
    ],
)
def test_strict_and_loose(item: dict[str, Any], response: str, strict: bool, loose: bool) -> None:
    assert (holds(response, item), holds_loosely(response, item)) == (strict, loose)
    row = {"prompt": "p", "checks": [item]}
    grades = [TASK.grade(response, row, mode=mode) for mode in ("paper", "robust")]
    assert [g.correct for g in grades] == [strict, loose]
    assert ("only by the loose criterion" in grades[1].reason) == (loose and not strict)


def test_all_checks_must_be_followed_and_reasons_name_the_others() -> None:
    row = {"prompt": "p", "checks": [{"kind": "no_commas"}, {"kind": "words_at_most", "n": 2}, {"kind": "no_digits"}]}
    assert TASK.grade("a b", row) == tasks.Grade(True, "correct")
    reason = "2 of 3 not followed: Don't use any commas. Use at most 2 words."
    assert TASK.grade("a, b, c", row) == tasks.Grade(False, reason)
    assert TASK.grade("", row).reason == TASK.grade(" ", row, mode="robust").reason == "the response is empty"
    thought = "<think>a, b, 1</think>a b"
    assert [TASK.grade(thought, row, mode=mode).correct for mode in ("paper", "robust")] == [False, True]


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        (None, 'row r1: the column "checks" is missing'),
        ([], "row r1: checks must be a list with at least one check"),
        ("no_commas", "row r1: checks must be a list"),
        (["no_commas"], 'row r1: a check must be an object like {"kind": "words_at_least", "n": 80}'),
        ([{"kind": "no_comma"}], 'row r1: unknown check "no_comma"; known: all_capitals, '),
        (
            [{"kind": "words_at_least"}],
            "row r1: the check words_at_least: missing a required argument: 'n'; it takes n",
        ),
        ([{"kind": "no_commas", "n": 1}], "it takes no arguments"),
        ([{"kind": "words_at_least", "n": "80"}], "the check words_at_least can't use {'n': '80'}"),
    ],
)
def test_rows_that_can_not_be_graded(checks: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        TASK.grade("a b", {"id": "r1", "prompt": "p", "checks": checks})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "filler", ["*", "<<a", "<", "[a", "a" * 40, " ", "\n", '."', "- ", "1. ", "P.S.", "*a ", "```\n"]
)
def test_degenerate_responses_are_graded_in_time(filler: str) -> None:
    row = {"prompt": "p", "checks": [{"kind": kind, **arguments} for kind, arguments, *_ in KINDS]}
    began = time.monotonic()
    assert not TASK.grade(filler * (20000 // len(filler)), row, mode="robust").correct
    assert time.monotonic() - began < 5


# Prompts


def test_there_are_enough_distinct_prompts() -> None:
    rows = TASK.rows("held_out", TASK.graded_rows)
    assert len(rows) == 360
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert Counter(len(row["checks"]) for row in rows) == {1: 72, 2: 144, 3: 144}
    kinds = Counter(check["kind"] for row in rows for check in row["checks"])
    assert sorted(kinds) == CHECKS.names()
    assert min(kinds.values()) >= 10
    assert len({row["topic"] for row in rows}) == len(TOPICS["held_out"])
    assert max(len(row["prompt"]) for row in rows) < 400


def test_topics_are_distinct_and_their_words_fit() -> None:
    topics = [topic for split in tasks.SPLITS for topic in TOPICS[split]]
    assert len({topic.request for topic in topics}) == len(topics) == 64
    fixed = " ".join((*checks_shape.OPENINGS, *checks_shape.CLOSINGS, *checks_shape.KEYS, "section")).lower()
    for topic in topics:
        assert len(topic.words) == len(set(topic.words)) == 8, topic
        assert not set(topic.words) & set(checks_shape.words_of(fixed)), topic
        assert all(word.isalpha() and word.islower() for word in topic.words), topic


@pytest.mark.parametrize(
    ("kinds", "ok"),
    [
        (("words_at_least", "words_at_most"), False),
        (("all_capitals", "all_lower"), False),
        (("json_object", "no_commas"), False),
        (("json_list", "starts_with"), False),
        (("quoted", "postscript"), False),
        (("numbered", "no_digits"), False),
        (("no_digits", "sections"), False),
        (("forbidden_letter", "required_words"), False),
        (("all_capitals", "ends_with"), False),
        (("bullets", "emphasis"), False),
        (("paragraphs", "title"), False),
        (("sentences_at_most", "words_at_least"), False),
        (("words_at_most", "bullets", "no_commas"), True),
        (("required_words", "forbidden_words", "all_lower"), True),
        (("title", "postscript", "no_digits"), True),
    ],
)
def test_what_can_be_combined(kinds: tuple[str, ...], ok: bool) -> None:
    assert compatible(kinds) is compatible(kinds[::-1]) is ok


def witness(checks: list[dict[str, Any]]) -> str:
    """A dull response that follows all checks; it can't be written when two of them contradict each other."""
    by = {check["kind"]: check for check in checks}
    low = max((by[k][key] for k, key in (("words_at_least", "n"), ("words_between", "low")) if k in by), default=0)
    items = list(by.get("required_words", {}).get("words", []))
    if "keyword_at_least" in by:
        items += [by["keyword_at_least"]["word"]] * by["keyword_at_least"]["n"]
    if "keyword_exactly" in by:
        word, n = by["keyword_exactly"]["word"], by["keyword_exactly"]["n"]
        items += [word] * (n - items.count(word))
    items += [f"[a{'e' * i}]" for i in range(by.get("placeholders", {}).get("n", 0))]
    items += ["*one*"] * by.get("emphasis", {}).get("n", 0)
    items += ["TEN"] * by.get("capital_words", {}).get("n", 0)
    if "letter_at_least" in by:
        items.append(by["letter_at_least"]["letter"] * by["letter_at_least"]["n"])
    body = [" ".join([*items, "hotel."])]
    body += ["The hotel rests here."] * max(by.get("sentences_at_least", {}).get("n", 0), -(-low // 4))
    text = shaped(by, " ".join(body))
    join = "\n" if {"bullets", "numbered", "sections", "two_answers"} & set(by) else " "
    text = by["starts_with"]["text"] + (join if join == "\n" else ". ") + text if "starts_with" in by else text
    text = f"<<Hotel>>\n{text}" if "title" in by else text
    text = text + join + by["ends_with"]["text"] if "ends_with" in by else text
    text = f"{text}\nP.S. The hotel." if "postscript" in by else text
    text = f'"{text}"' if "quoted" in by else text
    return text.upper() if "all_capitals" in by else text.lower() if "all_lower" in by else text


def shaped(by: dict[str, dict[str, Any]], body: str) -> str:
    """The body in the form that is asked for."""
    form = next((kind for kind in by if CHECKS.get(kind).group == "form"), None)
    n = by[form].get("n", 0) if form else 0
    if form == "json_object":
        return json.dumps(dict.fromkeys(by[form]["keys"], "hotel") | {"text": body})
    if form == "json_list":
        return json.dumps([body] + ["hotel"] * (n - 1))
    if form == "two_answers":
        return f"{body}\n******\nThe hotel."
    parts = [body] + ["The hotel rests."] * (n - 1)
    marks = {"bullets": "- {1}", "numbered": "{0}. {1}", "sections": "Section {0}\n{1}"}
    written = [marks.get(form or "", "{1}").format(i, part) for i, part in enumerate(parts, start=1)]
    return ("\n\n" if form == "paragraphs" else "\n").join(written)


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_can_be_followed(split: str, seed: int) -> None:
    for row in TASK.rows(split, TASK.graded_rows, seed):
        assert compatible(check["kind"] for check in row["checks"])
        assert TASK.grade(witness(row["checks"]), row) == tasks.Grade(True, "correct"), row
        assert all(describe(check) in row["prompt"] for check in row["checks"])


def test_every_compatible_pair_can_be_followed() -> None:
    rng = Random(0)
    pairs = [pair for pair in combinations(CHECKS.names(), 2) if compatible(pair)]
    assert len(pairs) > 300
    for pair in pairs:
        for topic in rng.sample(TOPICS["held_out"], 3):
            row = {"prompt": "p", "checks": [general.draw_check(kind, rng, topic) for kind in pair]}
            assert TASK.grade(witness(row["checks"]), row) == tasks.Grade(True, "correct"), row


def test_checks_are_not_followed_by_chance() -> None:
    """A response to another prompt follows few: the checks do ask for something."""
    rows = TASK.rows("held_out", TASK.graded_rows)
    right = sum(TASK.grade("The hotel rests here. It is grey, I think.", row).correct for row in rows)
    assert right < len(rows) / 8
