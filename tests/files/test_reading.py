"""Damaged and hostile JSON: one message that names the file, the line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from remend.errors import FileError, InputError
from remend.files.reading import parsed, read_object, read_objects, read_text, stays_inside, understood

WRONG = {
    '{"a": ': r"not valid JSON: Expecting value \(line 1, column 7\)",
    "[" * 100_000: "nested too deeply",
    '{"a": ' + "9" * 5000 + "}": "a whole number of too many digits",
    r'{"a": "\ud800"}': "half a character",
    "[1]": "it holds a list, and an object belongs there",
    '"x"': "it holds a text",
    "true": "it holds a truth value",
    "null": "it holds null",
    "7": "it holds a number",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:12])
def test_what_is_wrong_is_said_with_file_and_line(text: str, tmp_path: Path) -> None:
    whole, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    whole.write_text(text)
    with pytest.raises(FileError, match=rf"a\.json can't be read: .*{WRONG[text]}.*; copy it again, or make it again"):
        read_object(whole)
    lines.write_text('{"b": 1}\n\n' + text + "\n")
    with pytest.raises(FileError, match=rf"a\.jsonl, line 3, can't be read: .*{WRONG[text]}.*; do this"):
        read_objects(lines, "do this")
    lines.write_text('{"step": 1}\n{"step": 2, "open": NaN}\n')
    with pytest.raises(FileError, match=r"line 2, can't be read: it holds a number that is not finite; do this"):
        read_objects(lines, "do this")


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FileError, match="no UTF-8 text at byte 7; copy it again"):
        read_object(tmp_path / "a")
    with pytest.raises(FileError, match="/dev/zero can't be read: it is a device; give a file"):
        read_text(Path("/dev/zero"))
    with pytest.raises(FileError, match="x … can't be read: File name too long"):
        read_text(Path("x" * 300))
    with pytest.raises(FileError, match="can't be read: embedded null byte"):
        read_text(Path("a\0b"))
    (tmp_path / "bom").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "bom") == {"a": 1}


def test_whole_surrogate_pairs_are_characters() -> None:
    assert parsed(r'"\ud83d\ude00"') == "\U0001f600"


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": 1}\n{"a": 2')
    assert read_objects(tmp_path / "a") == [{"a": 1}]


def test_values_that_are_used_otherwise_than_they_are() -> None:
    value: dict[str, object] = {}
    with pytest.raises(FileError, match=r"x.json can't be understood \(it lacks 'a'\): it is"), understood("x.json"):
        value["a"]
    with pytest.raises(FileError, match=r"\(TypeError: .*\).*; do this"), understood("x.json", "do this"):
        len(7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mine"), understood("x.json"):
        raise InputError("mine")
    with pytest.raises(ZeroDivisionError), understood("x.json"):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/a", "a\\b", "a\0", 7, None])
def test_names_that_lead_out(name: object) -> None:
    assert not stays_inside(name)
    assert stays_inside("model-00001-of-00002.safetensors")
