"""What a task is: how its rows are read, made and asked, and a grader in two modes.

task = remend.tasks.get("science")
for number, row in enumerate(rows, start=1):
    task.check(row, f"data.jsonl:{number}")
task.messages(rows[0]), task.id(rows[0]), task.options(rows[0])  # [{role, content}, …], "0c33…", {"A": "147.2", …}
task.grade("<answer>A</answer>", rows[0])  # Grade(correct=True, reason='correct')
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar, get_args

from remend.data.examples import Convert, Example, Row, example_of, load_examples, prompt_key, text_of
from remend.errors import InputError, did_you_mean
from remend.files.atomic import JsonObject
from remend.registry import Registry

Mode = Literal["paper", "robust"]
Split = Literal["train", "held_out"]
MODES: tuple[str, ...] = get_args(Mode)
SPLITS: tuple[str, ...] = get_args(Split)
TRIES = 200
"""Draws for a row before its split counts as used up."""

# A blank after the label: "C.CCO" at the start of a line is a molecule, not an option.
_LABEL = re.compile(r"^\(?([A-Z])[:.)][ \t]+(?=\S)", re.MULTILINE)

T = TypeVar("T")


@dataclass(frozen=True)
class Grade:
    """Whether a response is right, and why not (or what was overlooked)."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Draw:
    """All that a row may depend on: its task, split, seed and place, and how often it was drawn before."""

    task: str
    split: str
    seed: int
    index: int
    attempt: int = 0

    def random(self) -> Random:
        """This row's own generator, so that the first n rows are the same for any n."""
        # A text seeds by its SHA-512: the same on every platform, and no matter PYTHONHASHSEED.
        return Random(f"{self.task}/{self.split}/{self.seed}/{self.index}/{self.attempt}")

    def turn(self, options: Sequence[T], what: str) -> T:
        """One of `options`, each once in a block of len(options) rows, in an order of the block's own."""
        block, place = divmod(self.index, len(options))
        order = list(range(len(options)))
        Random(f"{self.task}/{self.split}/{self.seed}/{what}/{block}").shuffle(order)
        return options[order[place]]


Make = Callable[[Draw], JsonObject]
Grader = Callable[[str, Row, Mode], Grade]


@dataclass(frozen=True)
class Task:
    """A task under its name.

    Args:
        name: as in the registry.
        about: one line for `remend tasks ls`.
        make: one row from a Draw, without `id`: prompt, demonstration, and answer or golden_answer. Splits share no
            item. None for a task whose rows come from a file or a data set.
        grader: (response, row, mode) → Grade.
        columns: what a row must have to be asked and graded.
        letters: whether the row is a choice whose options stand at the end of its prompt, as lines "A: …", "B: …".
        max_new_tokens: tokens an answer by default: the longest golden answers with room for a thought.
        graded_rows: held-out rows that are made for an evaluation by default; 200 give ±7 points at a score of 50%.
        convert: the rows of this task that a row of its public data set gives; a row in the task's own columns is
            given back as it is.
    """

    name: str
    about: str
    make: Make | None
    grader: Grader
    columns: tuple[str, ...] = ("prompt",)
    letters: bool = False
    max_new_tokens: int = 256
    graded_rows: int = 200
    convert: Convert | None = None

    def rows(self, split: str, n: int, seed: int = 0) -> list[JsonObject]:
        """`n` rows with distinct prompts; the first rows are the same for every n.

        Args:
            split: train or held_out; no item of one is in the other, whatever the seeds.
            n: 1 or more.
            seed: other seeds give other rows.

        Returns:
            Rows with `id`, `prompt` (a text), `demonstration`, `answer` or `golden_answer`, as remend.data reads them.

        Raises:
            InputError: split or n is not allowed, the task makes no rows, or the split has no n distinct rows.
            FileError: a package that the task computes its facts from is not installed.
        """
        if split not in SPLITS:
            raise InputError(f'split is "{split}"; allowed: {", ".join(SPLITS)}.{did_you_mean(split, SPLITS)}')
        if n < 1:
            raise InputError(f"n is {n}; allowed is 1 or more rows")
        if self.make is None:
            other = f". A task that makes rows is {self.name}-short" if f"{self.name}-short" in TASKS.names() else ""
            raise InputError(
                f"{self.name} makes no rows of its own: its rows are lines of a data file, or a data set of the "
                f"hub{other}"
            )
        made: dict[str, JsonObject] = {}
        for index in range(n):
            for attempt in range(TRIES):
                row = self.make(Draw(self.name, split, seed, index, attempt))
                if row["prompt"] not in made:
                    break
            else:
                raise InputError(f"{self.name} has no {n} distinct rows of {split}: after {index} it found no new one")
            made[row["prompt"]] = {"id": row_id(row), **row}
        return list(made.values())

    def load(self, source: str) -> list[Example]:
        """Rows from a file or data set, in the task's own columns or in those of its public data set.

        Raises InputError and FileError as remend.data.examples.load_examples does.
        """
        return load_examples(source, self.convert)

    def check(self, row: object, where: str | None = None) -> None:
        """Raises InputError that starts with `where` (else the row's id) when a column or a usable prompt is missing.

        What stands in the answer's column is the grader's to judge; for scoring by letters, call `gold` beforehand.
        """
        if not isinstance(row, Mapping):
            raise InputError(f"{where or 'the row'}: a row must be an object, got {type(row).__name__}")
        where = where or name_of(row)
        require(row, self.columns, where)
        example_of(row, where)

    def messages(self, row: Row) -> list[JsonObject]:
        """The prompt as chat messages, just as the row has them; a text is one user's message.

        Raises InputError when the row has no usable prompt.
        """
        prompt = example_of(row, name_of(row)).prompt
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]

    def id(self, row: Row) -> str:
        """The row's own id, else `row_id`: 12 hex digits of the SHA-256 of its canonical prompt and answer."""
        return str(row["id"]) if row.get("id") is not None else row_id(row)

    def options(self, row: Row) -> dict[str, str]:
        """Letter → text of each option, in order.

        Raises InputError when this is no choice, or fewer than two options can be read from the prompt.
        """
        where = name_of(row)
        if not self.letters:
            raise InputError(f"{where}: this task is no choice between letters; score it by generation")
        prompt = example_of(row, where).prompt
        text = prompt if isinstance(prompt, str) else text_of(prompt[-1])
        options = _options_of(text)
        if len(options) < 2:
            raise InputError(f'{where}: the prompt has no options as lines "A: …", "B: …": {shorten(text[-160:])}')
        return options

    def choices(self, row: Row) -> list[str]:
        """The letters that a row lets one choose from, in order: what answer-letter log-likelihood compares.

        Raises InputError as `options`.
        """
        return list(self.options(row))

    def gold(self, row: Row) -> str:
        """The right letter. Raises InputError as `options`, or when the answer is none of the row's letters."""
        where, options = name_of(row), self.options(row)
        require(row, self.columns, where)
        answer = row["answer"]
        if not isinstance(answer, str) or answer not in options:
            raise InputError(f"{where}: the answer is {shorten(answer)}; the prompt's options are {', '.join(options)}")
        return answer

    def grade(self, response: str, row: Row, mode: str = "paper") -> Grade:
        """Whether `response` solves `row`.

        Args:
            response: the model's completion as text, without special tokens.
            row: one line of the task's data.
            mode: paper grades as the SDFT authors (arXiv 2601.19897) do, robust forgives what is only form.

        Raises:
            InputError: another mode, a response that is no text, or a row without a usable answer.
        """
        require_mode(mode)
        if not isinstance(response, str):
            raise InputError(f"the response must be a text, got {type(response).__name__}")
        return self.grader(response, row, "paper" if mode == "paper" else "robust")


TASKS: Registry[Task] = Registry("task")


def require_mode(mode: str) -> None:
    """Raises InputError when `mode` is none of MODES."""
    if mode not in MODES:
        raise InputError(f'mode is "{mode}"; allowed: {", ".join(MODES)}.{did_you_mean(mode, MODES)}')


def row_id(row: Row) -> str:
    """12 hex digits of the SHA-256 of the canonical prompt and answer (golden_answer where there is one).

    Raises InputError when the row has no usable prompt.
    """
    prompt = prompt_key(example_of(row, "the row").prompt)
    answer = row["golden_answer"] if "golden_answer" in row else row.get("answer")
    canonical = f"{prompt}\n{json.dumps(answer, sort_keys=True, ensure_ascii=False)}"
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def name_of(row: Row) -> str:
    """'row 0c33…' by the row's id, or 'the row' where it has none and none can be made."""
    if row.get("id") is not None:
        return f"row {row['id']}"
    try:
        return f"row {row_id(row)}"
    except (InputError, TypeError, ValueError):
        return "the row"


def require(row: Row, columns: Sequence[str], where: str) -> None:
    """Raises InputError that starts with `where` and names the first column that is missing or null."""
    for column in columns:
        if row.get(column) is None:
            raise InputError(
                f'{where}: the column "{column}" is missing (it has: {", ".join(map(str, row)) or "nothing"}); '
                f"rows of this task need {', '.join(columns)}"
            )


def shorten(value: object) -> str:
    """One line of at most 160 characters for a reason; what is no text is written as JSON."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be stored
    return text if len(text) <= 160 else f"{text[:159]}…"


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
