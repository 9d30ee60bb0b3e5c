"""general: follow instructions that a program can verify, in the manner of IFEval (arXiv 2311.07911).

Prompts are made here, from this project's own topics (topics.py) and kinds of checks (checks.py), one to three
compatible ones a prompt. A row looks like this:

    {"prompt": "Explain why ice floats. Use at most 90 words. Begin with exactly these words: \\"Let me explain …",
     "checks": [{"kind": "words_at_most", "n": 90}, {"kind": "starts_with", "text": "Let me explain this"}],
     "topic": "Explain why ice floats."}

A response is right when it follows all checks. The mode `paper` is IFEval's strict criterion, `robust` its loose one:
each check may also be met by the response without its first or last line or without asterisks, and what stands before
the last `</think>` is not read. Only the form is graded: nothing here tells whether the answer is true.
"""

from __future__ import annotations

from random import Random

from remend.data.examples import Row
from remend.data.tasks.checks import CHECKS, Check, compatible, describe, holds, holds_loosely, read_check
from remend.data.tasks.task import TASKS, Draw, Grade, Mode, Task, name_of, require
from remend.data.tasks.topics import TOPICS, Topic
from remend.errors import InputError
from remend.files.atomic import JsonObject


def make(draw: Draw) -> JsonObject:
    """One row: a topic and one to three checks; topics, kinds of the first check and counts take turns."""
    rng = draw.random()
    topics = TOPICS[draw.split]
    topic = rng.choice(topics) if draw.attempt else draw.turn(topics, "topic")  # a kind without arguments soon repeats
    kinds = [draw.turn(CHECKS.names(), "kind")]
    count = draw.turn((1, 2, 2, 3, 3), "count")
    while len(kinds) < count:
        fitting = [name for name in CHECKS.names() if compatible([*kinds, name])]
        if not fitting:
            break
        kinds.append(rng.choice(fitting))
    items = [draw_check(name, rng, topic) for name in kinds]
    return {
        "prompt": " ".join([topic.request, *(describe(item) for item in items)]),
        "checks": items,
        "topic": topic.request,
    }


def draw_check(name: str, rng: Random, topic: Topic) -> Check:
    """A check of a kind with arguments that fit a topic. Raises InputError that lists the known kinds."""
    return {"kind": name, **CHECKS.get(name).draw(rng, topic.words)}


def checks_of(row: Row) -> list[Check]:
    """The row's checks, validated. Raises InputError that names the row and what is wrong with it."""
    where = name_of(row)
    require(row, ("checks",), where)
    items = row["checks"]
    if not isinstance(items, list) or not items:
        raise InputError(f"{where}: checks must be a list with at least one check, got {items!r:.80}")
    for item in items:
        try:
            read_check(item)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return items


def grade_general(response: str, row: Row, mode: Mode) -> Grade:
    """Right when all of row["checks"] are followed: strictly (paper) or loosely (robust); see the module.

    Raises InputError as `checks_of`.
    """
    items = checks_of(row)
    strict = [holds(response, item) for item in items]
    answer = response.rpartition("</think>")[2]
    followed = strict if mode == "paper" else [holds_loosely(answer, item) for item in items]
    if all(followed):
        return Grade(True, "correct" if all(strict) else "correct; only by the loose criterion")
    if not response.strip():
        return Grade(False, "the response is empty")
    missed = " ".join(describe(item) for item, ok in zip(items, followed, strict=True) if not ok)
    return Grade(False, f"{len(items) - sum(followed)} of {len(items)} not followed: {missed}")


TASKS.register("general", source="checks after IFEval, arXiv 2311.07911; prompts are invented")(
    Task(
        "general",
        "follow instructions that a program can verify",
        make,
        grade_general,
        columns=("prompt", "checks"),
        max_new_tokens=400,
        graded_rows=360,
    )
)
