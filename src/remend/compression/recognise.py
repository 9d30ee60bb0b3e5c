"""Students that other tools made: which constraint does a file or directory carry, and can it be held?

Every container is asked (GGUF files, compressed-tensors directories, bitsandbytes nf4, plain directories with a grid
beside them or exact zeros). What transformers opens but none of them knows is refused with the reason, unless it is
taken as dense.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from remend.compression.containers import (
    Recognised,
    container_of,
    held_as_dense,
    packed_by,
    read_record,
    set_to_zero,
    was_pruned,
)
from remend.compression.containers.dense import PLAIN
from remend.files.atomic import JsonObject
from remend.models.find import ModelSource, fetch_model, find_model, require_readable
from remend.models.packed_weights import require_openable
from remend.models.written import RECORD

__all__ = ["PLAIN", "RECORD", "Recognised", "read_record", "recognise", "record_to_keep", "was_pruned"]


def recognise(where: str | Path | ModelSource, *, as_dense: bool = False) -> Recognised:
    """Look at a model's files, not at its name.

    Args:
        where: what `find_model` takes, or its result.
        as_dense: take what can't be held as plain weights instead of refusing it.

    Raises:
        InputError: the weights are packed in a way that no grid here holds (with the reason).
        FileError: a file that can't be read.
    """
    source = where if isinstance(where, ModelSource) else find_model(str(where))
    if source.base:
        return replace(recognise(source.base, as_dense=as_dense), kind="adapter")
    source = fetch_model(source, weights=True)
    container = container_of(source)
    if source.kind == "directory" and source.path:
        require_readable(source.path, source.spec)
    return container.recognise(source, as_dense) if container else _unknown(source, as_dense)


def _unknown(source: ModelSource, as_dense: bool) -> Recognised:
    assert source.path is not None
    require_openable(source.path)
    method = str(packed_by(source))
    reason = f"weights packed by {method} lie on a grid that remend does not hold"
    return held_as_dense(method, source, reason, as_dense)


def record_to_keep(student: ModelSource, held: Recognised) -> JsonObject:
    """The student's `degradation.json` for the model recovered from it; empty where it would no longer be true.

    A student that was taken as dense left its grid or zeros; an adapter's base keeps its record itself.
    """
    record = read_record(student.path) if student.kind == "directory" and student.path else {}
    gone = (record.get("kind") == "quantization" and not held.stored) or (set_to_zero(record) and not held.mask)
    return {} if gone else record
