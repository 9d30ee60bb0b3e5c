"""What a task is: seeded rows of two splits, and a grader in two modes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeVar, get_args

from remend.data.examples import example_of, prompt_key
from remend.errors import InputError, did_you_mean
from remend.registry import Registry

Mode = Literal["paper", "robust"]
Split = Literal["train", "held_out"]
MODES: tuple[str, ...] = get_args(Mode)
SPLITS: tuple[str, ...] = get_args(Split)
TRIES = 200
"""Draws for a row before its split counts as used up."""

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


@dataclass(frozen=True)
class Task:
    """A task under its name.

    Args:
        name: as in the registry.
        about: one line for `remend tasks ls`.
        make: one row from a Draw, without `id`: prompt, demonstration, and answer or golden_answer.
            Splits share no item.
        grader: (response, row, mode) → Grade.
    """

    name: str
    about: str
    make: Callable[[Draw], dict[str, Any]]
    grader: Callable[[str, Mapping[str, Any], Mode], Grade]

    def rows(self, split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
        """`n` rows with distinct prompts; the first rows are the same for every n.

        Args:
            split: train or held_out; no item of one is in the other, whatever the seeds.
            n: 1 or more.
            seed: other seeds give other rows.

        Returns:
            Rows with `id`, `prompt` (a text), `demonstration`, `answer` or `golden_answer`, as remend.data reads them.

        Raises:
            InputError: split or n is not allowed, or the split has no n distinct rows.
            FileError: a package that the task computes its facts from is not installed.
        """
        if split not in SPLITS:
            raise InputError(f'split is "{split}"; allowed: {", ".join(SPLITS)}.{did_you_mean(split, SPLITS)}')
        if n < 1:
            raise InputError(f"n is {n}; allowed is 1 or more rows")
        found: dict[str, dict[str, Any]] = {}
        for index in range(n):
            for attempt in range(TRIES):
                row = self.make(Draw(self.name, split, seed, index, attempt))
                if row["prompt"] not in found:
                    break
            else:
                raise InputError(f"{self.name} has no {n} distinct rows of {split}: after {index} it found no new one")
            found[row["prompt"]] = {"id": row_id(row), **row}
        return list(found.values())

    def grade(self, response: str, row: Mapping[str, Any], mode: str = "paper") -> Grade:
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


def row_id(row: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of the canonical prompt and answer (golden_answer where there is one).

    Raises InputError when the row has no usable prompt.
    """
    prompt = prompt_key(example_of(row, "the row").prompt)
    answer = row["golden_answer"] if "golden_answer" in row else row.get("answer")
    canonical = f"{prompt}\n{json.dumps(answer, sort_keys=True, ensure_ascii=False)}"
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def shorten(value: Any) -> str:
    """One line of at most 160 characters for a reason; what is no text is written as JSON."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be stored
    return text if len(text) <= 160 else f"{text[:159]}…"
