"""Graders by hand-made cases: the response, whether the paper's grader takes it, whether what was meant is right."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from remend.data import tasks
from remend.data.tasks.calls import parse_calls
from remend.data.tasks.choice import read_letter
from remend.errors import InputError

TOOLS, SCIENCE = "tooluse-short", "science-short"


def call(action: str, **inputs: Any) -> dict[str, str]:
    return {"Action": action, "Action_Input": json.dumps(inputs)}


# Grading tool calls: the case, the response, right as the paper grades, right by what was meant

ONE = [call("getTent", id=7, day="Friday")]
TWO = [call("getTent", id=7), call("countTents", city="Oslo")]
NONE = [call("listAll")]
DEEP = [call("setUp", tent={"size": {"w": 2}, "tags": ["a", "b"]}, on=True)]
TWICE = [call("getFruit", name="fig"), call("getFruit", name="plum")]
TICKS = "```"

CALLS: list[tuple[str, list[dict[str, str]], str, bool, bool]] = [
    ("plain", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"}', True, True),
    ("a thought before", ONE, 'Thought: go\nAction: getTent\nAction Input: {"id": 7, "day": "Friday"}', True, True),
    ("keys in another order", ONE, 'Action: getTent\nAction Input: {"day": "Friday", "id": 7}', True, True),
    ("text after", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"}\nDone, I hope.', True, True),
    ("another value", ONE, 'Action: getTent\nAction Input: {"id": 8, "day": "Friday"}', False, False),
    ("another action", ONE, 'Action: getTents\nAction Input: {"id": 7, "day": "Friday"}', False, False),
    ("a parameter missing", ONE, 'Action: getTent\nAction Input: {"id": 7}', False, False),
    ("a parameter too many", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday", "x": ""}', False, False),
    ("a number as text", ONE, 'Action: getTent\nAction Input: {"id": "7", "day": "Friday"}', False, False),
    ("7.0 for 7", ONE, 'Action: getTent\nAction Input: {"id": 7.0, "day": "Friday"}', True, True),
    ("case of a value", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "friday"}', False, False),
    ("case of the name", ONE, 'Action: gettent\nAction Input: {"id": 7, "day": "Friday"}', False, False),
    ("case of the labels", ONE, 'ACTION: getTent\nAction input: {"id": 7, "day": "Friday"}', False, True),
    ("labels in bold", ONE, '**Action:** getTent\n**Action Input:** {"id": 7, "day": "Friday"}', False, True),
    ("bold inside the colon", ONE, '**Action**: getTent\n**Action Input**: {"id": 7, "day": "Friday"}', False, True),
    ("name in backticks", ONE, 'Action: `getTent`\nAction Input: `{"id": 7, "day": "Friday"}`', False, True),
    ("name with brackets", ONE, 'Action: getTent()\nAction Input: {"id": 7, "day": "Friday"}', True, True),
    ("a fence with json", ONE, f'Action: getTent\nAction Input: {TICKS}json\n{{"id": 7, "day": "Friday"}}\n{TICKS}',
     False, True),
    ("a fence around all", ONE, f'{TICKS}\nAction: getTent\nAction Input: {{"id": 7, "day": "Friday"}}\n{TICKS}',
     True, True),
    ("JSON over several lines", ONE, 'Action: getTent\nAction Input:\n{\n  "id": 7,\n  "day": "Friday"\n}', True, True),
    ("all on one line", ONE, 'Thought: go. Action: getTent Action Input: {"id": 7, "day": "Friday"}', True, True),
    ("an action in the prose", ONE, 'The right Action: this one.\nAction: getTent\nAction Input: {"id": 7, '
     '"day": "Friday"}', False, True),
    ("single quotes", ONE, "Action: getTent\nAction Input: {'id': 7, 'day': 'Friday'}", False, False),
    ("an open brace", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"', False, False),
    ("no input", ONE, "Action: getTent", False, False),
    ("no label", ONE, 'getTent {"id": 7, "day": "Friday"}', False, False),
    ("nothing", ONE, "", False, False),
    ("the call twice", ONE, 'Action: getTent\nAction Input: {"id": 7, "day": "Friday"}\n' * 2, False, False),
    ("after thinking", ONE, 'Action: no\n</think>\nAction: getTent\nAction Input: {"id": 7, "day": "Friday"}',
     False, True),
    ("true is no 1", [call("a", n=1)], 'Action: a\nAction Input: {"n": true}', True, False),
    ("empty input", NONE, "Action: listAll\nAction Input: {}", True, True),
    ("empty input left out", NONE, "Action: listAll\nAction Input:", True, True),
    ("no input needed", NONE, "Action: listAll", True, True),
    ("words for no input", NONE, "Action: listAll\nAction Input: nothing", True, False),
    ("nested JSON", DEEP, 'Action: setUp\nAction Input: {"tent": {"size": {"w": 2}, "tags": ["a", "b"]}, "on": true}',
     False, True),
    ("nested JSON, wrong inside", DEEP, 'Action: setUp\nAction Input: {"tent": {"size": {"w": 3}, "tags": '
     '["a", "b"]}, "on": true}', False, False),
    ("a list in another order", DEEP, 'Action: setUp\nAction Input: {"tent": {"size": {"w": 2}, "tags": '
     '["b", "a"]}, "on": true}', False, False),
    ("a brace in a text", [call("say", t="a } b")], 'Action: say\nAction Input: {"t": "a } b"}', False, True),
    ("a label in a text", [call("say", t="Action: x")], 'Action: say\nAction Input: {"t": "Action: x"}', False, True),
    ("two calls", TWO, 'Action: getTent\nAction Input: {"id": 7}\nAction: countTents\nAction Input: {"city": "Oslo"}',
     True, True),
    ("two calls, the other way round", TWO, 'Action: countTents\nAction Input: {"city": "Oslo"}\nAction: getTent\n'
     'Action Input: {"id": 7}', True, True),
    ("inputs at the wrong actions", TWO, 'Action: getTent\nAction Input: {"city": "Oslo"}\nAction: countTents\n'
     'Action Input: {"id": 7}', True, False),
    ("names first, inputs after", TWO, 'Action: getTent\nAction: countTents\nAction Input: {"id": 7}\n'
     'Action Input: {"city": "Oslo"}', True, False),
    ("one of two", TWO, 'Action: getTent\nAction Input: {"id": 7}', False, False),
    ("one input for two", TWO, 'Action: getTent\nAction: countTents\nAction Input: {"id": 7, "city": "Oslo"}',
     True, False),
    ("one action twice", TWICE, 'Action: getFruit\nAction Input: {"name": "fig"}\nAction: getFruit\n'
     'Action Input: {"name": "plum"}', True, True),
    ("one action twice, wrong order", TWICE, 'Action: getFruit\nAction Input: {"name": "plum"}\nAction: getFruit\n'
     'Action Input: {"name": "fig"}', False, True),
    ("the last alone is right", TWICE, 'Action: getFruit\nAction Input: {"name": "kiwi"}\nAction: getFruit\n'
     'Action Input: {"name": "plum"}', True, False),
    ("a name with a dash", [call("routes-get", a=1)], 'Action: routes-get\nAction Input: {"a": 1}', False, True),
]  # fmt: skip


@pytest.mark.parametrize(("golden", "response", "paper", "robust"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_tool_calls(golden: list[dict[str, str]], response: str, paper: bool, robust: bool) -> None:
    row = {"golden_answer": golden}
    task = tasks.get(TOOLS)
    assert task.grade(response, row, mode="paper").correct is paper
    found = task.grade(response, row, mode="robust")
    assert found.correct is robust
    assert found.reason
    assert found.correct == found.reason.startswith("correct")


@pytest.mark.parametrize(
    ("golden", "response", "mode", "reason"),
    [
        (ONE, "hello", "paper", 'actions are [], wanted ["getTent"]'),
        (ONE, "Action: getTent", "paper", 'merged inputs are {}, wanted {"id": 7, "day": "Friday"}'),
        (ONE, "Action: getTent\nAction Input: {id}", "robust", "the Action Input of getTent is not valid JSON: Exp"),
        (ONE, "Action: getTent\nAction Input: a day", "robust", "the Action Input of getTent is no JSON object: a day"),
        (ONE, "Action: getTent", "robust", 'calls are ["getTent", {}], wanted ["getTent", {"day": "Friday", "id": 7}]'),
        (TWICE, 'Action: getFruit\nAction Input: {"name": "plum"}\nAction: getFruit\nAction Input: {"name": "fig"}',
         "robust", "correct; the calls came in another order, which does not count"),
    ],
)  # fmt: skip
def test_reasons_of_tool_grades(golden: list[dict[str, str]], response: str, mode: str, reason: str) -> None:
    assert reason in tasks.get(TOOLS).grade(response, {"golden_answer": golden}, mode=mode).reason


def test_parsed_calls_keep_their_order() -> None:
    text = 'Action: b\nAction Input: {"x": {"y": 1}}\nObservation: ok\nAction: a\nAction Input:\nObservation: ok'
    assert parse_calls(text) == ([("b", {"x": {"y": 1}}), ("a", {})], [])


# Grading letters: the response to a question whose answer is B

LETTERS: list[tuple[str, str, bool, bool]] = [
    ("as asked", "<reasoning>\nx\n</reasoning>\n<answer>\nB\n</answer>", True, True),
    ("in one line", "<answer>B</answer>", True, True),
    ("wrong", "<answer>C</answer>", False, False),
    ("the last tag counts", "<answer>A</answer> no: <answer>B</answer>", True, True),
    ("the last tag is wrong", "<answer>B</answer> no: <answer>A</answer>", False, False),
    ("an open tag", "so <answer>B", True, True),
    ("text after the tag", "<answer>B</answer> because of the neutrons", True, True),
    ("no tag, the letter alone", " B\n", True, True),
    ("no tag, more text", "It is B", False, False),
    ("a small letter", "<answer>b</answer>", False, True),
    ("brackets", "<answer>(B)</answer>", False, True),
    ("a full stop", "<answer> B. </answer>", False, True),
    ("bold", "<answer>**B**</answer>", False, True),
    ("with its text", "<answer>B: Iron</answer>", False, True),
    ("with its text, a bracket", "<answer>\n(b) Iron\n</answer>", False, True),
    ("Answer: in the tag", "<answer>Answer: B</answer>", False, True),
    ("option in the tag", "<answer>Option B</answer>", False, True),
    ("a tag in capitals", "<ANSWER> B </ANSWER>", False, True),
    ("a tag with blanks", "< answer >B< /answer >", False, True),
    ("two letters", "<answer>B or C</answer>", False, False),
    ("all options", "<answer>A: x\nB: y</answer>", False, False),
    ("the text alone", "<answer>Iron</answer>", False, False),
    ("an empty tag", "<answer></answer>", False, False),
    ("nothing", "", False, False),
    ("Answer: B", "Answer: B", False, True),
    ("the answer is", "Iron has 26 protons. The answer is (B).", False, True),
    ("the answer is, in bold", "**Answer:** B", False, True),
    ("the correct option is", "So the correct option is b.", False, True),
    ("boxed", "Thus $\\boxed{B}$.", False, True),
    ("an article", "The answer is a gas. Answer: B", False, True),
    ("only an article", "The answer is a gas, B for short", False, False),
    ("another option named after it", "The answer is B. Option A is too light.", False, True),
    ("two in prose", "The answer is B or C.", False, False),
    ("after thinking", "<answer>A</answer></think>\n<answer>B</answer>", True, True),
    ("only in the thinking", "<answer>A</answer></think>\nB", False, True),
]


@pytest.mark.parametrize(("response", "paper", "robust"), [c[1:] for c in LETTERS], ids=[c[0] for c in LETTERS])
def test_letters(response: str, paper: bool, robust: bool) -> None:
    task = tasks.get(SCIENCE)
    found = [task.grade(response, {"answer": "B"}, mode=mode) for mode in ("paper", "robust")]
    assert [grade.correct for grade in found] == [paper, robust]
    assert all(grade.correct == (grade.reason == "correct") for grade in found)


def test_reasons_of_letter_grades() -> None:
    task, row = tasks.get(SCIENCE), {"answer": "B"}
    assert task.grade("<answer>(B)</answer>", row).reason == 'answered "(B)", wanted B'
    assert task.grade("I think it is iron", row, mode="robust").reason.startswith(
        'no single letter can be read from "I'
    )
    assert [read_letter(text) for text in ("d", "E", "answer: c")] == ["D", None, "C"]


@pytest.mark.parametrize(
    "filler", [" ", "*", "(", "answer ", "answer: ", "Action: ", '{"a":', "Action Input: {", "\n", "<"]
)
def test_degenerate_responses_are_graded_in_time(filler: str) -> None:
    """A damaged model repeats itself: no run of characters may make a pattern slow, nor depth overflow the stack."""
    began = time.monotonic()
    for text in (filler * 5000, "answer" + filler * 5000, "Action: a\nAction Input: " + filler * 5000):
        for mode in tasks.MODES:
            assert not tasks.get(TOOLS).grade(text, {"golden_answer": ONE}, mode=mode).correct
            assert not tasks.get(SCIENCE).grade(text, {"answer": "B"}, mode=mode).correct
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "row", "mode", "message"),
    [
        (TOOLS, {"answer": "B"}, "paper", "needs golden_answer"),
        (TOOLS, {"golden_answer": [{"Action": "a"}]}, "paper", "needs golden_answer"),
        (
            TOOLS,
            {"golden_answer": [{"Action": "a", "Action_Input": "{b"}]},
            "robust",
            "golden Action_Input of a is not",
        ),
        (TOOLS, {"golden_answer": [{"Action": "a", "Action_Input": "[1]"}]}, "robust", "must be an object, got list"),
        (SCIENCE, {"answer": "E"}, "paper", "one of A, B, C, D; it has E"),
        (SCIENCE, {}, "robust", "it has null"),
        (SCIENCE, {"answer": "B"}, "robus", 'mode is "robus"; allowed: paper, robust. Did you mean "robust"'),
    ],
)
def test_rows_that_can_not_be_graded(name: str, row: dict[str, Any], mode: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(name).grade("Action: a", row, mode=mode)
    assert message in str(caught.value)
