"""Graders by hand-made cases: the response, whether the paper's grader takes it, whether what was meant is right.

A task and its short kin grade alike, and are tried with the same cases.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from remend.data import tasks
from remend.data.tasks.calls import parse_calls
from remend.data.tasks.choice import read_letter
from remend.data.tasks.science import stated_letters
from remend.errors import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = ("tooluse/dev", "tooluse/train", "science/dev", "science/train")
TICKS = "```"


def call(action: str, **inputs: Any) -> dict[str, str]:
    return {"Action": action, "Action_Input": json.dumps(inputs)}


def said(*calls: dict[str, str]) -> str:
    return "\n".join(f"Action: {c['Action']}\nAction Input: {c['Action_Input']}" for c in calls)


# Tool use: the case, the golden calls, the response, right as the paper grades, right by what was meant

ONE = [call("getAnime", animeId=98765)]
TENT = [call("getTent", id=7, day="Friday")]
TENTS = [call("getTent", id=7), call("countTents", city="Oslo")]
TYPED = [call("setAlert", price=1, name="gold", on=True)]
NESTED = [call("updateUser", id="u1", profile={"picture": {"url": "x.jpg"}, "tags": ["a", "b"]})]
LISTED = [call("report", ip="1.2.3.4", categories=["Spam", "Phishing"])]
TWO = [call("getRates", base="USD"), call("setAlert", symbol="EUR", target=1.1)]
SAME = [call("search", color="wild", size="small"), call("search", color="wild", size="large")]
EMPTY = [call("listAll")]
MARKED = [call("getUser", id="u1"), {"Action": "[Optional]setUser", "Action_Input": '{"id": "u1", "age": 3}'}]
BROKEN = [{"Action": "latest_get", "Action_Input": '{"base": "USD", "symbols": "symbols": ["EUR"]}'}, call("b", x=1)]

CALLS: list[tuple[str, list[dict[str, str]], str, bool, bool]] = [
    ("as asked", ONE, 'Thought: go\nAction: getAnime\nAction Input: {"animeId": 98765}', True, True),
    ("an observation made up", ONE, said(*ONE) + "\nObservation: {}\nFinal Answer: done", True, True),
    ("a call made up after it", ONE, said(*ONE) + "\nObservation: x\n" + said(*ONE), False, False),
    ("another value", ONE, 'Action: getAnime\nAction Input: {"animeId": 1}', False, False),
    ("another action", ONE, 'Action: searchAnime\nAction Input: {"animeId": 98765}', False, False),
    ("text for a number", ONE, 'Action: getAnime\nAction Input: {"animeId": "98765"}', False, False),
    ("1.0 for 1", TYPED, 'Action: setAlert\nAction Input: {"price": 1.0, "name": "gold", "on": true}', True, True),
    ("true for 1", TYPED, 'Action: setAlert\nAction Input: {"price": true, "name": "gold", "on": true}', True, False),
    ('"1" for 1', TYPED, 'Action: setAlert\nAction Input: {"price": "1", "name": "gold", "on": true}', False, False),
    ("case of a value", TYPED, 'Action: setAlert\nAction Input: {"price": 1, "name": "Gold", "on": true}',
     False, False),
    ("nested", NESTED, said(*NESTED), False, True),
    ("nested, over lines", NESTED, "Action: updateUser\nAction Input: "
     + json.dumps(json.loads(NESTED[0]["Action_Input"]), indent=2), False, True),
    ("nested, wrong deep inside", NESTED, said(*NESTED).replace("x.jpg", "y.jpg"), False, False),
    ("nested, one brace too few", NESTED, said(*NESTED)[:-1], False, False),
    ("a list", LISTED, said(*LISTED), True, True),
    ("a list in another order", LISTED, 'Action: report\nAction Input: {"ip": "1.2.3.4", "categories": '
     '["Phishing", "Spam"]}', False, False),
    ("a brace in a text", [call("say", text="a } b")], 'Action: say\nAction Input: {"text": "a } b"}', False, True),
    ("a fence", ONE, f'Action: getAnime\nAction Input: {TICKS}json\n{{"animeId": 98765}}\n{TICKS}', False, True),
    ("a fence around all", ONE, f"{TICKS}\n{said(*ONE)}\n{TICKS}", True, True),
    ("bold labels", ONE, '**Action:** getAnime\n**Action Input:** {"animeId": 98765}', False, True),
    ("small labels", ONE, 'action: getAnime\naction input: {"animeId": 98765}', False, True),
    ("single quotes", ONE, "Action: getAnime\nAction Input: {'animeId': 98765}", False, False),
    ("a comma too many", ONE, 'Action: getAnime\nAction Input: {"animeId": 98765,}', False, False),
    ("no input", ONE, "Action: getAnime", False, False),
    ("only a thought", ONE, "Thought: I should look up the anime.", False, False),
    ("empty", ONE, "", False, False),
    ("two", TWO, said(*TWO), True, True),
    ("two, the other way round", TWO, said(*TWO[::-1]), True, True),
    ("two, inputs swapped", TWO, said(call("getRates", symbol="EUR", target=1.1), call("setAlert", base="USD")),
     True, False),
    ("one of two", TWO, said(TWO[0]), False, False),
    ("three for two", TWO, said(*TWO, call("getRates", base="USD")), False, False),
    ("one action twice", SAME, said(*SAME), True, True),
    ("one action twice, the other way round", SAME, said(*SAME[::-1]), False, True),
    ("one action twice, the first wrong", SAME, said(call("search", color="no", size="no"), SAME[1]), True, False),
    ("one action once", SAME, said(SAME[1]), False, False),
    ("nothing to give", EMPTY, "Action: listAll\nAction Input: {}", True, True),
    ("nothing to give, left out", EMPTY, "Action: listAll", True, True),
    ("nothing to give, given", EMPTY, 'Action: listAll\nAction Input: {"n": 3}', False, False),
    ("thinking first", ONE, f"<think>Action: no</think>\n{said(*ONE)}", False, True),
    ("a dash in the name", [call("routes-get", a=1)], said(call("routes-get", a=1)), False, True),
    ("optional, left out", MARKED, said(MARKED[0]), False, True),
    ("optional, made", MARKED, said(MARKED[0], call("setUser", id="u1", age=3)), False, True),
    ("optional, with its mark", MARKED, said(*MARKED), False, True),
    ("optional, wrong", MARKED, said(MARKED[0], call("setUser", id="u1", age=4)), False, False),
    ("optional, twice", MARKED, said(MARKED[0], *[call("setUser", id="u1", age=3)] * 2), False, False),
    ("only the optional", MARKED, said(call("setUser", id="u1", age=3)), False, False),
    ("a golden input that is no JSON", BROKEN, said(*BROKEN), True, True),
    ("mended", BROKEN, said(call("latest_get", base="USD", symbols=["EUR"]), BROKEN[1]), False, False),
    ("no JSON, but not that one", BROKEN, said(*BROKEN).replace("EUR", "GBP"), True, False),
    ("that one, and more", BROKEN, said(*BROKEN).replace('["EUR"]}', '["EUR"]} or'), True, False),
    ("keys in another order", TENT, 'Action: getTent\nAction Input: {"day": "Friday", "id": 7}', True, True),
    ("a parameter missing", TENT, 'Action: getTent\nAction Input: {"id": 7}', False, False),
    ("a parameter too many", TENT, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday", "x": ""}', False, False),
    ("case of the name", TENT, 'Action: gettent\nAction Input: {"id": 7, "day": "Friday"}', False, False),
    ("bold inside the colon", TENT, '**Action**: getTent\n**Action Input**: {"id": 7, "day": "Friday"}', False, True),
    ("name in backticks", TENT, 'Action: `getTent`\nAction Input: `{"id": 7, "day": "Friday"}`', False, True),
    ("name with brackets", TENT, 'Action: getTent()\nAction Input: {"id": 7, "day": "Friday"}', True, True),
    ("JSON over several lines", TENT, 'Action: getTent\nAction Input:\n{\n "id": 7,\n "day": "Friday"\n}', True, True),
    ("all on one line", TENT, 'Thought: go. Action: getTent Action Input: {"id": 7, "day": "Friday"}', True, True),
    ("an action in the prose", TENT, 'The right Action: this one.\nAction: getTent\nAction Input: {"id": 7, '
     '"day": "Friday"}', False, True),
    ("an open brace", TENT, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"', False, False),
    ("no label", TENT, 'getTent {"id": 7, "day": "Friday"}', False, False),
    ("the call twice", TENT, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"}\n' * 2, False, False),
    ("after thinking", TENT, 'Action: no\n</think>\nAction: getTent\nAction Input: {"id": 7, "day": "Friday"}',
     False, True),
    ("empty input left out", EMPTY, "Action: listAll\nAction Input:", True, True),
    ("words for no input", EMPTY, "Action: listAll\nAction Input: nothing", True, False),
    ("a label in a text", [call("say", t="Action: x")], 'Action: say\nAction Input: {"t": "Action: x"}', False, True),
    ("names first, inputs after", TENTS, 'Action: getTent\nAction: countTents\nAction Input: {"id": 7}\n'
     'Action Input: {"city": "Oslo"}', True, False),
    ("one input for two", TENTS, 'Action: getTent\nAction: countTents\nAction Input: {"id": 7, "city": "Oslo"}',
     True, False),
]  # fmt: skip


@pytest.mark.parametrize(("golden", "response", "paper", "robust"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_tool_calls(golden: list[dict[str, str]], response: str, paper: bool, robust: bool) -> None:
    row = {"id": "r1", "prompt": "p", "golden_answer": golden}
    # the golden answers that the short task makes are whole and hold no marks
    for name in ("tooluse",) if golden in (MARKED, BROKEN) else ("tooluse", "tooluse-short"):
        grades = [tasks.get(name).grade(response, row, mode=mode) for mode in tasks.MODES]
        assert [grade.correct for grade in grades] == [paper, robust], grades
        for grade in grades:
            assert grade.correct == grade.reason.startswith("correct")
            assert grade.reason
            assert "\n" not in grade.reason
    assert row["golden_answer"] == golden


@pytest.mark.parametrize(
    ("golden", "response", "mode", "reason"),
    [
        (ONE, "", "paper", "the response is empty"),
        (ONE, "\n", "robust", "the response is empty"),
        (ONE, "hello", "paper", 'actions are [], wanted ["getAnime"]'),
        (TENT, "Action: getTent", "paper", 'merged inputs are {}, wanted {"id": 7, "day": "Friday"}'),
        (NESTED, said(*NESTED), "paper", "merged inputs are {}, wanted {"),
        (TENT, "Action: getTent", "robust",
         'calls are ["getTent", {}], wanted ["getTent", {"day": "Friday", "id": 7}]'),
        (ONE, "Action: getAnime\nAction Input: {'a': 1}", "robust",
         "the Action Input of getAnime is not valid JSON: Expecting property name enclosed in double quotes"),
        (ONE, "Action: getAnime\nAction Input: the anime", "robust", "is no JSON object: the anime"),
        (TWO, said(*TWO[::-1]), "robust", "correct; the calls came in another order, which does not count"),
        (SAME, said(SAME[0], SAME[0]), "robust", 'wanted ["search", {"color": "wild", "size": "large"}]'),
        (BROKEN, said(call("latest_get"), BROKEN[1]), "robust", '{"no JSON": '),
    ],
)  # fmt: skip
def test_reasons_of_tool_grades(golden: list[dict[str, str]], response: str, mode: str, reason: str) -> None:
    assert reason in tasks.get("tooluse").grade(response, {"prompt": "p", "golden_answer": golden}, mode=mode).reason


def test_parsed_calls_keep_their_order() -> None:
    text = 'Action: b\nAction Input: {"x": {"y": 1}}\nObservation: ok\nAction: a\nAction Input:\nObservation: ok'
    assert parse_calls(text) == ([("b", {"x": {"y": 1}}), ("a", {})], [])


# Science: the response to a question whose answer is B

LETTERS: list[tuple[str, str, bool, bool]] = [
    ("as asked", "<reasoning>\nx\n</reasoning>\n<answer>\nB\n</answer>", True, True),
    ("wrong", "<answer>\nC\n</answer>", False, False),
    ("the last tag counts", "<answer>A</answer>, or rather <answer>B</answer>", True, True),
    ("the last tag is wrong", "<answer>B</answer>, or rather <answer>A</answer>", False, False),
    ("not closed", "so it is <answer>B", True, True),
    ("text after the tag", "<answer>B</answer> since the ring is strained", True, True),
    ("a tag inside the reasoning", "<reasoning>the <answer> is near</reasoning><answer>B</answer>", True, True),
    ("without a tag, alone", "B\n", True, True),
    ("without a tag, in text", "It is B", False, False),
    ("small", "<answer>b</answer>", False, True),
    ("in brackets", "<answer>(B)</answer>", False, True),
    ("with its text", "<answer>B: 161.240</answer>", False, True),
    ("bold", "<answer>**B**</answer>", False, True),
    ("a tag in capitals", "<ANSWER>B</ANSWER>", False, True),
    ("Answer: B", "The mass is 161.24.\nAnswer: B", False, True),
    ("answer: (b)", "answer: (b)", False, True),
    ("the answer is B", "So the correct answer is B.", False, True),
    ("boxed", "Hence \\boxed{B}.", False, True),
    ("boxed text, small", "Hence $\\boxed{\\text{b}}$", False, True),
    ("the same twice", "Answer: B\n\nThe answer is B.", False, True),
    ("two in the tag", "<answer>A or B</answer>", False, False),
    ("all in the tag", "<answer>A: 1\nB: 2</answer>", False, False),
    ("two after Answer:", "Answer: B or C", False, False),
    ("two statements", "Answer: A\nNo. Answer: B", False, False),
    ("stated and boxed", "The answer is C, so \\boxed{B}", False, False),
    ("two statements, then a tag", "Answer: A\nThe answer is C. <answer>B</answer>", True, True),
    ("another option discussed", "The answer is B. Option A is too heavy.", False, True),
    ("an article", "The answer is a ketone. Answer: B", False, True),
    ("the text of the option", "<answer>161.240</answer>", False, False),
    ("a letter outside", "<answer>E</answer>", False, False),
    ("an empty tag", "<answer></answer>", False, False),
    # The authors' code takes what follows the last "<answer>", here all of it, and of that what stands before the first
    # "</answer>": the letter. A tag that was never opened is no reason to be stricter in robust mode.
    ("closed and never opened", "B</answer>", True, True),
    ("closed after prose", "The answer is B</answer>", False, True),
    ("wrong before a closed tag", "C</answer>", False, False),
    ("empty", "", False, False),
    ("after thinking", "<think>Answer: A</think>Answer: B", False, True),
    ("in one line", "<answer>B</answer>", True, True),
    ("a full stop", "<answer> B. </answer>", False, True),
    ("with its text, a bracket", "<answer>\n(b) Iron\n</answer>", False, True),
    ("Answer: in the tag", "<answer>Answer: B</answer>", False, True),
    ("option in the tag", "<answer>Option B</answer>", False, True),
    ("a tag with blanks", "< answer >B< /answer >", False, True),
    ("the answer is, in bold", "**Answer:** B", False, True),
    ("the correct option is", "So the correct option is b.", False, True),
    ("only an article", "The answer is a gas, B for short", False, False),
    ("two in prose", "The answer is B or C.", False, False),
    ("after thinking, in the tag", "<answer>A</answer></think>\n<answer>B</answer>", True, True),
    ("only in the thinking", "<answer>A</answer></think>\nB", False, True),
]
LAST_COUNTS = ("two statements", "stated and boxed")
"""Where science takes two different letters for no answer, and its short kin takes the last."""


@pytest.mark.parametrize(("label", "response", "paper", "robust"), LETTERS, ids=[c[0] for c in LETTERS])
def test_letters(label: str, response: str, paper: bool, robust: bool) -> None:
    for name, meant in (("science", robust), ("science-short", robust or label in LAST_COUNTS)):
        grades = [tasks.get(name).grade(response, {"prompt": "p", "answer": "B"}, mode=mode) for mode in tasks.MODES]
        assert [grade.correct for grade in grades] == [paper, meant], grades
        assert all(grade.correct == (grade.reason == "correct") for grade in grades)


@pytest.mark.parametrize(
    ("response", "mode", "reason"),
    [
        ("", "paper", "the response is empty"),
        (" ", "robust", "the response is empty"),
        ("It is B", "paper", 'answered "It is B", wanted B; without an <answer> tag all of the text counts'),
        ("<answer>C</answer>", "paper", 'answered "C", wanted B'),
        ("The answer is C.", "robust", 'answered "C", wanted B'),
        ("Answer: C\nAnswer: B", "robust", "different letters are given: B, C"),
        ("I can't say", "robust", 'no single letter can be read from "I can\'t say"'),
    ],
)
def test_reasons_of_letter_grades(response: str, mode: str, reason: str) -> None:
    assert tasks.get("science").grade(response, {"prompt": "p", "answer": "B"}, mode=mode).reason == reason


def test_letters_and_statements_are_read_one_by_one() -> None:
    assert [read_letter(text) for text in ("d", "E", "answer: c")] == ["D", None, "C"]
    assert stated_letters("Answer: C. The correct option is B. \\boxed{A} and the answer is a gas.") == ["A", "B", "C"]
    assert stated_letters("Answer: C <answer>B</answer>") == []
    assert stated_letters("B") == []


@pytest.mark.parametrize(
    "filler",
    [
        " ",
        "*",
        "(",
        "answer ",
        "answer: ",
        "\\boxed{",
        "Action: ",
        "[Optional]",
        '{"a":',
        "Action Input: {",
        "\n",
        "<",
        "B",
    ],
)
def test_degenerate_responses_are_graded_in_time(filler: str) -> None:
    """A damaged model repeats itself: no run of characters may make a pattern slow, nor depth overflow the stack."""
    began = time.monotonic()
    for name in ("tooluse", "tooluse-short", "science", "science-short"):
        row = {"golden_answer": MARKED if name == "tooluse" else ONE, "answer": "D"}
        for text in (filler * 5000, "answer" + filler * 5000, f"Action: a\nAction Input: {filler * 5000}"):
            assert not any(tasks.get(name).grade(text, row, mode=mode).correct for mode in tasks.MODES)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("name", "row", "mode", "message"),
    [
        ("tooluse", {"id": "r1", "prompt": "p"}, "paper", 'row r1: the column "golden_answer" is missing'),
        ("tooluse", {"id": "r1", "golden_answer": "x"}, "paper", "row r1: the row needs golden_answer, a list of {Act"),
        ("tooluse", {"id": "r1", "golden_answer": [{"Action": "a"}]}, "robust", "row r1: the row needs golden_answer"),
        ("tooluse", {"golden_answer": [{"Action": "a", "Action_Input": "[1]"}]}, "robust", "must be an object"),
        ("tooluse-short", {"answer": "B"}, "paper", "needs golden_answer"),
        ("tooluse-short", {"golden_answer": [{"Action": "a", "Action_Input": "{b"}]}, "robust",
         "golden Action_Input of a is not valid JSON"),
        ("science", {"id": "r1", "prompt": "p"}, "robust", 'row r1: the column "answer" is missing'),
        ("science", {"id": "r1", "answer": "E"}, "paper", "row r1: the row needs an answer, one of A, B, C, D; it"),
        ("science-short", {}, "robust", "it has null"),
        ("science", {"answer": "B"}, "robus", 'mode is "robus"; allowed: paper, robust. Did you mean "robust"'),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_graded(name: str, row: dict[str, Any], mode: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(name).grade("Action: a", row, mode=mode)
    assert message in str(caught.value)


# Real rows


def real_rows(file: str) -> list[dict[str, Any]]:
    path = DATA / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"the real rows are not here: {path.name} of ../shared/data/{path.parent.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def gold_of(row: dict[str, Any]) -> str:
    return said(*row["golden_answer"]) if "golden_answer" in row else f"<answer>\n{row['answer']}\n</answer>"


def out_of_the_papers_reach(row: dict[str, Any]) -> bool:
    """The authors' expressions misread its golden answer: another name than \\w+, or a brace inside the input."""
    return any(
        not re.fullmatch(r"\w+", c["Action"]) or "}" in c["Action_Input"][:-1] for c in row.get("golden_answer", [])
    )


@pytest.mark.parametrize("file", FILES)
def test_real_golden_answers_are_correct(file: str) -> None:
    rows, task = real_rows(file), tasks.get(file.partition("/")[0])
    for number, row in enumerate(rows, start=1):
        task.check(row, f"{file}:{number}")
        assert task.messages(row) == row["prompt"]
        assert task.grade(gold_of(row), row, mode="robust") == tasks.Grade(True, "correct"), number
        assert task.grade(gold_of(row), row, mode="paper").correct != out_of_the_papers_reach(row), number
    assert len({task.id(row) for row in rows}) == len(rows)
    assert sum(map(out_of_the_papers_reach, rows)) == {"tooluse/dev": 2, "tooluse/train": 2}.get(file, 0)


@pytest.mark.parametrize("file", FILES)
def test_real_rows_tell_wrong_answers(file: str) -> None:
    rows, task = real_rows(file), tasks.get(file.partition("/")[0])
    other = gold_of(rows[0])
    right = {mode: sum(task.grade(other, row, mode=mode).correct for row in rows) for mode in tasks.MODES}
    same = sum(gold_of(row) == other for row in rows)
    assert right["paper"] == right["robust"] == same


@pytest.mark.parametrize("file", ["science/dev", "science/train"])
def test_real_options_are_read(file: str) -> None:
    task = tasks.get("science")
    for row in real_rows(file):
        lines = row["prompt"][-1]["content"].split("\n")[-4:]
        assert [f"{letter}: {text}" for letter, text in task.options(row).items()] == lines
        assert task.choices(row) == list("ABCD")
        assert task.gold(row) == row["answer"]
