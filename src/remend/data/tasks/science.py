"""science: four-choice questions of chemistry (SciKnowEval level 3, arXiv 2406.09098).

Rows are read from a file, in the prompt form of the SDFT authors (arXiv 2601.19897):

    {"prompt": [{"role": "system", "content": "Given a question and four options, please select the right answer. …"},
                {"role": "user", "content": "What is the molar weight (g/mol) of …?\\n\\nA: 532.000\\nB: …"}],
     "answer": "C"}

`paper` grades as the authors' code does: the text after the last `<answer>`, up to `</answer>`, stripped, is the
letter as it stands; without a tag the whole stripped response is. `robust` reads the letter as it was meant (see
choice.py: in the last tag, after "Answer:" or in "\\boxed{B}", in any case), and takes two different letters for no
answer, in one place, or without a tag in two statements.

Rows of SciKnowEval itself are read too (columns question, choices {text, label}, answerKey, type, domain, details
{level, …}): chemistry of level 3 with four options is taken. The authors of arXiv 2601.19897 publish a part of that as
their evaluation split.

remend eval MODEL --task science --data hicai-zju/SciKnowEval:test --out science.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from remend.data.examples import Row
from remend.data.tasks.choice import LETTERS, grade_letter, read_letter
from remend.data.tasks.task import TASKS, Grade, Mode, Task, name_of, require
from remend.errors import InputError

PROMPT = """
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

_TAG = re.compile(r"<\s?answer\s?>", re.IGNORECASE)
_STATEMENT = re.compile(r"(?=\banswer\b|\b(?:correct|right|best) (?:option|choice)\b|\\boxed\{)", re.IGNORECASE)


def grade_science(response: str, row: Row, mode: Mode) -> Grade:
    """Grade a multiple choice (A to D); see the module for the two modes.

    Raises InputError when the row's answer is missing or no letter; the message names the row.
    """
    where = name_of(row)
    require(row, ("answer",), where)
    try:
        grade = grade_letter(response, row, mode)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if mode == "robust":
        letters = stated_letters(response)
        if len(letters) > 1:
            return Grade(False, f"different letters are given: {', '.join(letters)}")
    if grade.correct:
        return grade
    if not response.strip():
        return Grade(False, "the response is empty")
    untagged = mode == "paper" and "<answer>" not in response
    return Grade(False, f"{grade.reason}; without an <answer> tag all of the text counts" if untagged else grade.reason)


def stated_letters(response: str) -> list[str]:
    """The distinct letters that a response without a tag states as its answer, sorted; [] where it has a tag.

    A statement begins at "answer", "correct option" or "\\boxed{" and is read by `read_letter`. With a tag the last
    one counts, as in the paper, whatever was said before.
    """
    text = response.rpartition("</think>")[2]
    if _TAG.search(text):
        return []
    return sorted({letter for part in _STATEMENT.split(text)[1:] if (letter := read_letter(part))})


def from_sciknoweval(row: Row) -> Sequence[Row]:
    """A row of science from one of SciKnowEval; [] for other subjects, levels and kinds of question."""
    if not isinstance(row, Mapping) or not all(key in row for key in ("question", "choices", "answerKey")):
        return [row]
    details = row.get("details") or {}
    choices = row.get("choices") or {}
    texts, labels = choices.get("text") or [], choices.get("label") or []
    wanted = (row.get("domain"), details.get("level"), list(labels)) == ("Chemistry", "L3", list(LETTERS))
    if not wanted or len(texts) != len(labels) or row.get("answerKey") not in labels:
        return []
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    question = {"role": "user", "content": f"{row['question']}\n\n{options}"}
    return [{"prompt": [{"role": "system", "content": PROMPT}, question], "answer": row["answerKey"]}]


TASKS.register("science", source="SciKnowEval, arXiv 2406.09098, as prompted and graded beside arXiv 2601.19897")(
    Task(
        "science",
        "four-choice chemistry (SciKnowEval level 3; rows from a file)",
        None,
        grade_science,
        columns=("prompt", "answer"),
        letters=True,
        max_new_tokens=512,
        convert=from_sciknoweval,
    )
)
