"""Records of a study's cells as `remend study` writes them, with made-up figures of known truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remend.files.signed import signed

PROMPTS = 32
ROWS = 200


def made_record(
    cell: str,
    *,
    how: str = "on-policy",
    teacher: str = "reference",
    stands_on: bool = True,
    scores: dict[str, float] | None = None,
    reference: float | None = None,
    kl: tuple[float, float] = (2.0, 0.5),
    cka: Sequence[Sequence[float]] = (),
    task: str = "tooluse-short",
    recipe: Any = None,
    budget: int | None = None,
    rows: int = ROWS,
) -> dict[str, Any]:
    """A record.

    Args:
        cell: GROUP/METHOD/SEED.
        scores: share of right answers by task; the first is the group's own.
        reference: of the healthy model on that, in a record of the method none.
        kl: per token, before and after.
        cka: of each layer, a row a checkpoint, from the degraded student to the end.
        recipe, budget: of the training.
    """
    group, method, seed = cell.rsplit("/", 2)
    rng = np.random.default_rng([int(seed), *map(ord, group + method)])
    scores = scores or {task: 0.5}
    ids = {name: [f"{name}-{i}" for i in range(rows)] for name in scores}
    tokens = rng.integers(20, 49, size=PROMPTS)
    weights = np.random.default_rng(9).gamma(9.0, 1 / 9, size=PROMPTS)  # the same prompts are hard for all
    before = kl[0] * weights * tokens
    after = kl[1] * weights * tokens * (1 + 0.1 * rng.normal(size=PROMPTS))
    kls = np.linspace(kl[0], kl[1], max(len(cka), 2))
    track = [
        {"step": 10 * i, "stage": "degraded" if i == 0 else "training", "kl": float(kls[i]), "cka": list(row)}
        | {"reference_layers": list(range(len(row)))}
        for i, row in enumerate(cka)
    ]

    def graded(share: float, name: str) -> dict[str, Any]:
        right = np.argsort(np.random.default_rng(11).random(rows) + 0.1 * rng.random(rows)) < round(share * rows)
        part = {"task": name, "grader": "paper", "n": rows, "score": float(right.mean())}
        return {"results": [{**part, "correct": right.astype(int).tolist()}]}

    cost = {"repair": 0.0, "answers": 0.0, "steps": 60.0}
    curve = [{"step": 0, "tokens": 0, "seconds": 0.0, "kl": kl[0]}]
    if method != "none":
        curve.append({"step": 30, "tokens": 3000, "seconds": 60.0, "kl": kl[1]})
    outcome = {
        "kl": {"degraded": kl[0], "recovered": kl[1]},
        "agreement": {"degraded": 0.4, "recovered": 0.7},
        "gap_closed": 1 - kl[1] / kl[0],
        "gap_closed_95": None,
        "steps": 30,
        "tokens_trained": 3000,
        "training_seconds": 60.0,
        "training_seconds_of": cost,
        "peak_rss_mib": 2000.0,
        "constraint": "none",
        "learning_rate": 1e-4,
        "curve": curve,
        "seconds": {"recovery": 90.0, "grading": 30.0},
        "hardware": {"processor": "made up", "cores": 2, "threads": 1, "gpus": [], "memory_gib": 8.0},
        "dtype": "float32",
        "versions": {"torch": "0"},
        "git_commit": "0" * 40,
        "warnings": [],
        "notes": [],
    }
    training = {
        "recipe": recipe or {},
        "how": how,
        "budget": budget,
        **({"teacher": teacher} if teacher != "reference" else {}),
    }
    return {
        "cell": cell,
        "study": "paper-small",
        "settles": {
            "model": "m",
            "damage": [{"kind": "finetune"}, {"kind": "quantize"}] if stands_on else [{"kind": "finetune"}],
            "training": training,
            "grading": {name: {} for name in scores},
        },
        "outcome": outcome,
        "reference_grades": {}
        if reference is None
        else {name: graded(reference if at == 0 else share, name) for at, (name, share) in enumerate(scores.items())},
        "grades": {name: graded(share, name) for name, share in scores.items()},
        "ids": ids,
        "held_out": [
            {"id": f"p{i}", "tokens": int(tokens[i]), "kl_sum_degraded": float(before[i])}
            | {"kl_sum_recovered": float(after[i]), "agree_degraded": int(0.4 * tokens[i])}
            | {"agree_recovered": int(0.7 * tokens[i])}
            for i in range(PROMPTS)
        ],
        "track": track,
        "manifest": {
            "recipe": {"student": group},
            "constraint": "none",
            "models": {"teacher": {"w": "expert" if stands_on else "base"}},
        },
    }


def write_made(folder: Path, *records: dict[str, Any]) -> Path:
    """Sign and write records into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        path = folder / f"{record['cell'].replace('/', '--')}.json"
        path.write_text(json.dumps(signed(record)) + "\n", encoding="utf-8")
    return folder
