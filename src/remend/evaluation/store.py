"""Answers as they come, in a JSON lines file beside the results, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from remend.errors import FileError
from remend.files.atomic import JsonObject, json_line, write_text, writing


def key_of(*parts: object) -> str:
    """16 hex digits for whatever an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def answers_path(out: Path) -> Path:
    """results.json → results.answers.jsonl."""
    return out.with_name(f"{out.stem}.answers.jsonl")


class Answers:
    """The file's lines by their `key`; see `open_answers`."""

    def __init__(self, path: Path, lines: Mapping[str, JsonObject]) -> None:
        self.path = path
        self._lines = dict(lines)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> JsonObject:
        return self._lines[key]

    def add(self, lines: Sequence[JsonObject]) -> None:
        """Append lines, each with its `key`. Raises FileError when they can't be written."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(map(json_line, lines)))
        self._lines |= {line["key"]: line for line in lines}

    def once(self, key: str, make: Callable[[], JsonObject]) -> JsonObject:
        """The line under `key`; where there is none, what `make` gives is kept there."""
        if key not in self:
            self.add([{"key": key, **make()}])
        return self[key]


def open_answers(path: Path) -> Answers:
    """The answers that are there. What a killed process left of a last line is taken away.

    Raises FileError when the file can't be read.
    """
    try:
        data = path.read_bytes() if path.is_file() else b""
        whole, _, torn = data.rpartition(b"\n")
        lines = [json.loads(line) for line in whole.decode().split("\n") if line.strip()]
        by_key = {line["key"]: line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"the answers of an earlier call in {path} can't be read: {type(error).__name__}: {error}. "
            "Move that file away to begin anew"
        ) from None
    if torn:
        write_text(path, f"{whole.decode()}\n" if whole else "")
    return Answers(path, by_key)
