"""Rows that Python hands over where settings name a file.

What a verb writes must be enough to run it again, so such rows become JSON lines in what it writes, and its settings
name that file. Until it is written, the rows are read from memory under the file's name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from remend.errors import InputError
from remend.files.atomic import write_text

KEYS = ("data", "eval_data", "repair_text")
"""The settings that may hold rows."""


@dataclass(frozen=True)
class Table:
    """name: the setting that held the rows; lines: the rows as JSON, one a line."""

    name: str
    lines: Sequence[str]


_tables: ContextVar[dict[str, Table] | None] = ContextVar("given rows", default=None)


@contextmanager
def rows_from_python() -> Iterator[None]:
    """Inside, `as_files` may take rows; outside they are forgotten. Inside another one, the rows are shared."""
    if _tables.get() is not None:
        yield
        return
    token = _tables.set({})
    try:
        yield
    finally:
        _tables.reset(token)


def as_files(values: Mapping[str, Any], file: Callable[[str], Path]) -> dict[str, Any]:
    """Settings with the names of files where they hold rows, also those of each stream, and by task in `data`.

    Args:
        values: of a verb. Rows are a list of mappings, or a `datasets.Dataset` or split.
        file: gives the file for the rows of a setting, from the setting's name.

    Raises:
        InputError: a row holds what JSON has no form for, or a data set of several splits was given.
    """
    taken = _taken(values, file, "")
    streams = taken.get("streams")
    if isinstance(streams, Mapping):
        taken["streams"] = {
            name: _taken(stream, file, f"{name}-") if isinstance(stream, Mapping) else stream
            for name, stream in streams.items()
        }
    return taken


def table_at(source: str) -> Table | None:
    """The rows that were handed over for this file."""
    return (_tables.get() or {}).get(source)


def write_rows(out: Path, directory: Path | None = None) -> None:
    """Write all rows that were handed over for files in or beside `out`.

    directory: the temporary one that becomes `out`, where it is made as a whole.
    """
    for name, table in (_tables.get() or {}).items():
        path = Path(name)
        target = directory / path.relative_to(out) if directory else path
        write_text(target, "".join(f"{line}\n" for line in table.lines))


def _taken(values: Mapping[str, Any], file: Callable[[str], Path], prefix: str) -> dict[str, Any]:
    taken = dict(values)
    for key in KEYS:
        value = taken.get(key)
        if isinstance(value, Mapping) and not _split_names(value):  # by task
            taken[key] = {task: _name(rows, f"{task}-{key}", file) for task, rows in value.items()}
        elif key in taken:
            taken[key] = _name(value, prefix + key, file)
    return taken


def _name(value: Any, name: str, file: Callable[[str], Path]) -> Any:
    """The file's name where the value is rows, else the value."""
    rows = _rows(value, name)
    if rows is None:
        return value
    tables = _tables.get()
    assert tables is not None, "rows are taken inside rows_from_python alone"
    path = str(file(name))
    tables[path] = Table(name, [_line(row, f"{name}[{i}]") for i, row in enumerate(rows)])
    return path


def _rows(value: Any, name: str) -> Sequence[Any] | None:
    if splits := _split_names(value):
        split = "train" if "train" in splits else splits[0]
        if len(splits) > 1 and split != "train":
            raise InputError(f'{name} has the splits {", ".join(splits)}; give one of them, as data["{split}"]')
        value = value[split]
    datasets = sys.modules.get("datasets")  # whoever has one of its objects has imported it
    if datasets and isinstance(value, datasets.Dataset):
        from remend.data.sources import without_nulls

        return [without_nulls(row) for row in value]
    if datasets and isinstance(value, datasets.IterableDataset):
        raise InputError(f"{name} is a data set that may not end; give some of its rows, as list({name}.take(1000))")
    if isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value):
        return value
    return None


def _split_names(value: Any) -> list[str]:
    datasets = sys.modules.get("datasets")
    return list(value) if datasets and isinstance(value, datasets.DatasetDict) else []


def _line(row: Any, where: str) -> str:
    try:
        line = json.dumps(row, ensure_ascii=False, default=_as_json)
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: the row holds what JSON has no form for: {error}") from None
    return line


def _as_json(value: Any) -> Any:
    """Numbers and tables of numpy and torch as plain ones, dates as texts."""
    if isinstance(value, date | time):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
