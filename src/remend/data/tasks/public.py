"""The public data sets of science and tooluse, put into the rows that the tasks read.

remend eval MODEL --task science --data hicai-zju/SciKnowEval:test --out science.json
remend eval MODEL --task tooluse --data eval_simulated.json --out tools.json

A row that has the task's own columns already is left as it is, so both forms can be given. Of SciKnowEval (columns
question, choices {text, label}, answerKey, type, domain, details {level, …}) chemistry of level 3 with four options is
taken; the authors of arXiv 2601.19897 publish a part of that as their evaluation split. A row of ToolAlpaca (columns
Name, Description, NLDocumentation, Instructions, Golden_Answers, as in its data/eval_simulated.json) is an API with
several requests, and gives a row for each. The prompts are in those authors' form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from remend.data.examples import Convert, Example, load_examples
from remend.data.tasks.choice import LETTERS
from remend.errors import InputError

Row = Mapping[str, Any]

SCIENCE = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. Do not \
restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""

TOOLUSE = """Your task is to answer the user's question using available tools. 
You have access to the following tools:
Name: {name}
Description: {description}
Documentation:
{documentation}

Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format. All of the action input must be realistic and from the \
user.

Begin!
Question: {question}"""


def sciknoweval(row: Row) -> list[dict[str, Any]]:
    """A row of science from one of SciKnowEval; [] for other subjects, levels and kinds of question."""
    details = row.get("details") or {}
    choices = row.get("choices") or {}
    texts, labels = choices.get("text") or [], choices.get("label") or []
    wanted = (row.get("domain"), details.get("level"), list(labels)) == ("Chemistry", "L3", list(LETTERS))
    if not wanted or len(texts) != len(labels) or row.get("answerKey") not in labels:
        return []
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    question = {"role": "user", "content": f"{row['question']}\n\n{options}"}
    return [{"prompt": [{"role": "system", "content": SCIENCE}, question], "answer": row["answerKey"]}]


def toolalpaca(row: Row) -> list[dict[str, Any]]:
    """A row of tooluse for each request of an API of ToolAlpaca; those without a golden answer are left out.

    Raises InputError when there are not as many golden answers as requests.
    """
    requests, golden = row.get("Instructions") or [], row["Golden_Answers"]
    if len(requests) != len(golden):
        raise InputError(
            f"the API {row.get('Name')} has {len(requests)} Instructions and {len(golden)} Golden_Answers; "
            "ToolAlpaca has one for each"
        )
    about = {
        "name": row["Name"],
        "description": row["Description"],
        "documentation": row["NLDocumentation"].strip("\n"),
    }
    return [
        {
            "prompt": [{"role": "user", "content": TOOLUSE.format(question=request, **about)}],
            "golden_answer": [{key: call[key] for key in ("Action", "Action_Input")} for call in calls],
            "tool": row["Name"],
        }
        for request, calls in zip(requests, golden, strict=True)
        if calls
    ]


def _where(public: Sequence[str], convert: Callable[[Row], list[dict[str, Any]]]) -> Convert:
    def rows(row: Row) -> Sequence[Row]:
        if not isinstance(row, Mapping) or not all(key in row for key in public):
            return [row]
        return convert(row)

    return rows


CONVERTERS: dict[str, Convert] = {
    "science": _where(("question", "choices", "answerKey"), sciknoweval),
    "tooluse": _where(("NLDocumentation", "Instructions", "Golden_Answers"), toolalpaca),
}


def load_rows(task: str, source: str) -> list[Example]:
    """A task's rows from a file or data set, in its own columns or in those of the public data set.

    Raises InputError and FileError as remend.data.load_examples does.
    """
    return load_examples(source, CONVERTERS.get(task))
