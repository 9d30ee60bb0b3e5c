"""Registry: register, get, list."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from remend.errors import InputError
from remend.registry import Registry, register_all


def filled() -> Registry[int]:
    table: Registry[int] = Registry("method")
    assert table.register("rtn", source="paper A")(1) == 1
    table.register("gptq", source="paper B")(2)
    return table


def test_get_and_names() -> None:
    table = filled()
    assert table.get("rtn") == 1
    assert table.names() == ["gptq", "rtn"]


def test_decorator_returns_the_function_itself() -> None:
    table: Registry[object] = Registry("function")

    @table.register("f", source="here")
    def f() -> int:
        return 3

    assert f() == 3
    assert table.get("f") is f


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(InputError) as raised:
        filled().get("gptqq")
    assert str(raised.value) == 'unknown method "gptqq"; known: gptq, rtn. Did you mean "gptq"?'


def test_a_name_is_taken_once() -> None:
    table = filled()
    with pytest.raises(ValueError, match='method "rtn" is registered already'):
        table.register("rtn", source="elsewhere")(9)
    assert table.get("rtn") == 1


def test_registries_are_apart() -> None:
    filled()
    assert Registry[int]("other").names() == []


def test_a_folder_registers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "grown"
    folder.mkdir()
    (folder / "__init__.py").write_text("from remend.registry import Registry\nGROWN = Registry('tree')\n")
    (folder / "oak.py").write_text("from grown import GROWN\nGROWN.register('oak', source='acorn')(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_all("grown")
    assert importlib.import_module("grown").GROWN.names() == ["oak"]
