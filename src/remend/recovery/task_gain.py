"""Does the teacher solve more of a task when it sees the row's demonstration? The gate's paired measurement."""

from __future__ import annotations

from typing import Any

from remend.data import tasks
from remend.models.sampling.answers import answer
from remend.models.scorer import Scorer
from remend.recovery.prompts import StreamData
from remend.training.teachers.views import Teacher, policy_of

ROWS = 32
TOKENS = 128
"""Held-out rows, and tokens an answer, at most."""


def score_gain(data: StreamData, teacher: Teacher, student: Scorer, tokenizer: Any) -> list[float]:
    """1 for a row that is solved only with its demonstration, −1 for one solved only without, else 0.

    Greedy answers, graded by the stream's task in `robust` mode.
    """
    assert data.stream.task is not None
    task, prompts = tasks.get(data.stream.task), data.held_out[:ROWS]
    model, worn = policy_of(teacher)
    solved: list[list[bool]] = []
    with worn:
        for shown in (False, True):
            title = f"the teacher of {data.stream.name} answers {'with' if shown else 'without'} demonstrations"
            answers = answer(
                model, tokenizer, prompts, title, max_new_tokens=TOKENS, shared=student.shared, shown=shown
            )
            texts = [tokenizer.decode(r.completion, skip_special_tokens=True) for r in answers]
            rows = [data.examples[p.id].row for p in prompts]
            solved.append([task.grade(text, row, mode="robust").correct for text, row in zip(texts, rows, strict=True)])
    return [float(b) - float(a) for a, b in zip(*solved, strict=True)]
