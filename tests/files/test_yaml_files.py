"""YAML of a stranger's: refused at once where a key stands twice, or where it would grow or nest without end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from remend.errors import InputError
from remend.files.yaml_files import read_yaml, yaml_of

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 10\nseed: 1\nsteps: 20", 'the key "steps" stands in line 1 and in line 3'),
        ("lora: {rank: 4, rank: 8}", 'the key "rank" stands in line 1 and in line 1'),
        (BOMB, r"its references \(\*name\) stand for more than 100000 values"),
        ("a: &a [*a]", "or for themselves"),
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("a: " + "{b: " * 1000, "nested more than 50 deep"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2001-99-99", "month must be in"),
        ("a: '" + "x" * 2**21 + "'", "2097152 are the most that is read"),
    ],
    ids=lambda text: text[:16],
)
def test_refused_quickly(text: str, message: str, tmp_path: Path) -> None:
    began = time.monotonic()
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"recipe .*r\.yaml is not valid YAML: .*{message}") as caught:
        read_yaml(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - began < 5


def test_what_a_recipe_may_hold(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfbase: &b {rank: 4, alpha: 8}\nlora: {<<: *b, rank: 2}\n")
    assert read_yaml(tmp_path / "r.yaml") == {"base": {"rank": 4, "alpha": 8}, "lora": {"rank": 2, "alpha": 8}}
    assert yaml_of("") is None


@pytest.mark.parametrize(
    "text",
    [
        'student: "\\UFFFFFFFF"',
        'steps: !!int ""',
        '? !!seq ""\n: 1',
        "a: !!bool x",
        "a: " + ":".join(["1", *["59"] * 400]) + ".5",
        'a: !!timestamp "x"',
        "a: !!set [a]",
    ],
)
def test_a_value_that_can_t_be_made_is_one_message(text: str) -> None:
    with pytest.raises(InputError):
        yaml_of(text)


def test_words_that_yaml_takes_for_truth_values_are_words_as_keys() -> None:
    assert yaml_of("{on: forgetting, no: 1, bootstrap: on}") == {"on": "forgetting", "no": 1, "bootstrap": True}
    with pytest.raises(InputError, match='the key "on" stands in line 1 and in line 2'):
        yaml_of("on: 1\non: 2\n")
