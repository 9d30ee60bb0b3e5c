"""Inputs and commands of the golden comparison: small, but through everything that a recovery does.

Two users: benchmarks/golden.py runs them with old and new code side by side, tests/test_golden.py keeps their figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.task_rows import letter_rows, tool_rows
from helpers.tiny import TOPICS, build_model, build_tokenizer, prompts

KILLED_AT = 6
"""The row of metrics.jsonl before which an interrupted run dies: that of step 5, after the rows of steps 1 to 4 and the
evaluation at step 3. The last checkpoint is that of step 4."""

SHARED: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "warmup_steps": 1,
    "max_new_tokens": 8,
    "held_out": 6,
    "save_every": 2,
    "eval_every": 3,
    "repair_samples": 24,
    "device": "cpu",
    "dtype": "float32",
}
"""Rates and rounds of sampling are the defaults, which are a part of what must not move."""

RECIPES: dict[str, dict[str, Any]] = {
    "grid": {
        "student": "given/int3",
        "teacher": "reference",
        "data": "prompts.jsonl",
        "bootstrap": "repair",
        "diagnose_every": 3,
    },
    "mask": {"student": "given/mask", "teacher": "reference", "data": "prompts.jsonl", "diagnose_every": 2},
    "streams": {
        "student": "given/forgot",
        "streams": {
            "past": {"teacher": "reference", "data": "prompts.jsonl"},
            "task": {"teacher": "ema", "data": "rows.jsonl", "demonstrations": True, "policy": 0.5, "weight": 0.5},
        },
    },
    "cache": {
        "student": "given/int3",
        "streams": {"stored": {"teacher": "given/cache", "policy": "off", "beta": 0.5}},
        "gradient_accumulation": 2,
    },
    "lora": {
        "student": "given/forgot",
        "teacher": "reference",
        "data": "prompts.jsonl",
        "lora": {"rank": 4},
        "bootstrap": "auto",
    },
}

DEGRADE = {
    "int3": "degrade quantize reference --format int3-g64",
    "int4": "degrade quantize reference --format int4-g32-sym",
    "gptq": "degrade quantize reference --format gguf:q4_0 --method gptq --data prompts.jsonl",
    "mask": "degrade prune reference --method wanda --sparsity 2:4 --data prompts.jsonl",
    "depth": "degrade prune reference --method depth --layers 1 --data prompts.jsonl",
    "width": "degrade prune reference --method width --ffn 0.25 --data prompts.jsonl",
    "forgot": "degrade finetune reference --data rows.jsonl --steps 6 --learning-rate 1e-3",
    "cache": "cache-teacher reference --data prompts.jsonl --k 16 --max-new-tokens 8",
}
"""What makes the students and the cached teacher; `--out` is added."""


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(directory: Path) -> None:
    """A healthy tiny model, prompts, rows with demonstrations and task rows; by no code of the package."""
    tokenizer = build_tokenizer()
    build_model(len(tokenizer), layers=3).save_pretrained(directory / "reference")
    tokenizer.save_pretrained(directory / "reference")
    _lines(directory / "prompts.jsonl", [{"prompt": text} for text in prompts()])
    facts = [f"Say one word about {TOPICS[i % len(TOPICS)]} and {i}." for i in range(24)]
    rows = [{"prompt": f, "demonstration": f"{TOPICS[i % len(TOPICS)]} is good."} for i, f in enumerate(facts)]
    _lines(directory / "rows.jsonl", rows)
    _lines(directory / "tools.jsonl", tool_rows(10))
    _lines(directory / "letters.jsonl", letter_rows(12))


def write_recipes(directory: Path) -> None:
    """One file a recipe; JSON is YAML."""
    for name, settings in RECIPES.items():
        text = json.dumps({**SHARED, **settings, "out": f"runs/{name}"}, indent=1)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
