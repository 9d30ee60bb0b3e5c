"""Numbers that no memory has room for are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import remend
from remend.errors import InputError


@pytest.mark.parametrize(
    "asks",
    [
        lambda out: remend.diagnose("x", "y", out=out, max_new_tokens=10**12),
        lambda out: remend.cache_teacher("x", out, data="y", max_new_tokens=10**12),
        lambda out: remend.write_self_prompts("x", out, n=2, max_new_tokens=10**12),
        lambda out: remend.evaluate("x", "science-short", out=out, samples=10**9),
    ],
)
def test_a_length_or_a_count_beyond_any_use(asks: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1000"):
        asks(tmp_path / "out")
    assert not (tmp_path / "out").exists()
