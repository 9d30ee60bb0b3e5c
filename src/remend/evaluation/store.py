"""Answers as they come, in a JSON lines file beside the results, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remend.errors import FileError
from remend.files.atomic import json_line, write_text, writing


def key_of(*parts: Any) -> str:
    """16 hex digits for whatever an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def answers_path(out: Path) -> Path:
    """results.json → results.answers.jsonl."""
    return out.with_name(f"{out.stem}.answers.jsonl")


class Answers:
    """The file's lines by their `key`. What a killed process left of a last line is taken away.

    Raises FileError when the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Mapping[str, Any]] = {}
        try:
            data = path.read_bytes() if path.is_file() else b""
            whole, _, torn = data.rpartition(b"\n")
            rows = [json.loads(line) for line in whole.decode().split("\n") if line.strip()]
            self._found = {row["key"]: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"the answers of an earlier call in {path} can't be read: {type(error).__name__}: {error}. "
                "Move that file away to begin anew"
            ) from None
        if torn:
            write_text(path, f"{whole.decode()}\n" if whole else "")

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        return self._found[key]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with its `key`. Raises FileError when they can't be written."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(map(json_line, rows)))
        self._found |= {row["key"]: row for row in rows}
