"""Where rows come from: JSON lines, JSON, CSV, parquet and arrow files, folders of splits, ids of the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from remend.data.given import table_at
from remend.errors import FileError, InputError, did_you_mean
from remend.files.reading import MOST_BYTES, require_finite

Placed = tuple[str, Any]
"""Where a value stands ('file:line'), and the value as JSON gave it."""

SHOWN = 20
"""Bad rows that one message names at most."""

COLUMNS = ("prompt", "completion", "demonstration", "messages", "tools", "id", "text", "chat_template_kwargs")
"""What a mapping of columns may give."""

Columns = Mapping[str, str]
"""For a column that remend reads, the data's own name of it."""


def _columns(value: object) -> object:
    """A mapping of columns as a command line gives it: 'prompt=question,completion=answer'."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise ValueError("allowed: pairs like prompt=question,completion=answer, or a mapping of them")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


ColumnsSetting = Annotated[dict[str, str], BeforeValidator(_columns)]
"""`Columns` as a setting: a mapping, or a text of pairs."""

COLUMNS_HELP = "which columns of the data to read, where they have other names: prompt=question,completion=answer"

_HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<configuration>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)

ALLOWED = (
    "a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; the text ones also as .gz), a folder of such files or one of "
    "datasets' save_to_disk, either with :SPLIT, or an id of the hub, org/name[/configuration][@revision][:split]"
)


@dataclass
class Problems:
    """What is wrong with rows, gathered so that one message can name all of them."""

    lines: list[str]

    def raise_all(self) -> None:
        """Raise one InputError for them: a line for each reason, at most SHOWN, with SHOWN places each at most."""
        if not self.lines:
            return
        reasons: dict[str, list[str]] = {}
        for line in self.lines:
            place, _, reason = line.partition(": ")
            reasons.setdefault(reason, []).append(place)
        said = [_placed(places, reason) for reason, places in reasons.items()]
        more = sum(len(places) for places in list(reasons.values())[SHOWN:])
        raise InputError("\n".join(said[:SHOWN]) + (f"\n… and {more} more rows" if more else ""))


def _placed(places: Sequence[str], reason: str) -> str:
    """'p.csv:2: …', or of several rows that lack the same 'p.csv:2, 3 and 5: …'."""
    first, *others = places
    shown = [re.split(r"[:,\[]\s*", place)[-1].rstrip("]") for place in others[: SHOWN - 1]]
    hidden = len(others) - len(shown)
    if hidden:
        return f"{first}, {', '.join(shown)} and {hidden} more rows: {reason}"
    return f"{', '.join([first, *shown[:-1]])} and {shown[-1]}: {reason}" if shown else f"{first}: {reason}"


def read_rows(source: str, columns: Columns | None = None) -> list[Placed]:
    """The rows of a source of any known kind, with the place of each.

    Args:
        source: see ALLOWED.
        columns: the data's names for columns that are read under another one; see COLUMNS.

    Raises:
        FileError: it can't be read or fetched.
        InputError: it is of another kind or has no rows; or a row is broken, or lacks a column: up to SHOWN are named.
    """
    for name in columns or {}:
        if name not in COLUMNS:
            raise InputError(
                f'columns can\'t give "{name}".{did_you_mean(name, COLUMNS)} Known: {", ".join(COLUMNS)}; each with '
                "the data's own name, as in {prompt: question, completion: answer}"
            )
    rows = _read(source)
    if not rows:
        raise InputError(f"data {source} is empty; it needs rows with a prompt")
    return _renamed(rows, columns) if columns else rows


def _renamed(rows: Sequence[Placed], columns: Columns) -> list[Placed]:
    renamed, problems = [], Problems([])
    for where, row in rows:
        missing = [theirs for theirs in columns.values() if not isinstance(row, Mapping) or theirs not in row]
        if missing:
            has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            problems.lines.append(f'{where}: columns names "{missing[0]}", and the row has: {has or "nothing"}')
            continue
        left = {key: value for key, value in row.items() if key not in columns.values()}
        renamed.append((where, {**left, **{ours: row[theirs] for ours, theirs in columns.items()}}))
    problems.raise_all()
    return renamed


def _read(source: str) -> list[Placed]:
    if table := table_at(source):
        return [(f"{table.name}[{i}]", json.loads(line)) for i, line in enumerate(table.lines)]
    path, split = Path(source), None
    if not path.exists() and ":" in source:
        folder, _, name = source.rpartition(":")
        if Path(folder).is_dir():
            path, split = Path(folder), name
    if path.is_dir():
        return _folder(path, split)
    match = _HUB.fullmatch(source)
    if path.exists() or not match or _kind(path) in READERS:
        reader = READERS.get(_kind(path))
        if reader is None and path.is_file() and _kind(path) in PLAIN and not _opened(path).lstrip().startswith("{"):
            raise InputError(
                f"data file {path} is plain text, and nothing says where a prompt ends; give a CSV file with the "
                'header prompt, or JSON lines: {"prompt": "…"}, or {"text": "…"} for text that is to be continued'
            )
        if reader is None and path.exists() and path.suffix in OTHERS:
            raise InputError(f"data file {path}: {OTHERS[path.suffix]}. What is read: {ALLOWED}")
        return (reader or read_lines)(path)
    return _hub(source, match)


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, below a .gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _opened(path: Path, what: str = "data") -> str:
    """The text of a file, plain or gzipped, UTF-8 with or without a mark at its start."""
    try:
        require_finite(path)
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            raw = stream.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise InputError(
                f"{what} file {path} holds over {MOST_BYTES // 2**20} MiB of text, which is more than is read at once; "
                "give a part of it"
            )
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} file {path} is not UTF-8 text: {error.reason} at byte {error.start}. What is read: {ALLOWED}"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileError(f"{what} file {path} is no whole gzip file: {error}") from None
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{what} file {path} can't be read: {error.strerror}") from None


def read_lines(path: Path, what: str = "data") -> list[Placed]:
    """('file:line', parsed value) for every non-empty line of a JSON lines file, plain or gzipped.

    Raises FileError, and InputError that names up to SHOWN lines that are no JSON.
    """
    rows, problems = [], Problems([])
    for number, line in enumerate(_opened(path, what).split("\n"), start=1):
        # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            problems.lines.append(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            problems.lines.append(f"{path}:{number}: {_beyond(error)}")
    problems.raise_all()
    return rows


def _beyond(error: ValueError | RecursionError) -> str:
    """What JSON may hold and can't be read."""
    deep = isinstance(error, RecursionError)
    what = "lists or objects nested too deeply" if deep else "a whole number of too many digits"
    return f"the row holds {what} to be read; take it out, or write it as a text"


def _json(path: Path) -> list[Placed]:
    """The objects of a .json file that is one list of them; else its lines."""
    try:
        values = json.loads(_opened(path))
    except json.JSONDecodeError:
        return read_lines(path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {_beyond(error)}") from None
    if not isinstance(values, list):
        return read_lines(path)
    return [(f"{path}, {i}", value) for i, value in enumerate(values, start=1)]


def _table(path: Path, separator: str) -> list[Placed]:
    """The rows of a CSV file with a header. Every value is the text that stands there; an empty one is left out."""
    reader = csv.reader(io.StringIO(_opened(path), newline=""), delimiter=separator, strict=True)
    rows, problems = [], Problems([])
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"data file {path}: two columns of its header have one name: {', '.join(header)}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                problems.lines.append(
                    f"{where}: the row has {len(cells)} values and the header {len(header)} columns; put quotes around "
                    "values with commas or line breaks"
                )
                continue
            rows.append((where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    problems.raise_all()
    return rows


def _parquet(path: Path) -> list[Placed]:
    from pyarrow import parquet

    require_finite(path)
    try:
        return _numbered(str(path), parquet.read_table(path).to_pylist())
    except Exception as error:  # the library raises many kinds, of names that are no text and times beyond any too
        raise FileError(f"data file {path} is no parquet file that can be read: {_short(error)}") from None


def _arrow(path: Path) -> list[Placed]:
    from pyarrow import OSFile, Table, ipc

    require_finite(path)
    try:
        with OSFile(str(path)) as stream:  # not mapped: what leads outside the file would end the process
            magic = stream.read(6)
            stream.seek(0)
            table: Table = (ipc.open_file(stream) if magic == b"ARROW1" else ipc.open_stream(stream)).read_all()
        table.validate(full=True)
        return _numbered(str(path), table.to_pylist())
    except Exception as error:  # as above
        raise FileError(f"data file {path} is no arrow file that can be read: {_short(error)}") from None


READERS: dict[str, Callable[[Path], list[Placed]]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": _json,
    ".csv": lambda path: _table(path, ","),
    ".tsv": lambda path: _table(path, "\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""Readers by suffix; a file of another name is taken for JSON lines."""

PLAIN = (".txt", ".text", ".md")

OTHERS = {".zip": "unpack it first", ".xz": "unpack it first", ".zst": "unpack it first", ".xlsx": "save it as CSV"}
"""What can't be JSON lines, by suffix."""


MOST_FILES = 10_000
"""That a folder of data may hold, whatever they are: one with more is a home or a whole disk."""


def _folder(path: Path, split: str | None) -> list[Placed]:
    """One split of what datasets' save_to_disk wrote, or of a folder of files that are named by split."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if len(list(islice(path.rglob("*"), MOST_FILES + 1))) > MOST_FILES:
        raise FileError(f"data {path} is a folder with over {MOST_FILES:,} files; name the data's own")
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not saved and not any(_kind(p) in READERS for p in path.rglob("*") if p.is_file() and p.name != "state.json"):
        raise FileError(f"data {path} is a folder without data files. What is read: {ALLOWED}")
    for file in [path for path in path.rglob("*.arrow") if not path.is_dir()]:
        _arrow(file)  # datasets maps it into memory, whatever stands in it
    place = str(path.resolve())  # the library takes "." for no name
    try:
        with _without_bars():
            data = load_from_disk(place) if saved else load_dataset(place)
    except Exception as error:  # as above
        raise FileError(f"data folder {path} can't be read: {_short(error)}") from None
    if not isinstance(data, DatasetDict):
        if split not in (None, "train"):
            raise InputError(f'data folder {path} has no split "{split}": it is one data set without splits')
        return _numbered(str(path), data)
    name = split or ("train" if "train" in data or len(data) > 1 else next(iter(data)))
    if name not in data:
        raise InputError(
            f'data folder {path} has no split "{name}"; it has: {", ".join(data)}. Name one as {path}:SPLIT'
        )
    return _numbered(f"{path}:{name}", data[name])


def _hub(source: str, match: re.Match[str]) -> list[Placed]:
    from datasets import load_dataset

    try:
        rows = load_dataset(  # its bars stay: a data set may take minutes to come
            match["name"], match["configuration"], revision=match["revision"], split=match["split"] or "train"
        )
    except Exception as error:  # as above
        raise FileError(
            f'data "{source}": no such file, and as a data set of the hub it can\'t be loaded ({_short(error)}). '
            f"Run with a network, or give other data. What is read: {ALLOWED}"
        ) from None
    return _numbered(source, rows)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of datasets inside: what lies on the disk is read at once."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    before = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if before:
            enable_progress_bar()


def _numbered(source: str, rows: Any) -> list[Placed]:
    """A table's rows. Raises FileError for one that can't be read, as where a text is not UTF-8."""
    placed: list[Placed] = []
    try:
        for number, row in enumerate(rows):
            placed.append((f"{source}:{number}", without_nulls(dict(row))))
    except Exception as error:  # the library decodes as it goes, and raises many kinds
        raise FileError(f"{source}:{len(placed)} can't be read: {_short(error)}") from None
    return placed


def without_nulls(value: Any) -> Any:
    """A table's row as JSON lines would have it: a table fills up with nulls what a row does not have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
