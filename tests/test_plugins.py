"""Code from outside the package: installed, or named on the command line."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import remend
from helpers.registering import restored
from remend import plugins
from remend.cli import taken_out
from remend.errors import InputError
from remend.files.run_directory import MANIFEST, SUMMARY


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory that notes each import in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "grown_outside.py").write_text("open('seen.txt', 'a').write('x')\n")
    monkeypatch.delitem(sys.modules, "grown_outside", raising=False)
    with restored():
        yield "grown_outside"
    sys.modules.pop("grown_outside", None)


@pytest.mark.parametrize(
    ("words", "rest", "modules"),
    [
        (["recover", "r.yaml", "--import", "a"], ["recover", "r.yaml"], ["a"]),
        (["--import=a", "recover", "--import", "b.c", "steps=2"], ["recover", "steps=2"], ["a", "b.c"]),
        (["recover", "--", "--import", "a"], ["recover", "--", "--import", "a"], []),
        (["recover"], ["recover"], []),
    ],
)
def test_the_option_may_stand_anywhere(words: list[str], rest: list[str], modules: list[str]) -> None:
    read = taken_out(words)
    assert (read.words, read.modules) == (rest, modules)


def test_a_relative_place_of_pythons_path_is_no_stranger_s_directory_later(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", "lib", "/usr/lib", "__editable__.x.finder.__path_hook__"])
    plugins.keep_places()
    here = str(tmp_path)
    assert sys.path == [here, f"{here}/lib", "/usr/lib", "__editable__.x.finder.__path_hook__"]
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != here])
    plugins.import_modules([module])
    assert (sys.path[-1], "" in sys.path) == (here, False)


@pytest.mark.parametrize("words", [["recover", "--import"], ["--import=", "recover"], ["--import", "--out", "x"]])
def test_an_option_without_a_module_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="--import names no module"):
        taken_out(words)


def test_a_module_of_the_working_directory_is_imported_once_and_remembered(module: str) -> None:
    plugins.import_modules([module, module])
    assert plugins.asked_for == [module]
    assert Path("seen.txt").read_text() == "x"


def test_a_module_that_fails_is_named_with_its_reason(module: str) -> None:
    Path("broken_outside.py").write_text("raise RuntimeError('no luck')\n")
    with pytest.raises(InputError, match="--import broken_outside can't be imported: RuntimeError: no luck"):
        plugins.import_modules(["broken_outside"])
    with pytest.raises(InputError, match="--import nowhere can't be imported: ModuleNotFoundError"):
        plugins.import_modules(["nowhere"])
    assert plugins.asked_for == []


def test_an_installed_package_names_its_module(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    entry = importlib.metadata.EntryPoint("mine", module, plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "remend.plugins" else [])
    plugins.import_installed()
    assert Path("seen.txt").read_text() == "x"
    assert plugins.asked_for == []  # nobody named it on a command line


def test_a_run_keeps_the_name_and_asks_for_it_when_it_is_resumed(
    module: str, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plugins.import_modules([module])
    result = remend.recover(**recipe)
    assert json.loads((result.out / MANIFEST).read_text())["imports"] == [module]
    (result.out / SUMMARY).unlink()
    plugins.asked_for.clear()  # as in a new process
    sys.modules.pop(module)
    remend.check(result.out / "recipe.yaml", out="elsewhere")
    assert f"is of a run that was begun with --import {module}; what these modules" in capsys.readouterr().err
    assert Path("seen.txt").read_text() == "x"
    for goes_on in (lambda: remend.recover(resume=result.out), lambda: remend.track(result.out)):
        with pytest.raises(InputError, match=f"was begun with --import {module}; give that again"):
            goes_on()
    assert Path("seen.txt").read_text() == "x"  # its files alone run nothing
    plugins.import_modules([module])
    remend.recover(resume=result.out)
    assert Path("seen.txt").read_text() == "xx"


def test_a_recipe_can_not_name_a_module(module: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(InputError, match='unknown key "imports"'):
        remend.check(**recipe, imports=[module])
    assert not Path("seen.txt").exists()


def test_the_command_line_imports_before_it_parses(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from remend.cli import main

    monkeypatch.setattr(sys, "argv", ["remend", "version", "--import", module])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert Path("seen.txt").read_text() == "x"
    monkeypatch.setattr(sys, "argv", ["remend", "--import", "nowhere", "version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: --import nowhere can't be imported" in capsys.readouterr().err
