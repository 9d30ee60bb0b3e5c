"""Rows of the public data sets, hand-made in their columns, become rows of the tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from remend.data import tasks
from remend.data.examples import Row
from remend.errors import InputError
from remend.evaluation.rows import read


def question(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": {"default": "Given a question and four options, please select the right answer."},
        "question": "Which of these is a noble gas?",
        "answer": "",
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "made_up", "subtask": "made_up", "source": "hand"},
        "answerKey": "C",
        "choices": {"text": ["iron", "chlorine", "argon", "sulfur"], "label": ["A", "B", "C", "D"]},
        **changes,
    }


def converted(name: str, row: dict[str, Any]) -> Sequence[Row]:
    convert = tasks.get(name).convert
    assert convert is not None
    return convert(row)


API: dict[str, Any] = {
    "Name": "Tea",
    "Description": "Kinds of tea",
    "NLDocumentation": 'getTea: Find a tea.\nParameters: {"name": "Required. string."}\nOutput: A tea.\n',
    "Instructions": ["What is sencha?", "And oolong?", "Nothing to do."],
    "Golden_Answers": [
        [{"Action": "getTea", "Action_Input": '{"name": "sencha"}', "Thought": "…"}],
        [{"Action": "getTea", "Action_Input": '{"name": "oolong"}'}],
        [],
    ],
}


def test_a_question_of_sciknoweval() -> None:
    (row,) = converted("science", question())
    system, user = row["prompt"]
    assert system["content"].startswith(
        "\nGiven a question and four options, please select the right answer. Respond in"
    )
    assert "(A, B, C, or D), and nothing else. Do not restate the answer text. For example" in system["content"]
    assert user["content"] == "Which of these is a noble gas?\n\nA: iron\nB: chlorine\nC: argon\nD: sulfur"
    form = tasks.form("science")
    form.check(row)
    assert form.options(row) == {"A": "iron", "B": "chlorine", "C": "argon", "D": "sulfur"}
    assert form.gold(row) == "C"
    assert tasks.get("science").grade("<answer>C</answer>", row).correct


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": "Biology"},
        {"details": {"level": "L1"}},
        {"type": "true_or_false", "choices": {"text": [], "label": []}, "answerKey": ""},
        {"choices": {"text": ["iron", "argon"], "label": ["A", "B"]}},
        {"answerKey": ""},
    ],
)
def test_other_questions_are_left_out(changes: dict[str, Any]) -> None:
    assert converted("science", question(**changes)) == []


def test_an_api_of_toolalpaca_gives_a_row_a_request() -> None:
    first, second = converted("tooluse", API)
    assert first["prompt"][0]["content"] == (
        "Your task is to answer the user's question using available tools. \n"
        "You have access to the following tools:\nName: Tea\nDescription: Kinds of tea\nDocumentation:\n"
        'getTea: Find a tea.\nParameters: {"name": "Required. string."}\nOutput: A tea.\n\n'
        "Use the following format:\nThought: you should always think about what to do\n"
        "Action: the action to take, should be one of the tool names.\n"
        "Action Input: the input to the action, must be in JSON format. All of the action input must be realistic and "
        "from the user.\n\nBegin!\nQuestion: What is sencha?"
    )
    assert first["golden_answer"] == [{"Action": "getTea", "Action_Input": '{"name": "sencha"}'}]
    assert tasks.get("tooluse").grade('Action: getTea\nAction Input: {"name": "oolong"}', second).correct
    with pytest.raises(InputError, match="the API Tea has 3 Instructions and 1 Golden_Answers"):
        converted("tooluse", {**API, "Golden_Answers": [[]]})


def test_files_and_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval_simulated.json"  # one list, as ToolAlpaca publishes it
    path.write_text(json.dumps([API, {**API, "Name": "Coffee"}], indent=4))
    assert len(read("tooluse", str(path), None).rows) == 4
    own = {"prompt": "q\nA: x\nB: y\nC: z\nD: w", "answer": "A"}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in (question(), own, question(domain="Physics"))))
    assert [e.row["answer"] for e in tasks.get("science").load(str(mixed))] == ["C", "A"]
    asked = []

    def load_dataset(name: str, part: None, *, revision: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, revision, split))
        return [question(), question(domain="Biology")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read("science", "hicai-zju/SciKnowEval:test", None).rows) == 1
    assert asked == [("hicai-zju/SciKnowEval", None, "test")]
    none = tmp_path / "none.jsonl"
    none.write_text(json.dumps(question(domain="Physics")) + "\n")
    with pytest.raises(InputError, match="has no rows"):
        tasks.get("science").load(str(none))
