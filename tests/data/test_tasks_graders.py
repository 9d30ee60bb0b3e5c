"""tooluse and science: graders by hand-made cases and on the real rows, and how rows of all tasks are read."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from remend.data import tasks
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
    ("text around", ONE, 'Sure!\nAction: getAnime\nAction Input: {"animeId": 98765}\nHope it helps.', True, True),
    ("an observation made up", ONE, said(*ONE) + "\nObservation: {}\nFinal Answer: done", True, True),
    ("a call made up after it", ONE, said(*ONE) + "\nObservation: x\n" + said(*ONE), False, False),
    ("another value", ONE, 'Action: getAnime\nAction Input: {"animeId": 1}', False, False),
    ("another action", ONE, 'Action: searchAnime\nAction Input: {"animeId": 98765}', False, False),
    ("another key", ONE, 'Action: getAnime\nAction Input: {"id": 98765}', False, False),
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
    ("no action", ONE, 'Action Input: {"animeId": 98765}', False, False),
    ("only a thought", ONE, "Thought: I should look up the anime.", False, False),
    ("empty", ONE, "", False, False),
    ("blank", ONE, " \n\t", False, False),
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
]  # fmt: skip


@pytest.mark.parametrize(("golden", "response", "paper", "robust"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_tool_calls(golden: list[dict[str, str]], response: str, paper: bool, robust: bool) -> None:
    row = {"id": "r1", "prompt": "p", "golden_answer": golden}
    found = [tasks.get("tooluse").grade(response, row, mode=mode) for mode in ("paper", "robust")]
    assert [grade.correct for grade in found] == [paper, robust], found
    for grade in found:
        assert grade.correct == grade.reason.startswith("correct")
        assert "\n" not in grade.reason
    assert row["golden_answer"] == golden


@pytest.mark.parametrize(
    ("golden", "response", "mode", "reason"),
    [
        (ONE, "", "paper", "the response is empty"),
        (ONE, "\n", "robust", "the response is empty"),
        (ONE, "hello", "paper", 'actions are [], wanted ["getAnime"]'),
        (NESTED, said(*NESTED), "paper", "merged inputs are {}, wanted {"),
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


@pytest.mark.parametrize("mode", tasks.MODES)
def test_the_short_tasks_grade_through_the_same_call(mode: str) -> None:
    row = {"id": "r1", "prompt": "p", "golden_answer": TWO, "answer": "B"}
    for name in ("tooluse", "tooluse-short"):
        assert tasks.get(name).grade(said(*TWO), row, mode=mode) == tasks.Grade(True, "correct")
        assert not tasks.get(name).grade(said(TWO[0]), row, mode=mode).correct
    for name in ("science", "science-short"):
        assert tasks.get(name).grade("<answer>B</answer>", row, mode=mode) == tasks.Grade(True, "correct")
        assert not tasks.get(name).grade("<answer>C</answer>", row, mode=mode).correct


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
    ("small and alone", "b", False, True),
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
    ("blank", "\n\n", False, False),
    ("after thinking", "<think>Answer: A</think>Answer: B", False, True),
]


@pytest.mark.parametrize(("response", "paper", "robust"), [c[1:] for c in LETTERS], ids=[c[0] for c in LETTERS])
def test_letters(response: str, paper: bool, robust: bool) -> None:
    row = {"prompt": "p", "answer": "B"}
    found = [tasks.get("science").grade(response, row, mode=mode) for mode in ("paper", "robust")]
    assert [grade.correct for grade in found] == [paper, robust], found
    assert all(grade.correct == (grade.reason == "correct") for grade in found)


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


def test_statements_are_read_one_by_one() -> None:
    assert stated_letters("Answer: C. The correct option is B. \\boxed{A} and the answer is a gas.") == ["A", "B", "C"]
    assert stated_letters("Answer: C <answer>B</answer>") == []
    assert stated_letters("B") == []


@pytest.mark.parametrize(
    "filler", ["answer ", "answer: ", "\\boxed{", "Action: ", "[Optional]", '{"a":', " ", "<", "B"]
)
def test_degenerate_responses_are_graded_in_time(filler: str) -> None:
    began = time.monotonic()
    for name, row in (("tooluse", {"golden_answer": MARKED}), ("science", {"answer": "D"})):
        for text in (filler * 5000, f"Action: a\nAction Input: {filler * 5000}"):
            assert not any(tasks.get(name).grade(text, row, mode=mode).correct for mode in tasks.MODES)
    assert time.monotonic() - began < 5


# Rows

CHOICE = "Which mass?\nC.CCO is no option\n\nA: 532.0\nB: C[C@@H](O)N: x\nC: 147.2\nD: 455.4"


def test_forms_read_options() -> None:
    form = tasks.form("science")
    row = {"prompt": [{"role": "system", "content": "A: no"}, {"role": "user", "content": CHOICE}], "answer": "C"}
    assert form.options(row) == {"A": "532.0", "B": "C[C@@H](O)N: x", "C": "147.2", "D": "455.4"}
    assert form.choices(row) == ["A", "B", "C", "D"]
    assert form.gold(row) == "C"
    long = {"prompt": "A: x\nB: y\n\n(A) one\nmore\n(B) two\nlines\n\nGive the letter.", "answer": "B"}
    assert form.options(long) == {"A": "one\nmore", "B": "two\nlines"}
    short = tasks.get("science-short")
    for row in short.rows("held_out", 8) if _has_molmass() else []:
        assert tasks.form("science-short").choices(row) == list("ABCD")
        assert tasks.form("science-short").gold(row) == row["answer"]


def _has_molmass() -> bool:
    try:
        import molmass  # noqa: F401
    except ImportError:
        return False
    return True


def test_every_task_has_a_form_and_rows_without_a_source_say_so() -> None:
    assert tasks.names() == ["general", "science", "science-short", "tooluse", "tooluse-short"]
    for name in tasks.names():
        assert tasks.form(name).columns[0] == "prompt"
    with pytest.raises(InputError, match=r"tooluse makes no rows of its own.* is tooluse-short"):
        tasks.get("tooluse").rows("held_out", 3)
    with pytest.raises(InputError, match=r'unknown task "tool-use"; known: general, science, science-short, tooluse, '):
        tasks.get("tool-use")


def test_messages_and_ids() -> None:
    form = tasks.form("tooluse")
    messages = [{"role": "user", "content": "Do it."}]
    row = {"prompt": messages, "golden_answer": ONE}
    assert form.messages(row) == messages
    assert form.messages({**row, "prompt": "Do it."}) == messages
    canonical = json.dumps(messages, sort_keys=True) + "\n" + json.dumps(ONE, sort_keys=True)
    assert form.id(row) == tasks.row_id(row) == hashlib.sha256(canonical.encode()).hexdigest()[:12]
    assert form.id({**row, "prompt": [{"content": "Do it.", "role": "user"}]}) == form.id(row)
    assert form.id({**row, "golden_answer": TWO}) != form.id(row)
    assert form.id({**row, "id": 7}) == "7"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tooluse", {"id": "r1", "prompt": "p", "answer": "B"},
         'row r1: the column "golden_answer" is missing (it has: id, prompt, answer); rows of this task need prompt, '),
        ("tooluse", {"golden_answer": ONE}, 'the row: the column "prompt" is missing (it has: golden_answer)'),
        ("tooluse", {"id": 3, "prompt": [], "golden_answer": ONE}, "row 3: the prompt is an empty list"),
        ("science", {"id": "r1", "prompt": CHOICE}, 'row r1: the column "answer" is missing'),
        ("science", {"id": "r1", "prompt": CHOICE, "answer": None}, 'row r1: the column "answer" is missing'),
        ("general", {"id": "r1", "prompt": "p"}, 'row r1: the column "checks" is missing'),
        ("science", ["p"], "the row: a row must be an object, got list"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_asked(name: str, row: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.form(name).check(row)
    assert message in str(caught.value)
    with pytest.raises(InputError, match=r"^data.jsonl:4: "):
        tasks.form(name).check(row, "data.jsonl:4")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tooluse", {"prompt": CHOICE, "golden_answer": ONE}, "this task is no choice between letters"),
        ("science", {"prompt": CHOICE, "answer": "E"}, "the answer is E; the prompt's options are A, B, C, D"),
        ("science", {"prompt": CHOICE, "answer": 2}, "the answer is 2; the prompt's options are A, B, C, D"),
        ("science", {"prompt": "Which?", "answer": "A"}, 'the prompt has no options as lines "A: …", "B: …": Which?'),
        ("science", {"prompt": "Which?\nA: this", "answer": "A"}, 'the prompt has no options as lines "A: …"'),
        ("science", {"prompt": CHOICE}, 'the column "answer" is missing'),
    ],
)
def test_rows_without_letters_to_score(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.form(name).gold({"id": "r1", **row})
    assert str(caught.value).startswith(f"row r1: {message}")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tooluse", {"id": "r1", "prompt": "p"}, 'row r1: the column "golden_answer" is missing'),
        ("tooluse", {"id": "r1", "golden_answer": "x"}, "row r1: the row needs golden_answer, a list of {Action, "),
        ("tooluse", {"id": "r1", "golden_answer": [{"Action": "a"}]}, "row r1: the row needs golden_answer"),
        ("tooluse", {"prompt": "p", "golden_answer": [{"Action": "a", "Action_Input": "[1]"}]}, "must be an object"),
        ("science", {"id": "r1", "prompt": "p"}, 'row r1: the column "answer" is missing'),
        ("science", {"id": "r1", "answer": "E"}, "row r1: the row needs an answer, one of A, B, C, D; it has E"),
    ],
)
def test_rows_that_can_not_be_graded(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(name).grade("Action: a", row, mode="robust")
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
    form = tasks.form(task.name)
    for number, row in enumerate(rows, start=1):
        form.check(row, f"{file}:{number}")
        assert form.messages(row) == row["prompt"]
        assert task.grade(gold_of(row), row, mode="robust") == tasks.Grade(True, "correct"), number
        assert task.grade(gold_of(row), row, mode="paper").correct != out_of_the_papers_reach(row), number
    assert len({form.id(row) for row in rows}) == len(rows)
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
    form = tasks.form("science")
    for row in real_rows(file):
        lines = row["prompt"][-1]["content"].split("\n")[-4:]
        assert [f"{letter}: {text}" for letter, text in form.options(row).items()] == lines
        assert form.choices(row) == list("ABCD")
        assert form.gold(row) == row["answer"]
