"""science: four-choice questions of chemistry (SciKnowEval level 3, arXiv 2406.09098).

Rows are read from a file, in the prompt form of the SDFT authors (arXiv 2601.19897):

    {"prompt": [{"role": "system", "content": "Given a question and four options, please select the right answer. …"},
                {"role": "user", "content": "What is the molar weight (g/mol) of …?\\n\\nA: 532.000\\nB: …"}],
     "answer": "C"}

`paper` grades as the authors' code does: the text after the last `<answer>`, up to `</answer>`, stripped, is the
letter as it stands; without a tag the whole stripped response is. `robust` reads the letter as it was meant (see
choice.py: in the last tag, after "Answer:" or in "\\boxed{B}", in any case), and takes two different letters for no
answer, in one place, or without a tag in two statements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from remend.data.tasks.choice import grade_letter, read_letter
from remend.data.tasks.forms import FORMS, Form, name_of, no_rows, require
from remend.data.tasks.task import TASKS, Grade, Mode, Task
from remend.errors import InputError

_TAG = re.compile(r"<\s?answer\s?>", re.IGNORECASE)
_STATEMENT = re.compile(r"(?=\banswer\b|\b(?:correct|right|best) (?:option|choice)\b|\\boxed\{)", re.IGNORECASE)


def grade_science(response: str, row: Mapping[str, Any], mode: Mode) -> Grade:
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


for _name in ("science", "science-short"):
    FORMS.register(_name, source="arXiv 2601.19897")(Form(("prompt", "answer"), letters=True))

TASKS.register("science", source="SciKnowEval, arXiv 2406.09098, as prompted and graded beside arXiv 2601.19897")(
    Task("science", "four-choice chemistry (SciKnowEval level 3; rows from a file)", no_rows, grade_science)
)
