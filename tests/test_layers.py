"""The house rules that a machine can check: imports point down only, rooms of one floor don't know each other."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import remend

SOURCE = Path(remend.__file__).parent
FLOORS: list[set[str]] = [
    {"errors", "registry", "console", "plugins"},
    {"files", "maths"},
    {"data"},
    {"models"},
    {"compression"},
    {"training"},
    {"report"},
    {"degrade", "diagnosis", "recovery", "evaluation", "exporting"},
    {"studies"},
    {"cli", "__main__", "__init__"},
]
"""From the ground up. A room imports rooms of lower floors and itself."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
REPORT_KNOWS = {"errors", "registry", "console", "plugins", "files", "maths", "report"}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room_of(path: Path) -> str:
    """The top name below remend/: 'maths' for maths/losses/chunked.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(text: str) -> list[tuple[int, str]]:
    """(line, full dotted name) of every import, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the module in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def problems_of(room: str, text: str) -> list[str]:
    """Imports in a module of `room` that point up, or into another room of its floor."""
    problems = []
    for line, name in imports_of(text):
        if name.split(".")[0] != "remend":
            continue
        target = name.split(".")[1] if "." in name else "__init__"
        if target not in FLOOR:
            problems.append(f"line {line}: {name} is on no floor")
        elif FLOOR[target] > FLOOR[room]:
            problems.append(f"line {line}: {room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[target]})")
        elif FLOOR[target] == FLOOR[room] > 0 and target != room and room not in FLOORS[-1]:
            problems.append(f"line {line}: {room} imports {name}, another room of its floor")
        elif room == "report" and target not in REPORT_KNOWS:
            problems.append(f"line {line}: a page is made of files and numbers alone, not of {name}")
    return problems


def test_the_checker_sees_violations() -> None:
    assert problems_of("maths", "import torch\nfrom remend.errors import InputError") == []
    assert problems_of("recovery", "from remend.models import find\nfrom remend.recovery.rounds import f") == []
    assert len(problems_of("maths", "def f():\n    from remend import models, files")) == 2
    assert len(problems_of("degrade", "import remend.recovery\nfrom remend.recovery.judge import Judge")) == 2
    assert len(problems_of("data", "import remend")) == 1
    assert len(problems_of("report", "from remend.models.find import find_model")) == 1
    assert "on no floor" in problems_of("cli", "from remend.utils import helper")[0]


def test_the_list_of_floors_is_the_tree() -> None:
    assert {room_of(path) for path in FILES} == set(FLOOR)
    assert sum(path.suffix == ".py" for path in SOURCE.iterdir()) <= 6
    assert sum((path / "__init__.py").is_file() for path in SOURCE.iterdir()) <= 15


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_point_down(room: str) -> None:
    problems = {
        name_of(path): found
        for path in FILES
        if room_of(path) == room and (found := problems_of(room, path.read_text(encoding="utf-8")))
    }
    assert problems == {}


def test_tensor_mathematics_touches_nothing_else() -> None:
    pure = [*(SOURCE / "maths").rglob("*.py"), *(SOURCE / "compression" / f"{n}.py" for n in ("formats", "grids"))]
    for path in [*pure, SOURCE / "compression" / "solvers.py"]:
        for line, name in imports_of(path.read_text(encoding="utf-8")):
            top, _, rest = name.partition(".")
            allowed = {"torch", "numpy", "scipy"} | set(sys.stdlib_module_names)
            inside = rest.split(".")[0] in {"errors", "registry", "maths"} or rest.startswith("compression.")
            assert top in allowed or (top == "remend" and inside), f"{name_of(path)}:{line} imports {name}"


def test_every_public_name_is_what_it_says() -> None:
    """No module below remend hides a public name, whatever was imported before."""
    modules = [info.name for info in pkgutil.walk_packages(remend.__path__, "remend.")]
    for name in modules:
        if name != "remend.__main__":  # which runs when it is imported
            importlib.import_module(name)
    for name in remend.__all__:
        value = getattr(remend, name)
        if name == "tasks":
            assert value.names()
        else:
            assert callable(value), f"remend.{name} is {value}"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: getattr(remend, name) for name in remend.__all__}
