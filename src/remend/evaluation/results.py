"""From answers to graded items and scores: the parts of a results file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from remend.data import tasks
from remend.data.examples import Row
from remend.errors import FileError, InputError
from remend.evaluation import letters
from remend.evaluation.rows import Material
from remend.files.atomic import JsonObject
from remend.files.reading import read_object
from remend.maths.paired import score_interval

Answer = JsonObject
"""A line of the answers' file: answer (a text), tokens, clipped."""


NAMED = 20
"""Rows that a note names."""


def pass_at(n: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` answers is right, from `n` answers of which `correct` are (k ≤ n).

    1 − C(n − c, k) / C(n, k): the unbiased estimator of arXiv 2107.03374, equation 1.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise InputError(f"got {correct} correct of {n} answers and k {k}; allowed: 0 ≤ correct ≤ n and 1 ≤ k ≤ n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def generated(material: Material, answers: Sequence[Sequence[Answer]], mode: str) -> JsonObject:
    """Grade generated answers in one mode: for each row its samples, one or more, as many for each.

    Returns:
        task, grader, how, what `scored` gives, raised, empty, clipped, mean_tokens, and items. With one answer a row:
        items {id, correct, reason, answer, tokens, clipped}. With several: pass_at {"1": …, "2": …, "4": …, … up to
        all}, and items {id, correct: the share of right answers (pass@1), correct_count, samples, answers: [{correct,
        reason, answer, tokens, clipped}]}.
    """
    table, count = material.table, len(answers[0])
    graded = [
        tasks.score(table.task, material.rows, [row[at]["answer"] for row in answers], mode=mode) for at in range(count)
    ]
    items = []
    for number, (prompt, row, given) in enumerate(zip(material.prompts, material.rows, answers, strict=True)):
        each = [
            {"correct": scores["items"][number]["correct"], "reason": scores["items"][number]["reason"]}
            | {key: answer[key] for key in ("answer", "tokens", "clipped")}
            for scores, answer in zip(graded, given, strict=True)
        ]
        right = sum(bool(one["correct"]) for one in each)
        several = {"correct": right / count, "correct_count": right, "samples": count, "answers": each}
        items.append({"id": prompt.id, **_cluster(material, row), **(each[0] if count == 1 else several)})
    every = [answer for row in answers for answer in row]
    part: JsonObject = {"task": table.task.name, "grader": mode, "how": "generate", **scored(items)}
    if count > 1:
        part["pass_at"] = {
            str(k): sum(pass_at(count, item["correct_count"], k) for item in items) / len(items) for k in _ks(count)
        }
    part |= {
        "raised": sum(scores["raised"] for scores in graded),
        "empty": sum(not answer["answer"].strip() for answer in every),
        "clipped": sum(bool(answer["clipped"]) for answer in every),
        "mean_tokens": sum(answer["tokens"] for answer in every) / len(every),
    }
    return {**part, "items": items}


def raised_note(part: JsonObject) -> str:
    """Which rows the grader of a part raised on, and why on the first, in one line."""
    rows = {
        item["id"]: one["reason"]
        for item in reversed(part["items"])
        for one in item.get("answers", [item])
        if one["reason"].startswith(tasks.RAISED)
    }
    names = list(reversed(rows))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    total = part["n"] * part["items"][0].get("samples", 1)
    return (
        f"{part['task']}: the {part['grader']} grader raised on {part['raised']} of {total} answers, which count as "
        f"wrong; rows {', '.join(names[:NAMED])}{more}; first, {rows[names[0]]}"
    )


def scored(items: Sequence[JsonObject]) -> JsonObject:
    """n, score (mean of `correct`), interval_95 and its method, as `remend compare` gives them."""
    clusters = [item["cluster"] for item in items] if "cluster" in items[0] else None
    mean = score_interval([float(item["correct"]) for item in items], clusters)
    rest = {"interval_95": mean["interval"], "interval_method": mean["method"]}
    return {"n": len(items), "score": mean["score"], **rest}


def _ks(count: int) -> list[int]:
    return sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})


def _cluster(material: Material, row: Row) -> JsonObject:
    """`cluster` for compare, where every row names one."""
    return {"cluster": row["cluster"]} if all(r.get("cluster") is not None for r in material.rows) else {}


def chosen(material: Material, answers: Sequence[JsonObject], seed: int) -> JsonObject:
    """Grade letters by their log-likelihoods; see `letters.item` and `letters.summary`."""
    task = material.table.task
    items = [
        letters.item(prompt.id, task.gold(row), answer["log_likelihoods"]) | _cluster(material, row)
        for prompt, row, answer in zip(material.prompts, material.rows, answers, strict=True)
    ]
    about = {"task": material.table.task.name, "grader": letters.GRADER, "how": "choices", "lead": letters.LEAD}
    return {**about, **scored(items), **letters.summary(items, seed), "items": items}


def plain(value: JsonObject) -> JsonObject:
    """As JSON gives it back: tuples are lists."""
    content: JsonObject = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False))
    return content


def finished(out: Path, same: JsonObject) -> JsonObject | None:
    """The results that `out` holds already, None where it does not exist.

    Raises InputError when it is something else than the results of these settings: nothing is overwritten.
    """
    if not out.exists():
        return None
    try:
        content = read_object(out)
        differing = [key for key, value in plain(same).items() if content[key] != value]
    except (FileError, KeyError, TypeError):
        raise InputError(f"out {out} exists and holds no results of this command; name a new file") from None
    if differing:
        raise InputError(
            f"out {out} holds results that differ in {', '.join(differing)}; name a new file, or remove it. "
            "Answers that still fit are kept beside it and are not asked again"
        )
    return dict(content)
