"""degradation.json: what `remend degrade` wrote beside a student."""

from __future__ import annotations

from pathlib import Path

from remend.files.atomic import JsonObject, read_json

RECORD = "degradation.json"


def read_record(directory: Path) -> JsonObject:
    """The record in a model's directory; empty where there is none. Raises FileError for one that can't be read."""
    path = directory / RECORD
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def set_to_zero(record: JsonObject) -> bool:
    """Whether a record tells of weights that were set to zero, in share or pattern."""
    # removed layers and channels are pruning too, and a zero in what they leave is one of the reference's own
    smaller = str(record.get("method")).startswith(("depth", "width"))
    return record.get("kind") == "pruning" and not smaller and bool(record.get("sparsity"))


def was_pruned(directory: Path) -> bool:
    """Whether the record beside the weights says that some were set to zero: the zeros are then no grid's accident."""
    return set_to_zero(read_record(directory))
