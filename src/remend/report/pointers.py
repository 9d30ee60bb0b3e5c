"""Where a sentence's numbers stand: JSON pointers (RFC 6901) into diagnosis.json, and what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remend.files.atomic import JsonRow
from remend.report.page import Claim


def resolve(data: object, pointer: str) -> object:
    """What a JSON pointer names. Raises LookupError where nothing is there."""
    at = data
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, Mapping):
            at = at[key]
        elif isinstance(at, Sequence) and not isinstance(at, str) and key.isdigit():
            at = at[int(key)]
        else:
            raise LookupError(pointer)
    return at


def value_text(value: object) -> str:
    """A short text for any value: numbers to 4 digits, short lists whole, long ones by their length."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        short = len(value) <= 4 and not any(isinstance(item, (list, tuple, Mapping)) for item in value)
        return ", ".join(map(value_text, value)) if short else f"a list of {len(value)}"
    return f"an object of {len(value)}" if isinstance(value, Mapping) else str(value)


def traced(sentence: JsonRow, student: JsonRow, prefix: str) -> Claim:
    """A sentence of a student's part with the values at its pointers; prefix: the part's own pointer in the file."""
    rests = []
    for pointer in sentence["rests_on"]:
        try:
            said = value_text(resolve(student, pointer))
        except LookupError:
            said = "not in the file"
        rests.append((prefix + pointer, said))
    return Claim(sentence["text"], rests)
