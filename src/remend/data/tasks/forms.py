"""What a task's rows look like: the columns that they need, the prompt as messages, the id, the options of a choice.

form = remend.tasks.form("science")
for number, row in enumerate(rows, start=1):
    form.check(row, f"data.jsonl:{number}")
form.messages(rows[0]), form.id(rows[0]), form.options(rows[0])  # [{role, content}, …], "0c33…", {"A": "147.2", …}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from remend.data.examples import example_of
from remend.data.tasks.task import Draw, row_id, shorten
from remend.errors import InputError
from remend.registry import Registry

# A blank after the label: "C.CCO" at the start of a line is a molecule, not an option.
_LABEL = re.compile(r"^\(?([A-Z])[:.)][ \t]+(?=\S)", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """How a row is read; all five tasks have one, under their name.

    Args:
        columns: what a row must have to be asked and graded.
        letters: whether the row is a choice whose options stand at the end of its prompt, as lines "A: …", "B: …".
    """

    columns: tuple[str, ...]
    letters: bool = False

    def check(self, row: Mapping[str, Any], where: str | None = None) -> None:
        """Raises InputError that starts with `where` (else the row's id) when a column or a usable prompt is missing.

        What stands in the answer's column is the grader's to judge; for scoring by letters, call `gold` beforehand.
        """
        if not isinstance(row, Mapping):
            raise InputError(f"{where or 'the row'}: a row must be an object, got {type(row).__name__}")
        where = where or name_of(row)
        require(row, self.columns, where)
        example_of(row, where)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The prompt as chat messages, just as the row has them; a text is one user's message.

        Raises InputError when the row has no usable prompt.
        """
        prompt = example_of(row, name_of(row)).prompt
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]

    def id(self, row: Mapping[str, Any]) -> str:
        """The row's own id, else `row_id`: 12 hex digits of the SHA-256 of its canonical prompt and answer."""
        return str(row["id"]) if row.get("id") is not None else row_id(row)

    def options(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Letter → text of each option, in order.

        Raises InputError when this is no choice, or fewer than two options can be read from the prompt.
        """
        where = name_of(row)
        if not self.letters:
            raise InputError(f"{where}: this task is no choice between letters; score it by generation")
        prompt = example_of(row, where).prompt
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        found = _options_of(text)
        if len(found) < 2:
            raise InputError(f'{where}: the prompt has no options as lines "A: …", "B: …": {shorten(text[-160:])}')
        return found

    def choices(self, row: Mapping[str, Any]) -> list[str]:
        """The letters that a row lets one choose from, in order: what answer-letter log-likelihood compares.

        Raises InputError as `options`.
        """
        return list(self.options(row))

    def gold(self, row: Mapping[str, Any]) -> str:
        """The right letter. Raises InputError as `options`, or when the answer is none of the row's letters."""
        where, options = name_of(row), self.options(row)
        require(row, self.columns, where)
        answer = row["answer"]
        if not isinstance(answer, str) or answer not in options:
            raise InputError(f"{where}: the answer is {shorten(answer)}; the prompt's options are {', '.join(options)}")
        return answer


FORMS: Registry[Form] = Registry("task")


def _options_of(text: str) -> dict[str, str]:
    """The last run of options from A on; a text goes to the next label, or to an empty line."""
    labels = list(_LABEL.finditer(text))
    start = max((i for i, label in enumerate(labels) if label[1] == "A"), default=len(labels))
    run: list[re.Match[str]] = []
    for label in labels[start:]:
        if label[1] == chr(ord("A") + len(run)):
            run.append(label)
    if not run:
        return {}
    ends = [label.start() for label in run[1:]] + [len(text)]
    return {
        label[1]: text[label.end() : end].partition("\n\n")[0].strip() for label, end in zip(run, ends, strict=True)
    }


def name_of(row: Mapping[str, Any]) -> str:
    """'row 0c33…' by the row's id, or 'the row' where it has none and none can be made."""
    if row.get("id") is not None:
        return f"row {row['id']}"
    try:
        return f"row {row_id(row)}"
    except (InputError, TypeError, ValueError):
        return "the row"


def require(row: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    """Raises InputError that starts with `where` and names the first column that is missing or null."""
    for column in columns:
        if row.get(column) is None:
            raise InputError(
                f'{where}: the column "{column}" is missing (it has: {", ".join(map(str, row)) or "nothing"}); '
                f"rows of this task need {', '.join(columns)}"
            )


def no_rows(draw: Draw) -> NoReturn:
    """`make` of a task whose rows come from a file. Raises InputError that says so."""
    raise InputError(
        f"{draw.task} makes no rows of its own: its rows are lines of a data file, or a data set of the hub. "
        f"A task that makes rows is {draw.task}-short"
    )
