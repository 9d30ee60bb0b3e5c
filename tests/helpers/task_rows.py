"""Small task files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tool_rows(count: int) -> list[dict[str, Any]]:
    """Rows of unequal length."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Get map {i}. " + "Tell me about it. " * (i % 4)}],
            "golden_answer": [{"Action": "getMap", "Action_Input": json.dumps({"id": i})}],
        }
        for i in range(count)
    ]


def letter_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [
                {"role": "user", "content": f"Number {i}?{' Rain.' * (i % 3)}\n\nA: tea\nB: rain\nC: cats\nD: {i}"}
            ],
            "answer": "ABCD"[i % 4],
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
