"""The house rules that a machine can check: imports point down only, files and functions stay short."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import remend

SOURCE = Path(remend.__file__).parent
FLOORS: list[set[str]] = [
    {"errors", "registry", "losses", "cka", "solvers", "stats", "grids", "formats", "gguf_blocks", "paired"}
    | {"truncated", "prefix", "correlation", "gpu_memory", "replay", "packed_linears", "gguf_reading", "sums"}
    | {"kv_cache", "host_memory"},
    {"config", "data", "prompts", "vocabulary", "run", "report", "progress", "sieve", "tasks", "shipped"}
    | {"compare", "graded"},
    {"packed", "packed_grid", "foreign", "adapters", "models", "constraints", "scoring", "rollout", "teacher"}
    | {"train", "supervised", "measure", "calibration", "capture", "layer_map", "teacher_cache", "answers"},
    {"caching", "degrade", "diagnosis", "evaluation", "exporting", "recovery"},
    {"flows"},
    {"cli", "__main__", "__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room_of(path: Path) -> str:
    """The top name below remend/: 'losses' for losses.py, 'degrade' for degrade/quantize.py."""
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
    """Imports in a module of `room` that point up, or into another room of the same fourth floor."""
    found = []
    for line, name in imports_of(text):
        if name.split(".")[0] != "remend":
            continue
        target = name.split(".")[1] if "." in name else "__init__"
        if target not in FLOOR:
            found.append(f"line {line}: {name} is on no floor")
        elif FLOOR[target] > FLOOR[room]:
            found.append(f"line {line}: {room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[target]})")
        elif FLOOR[target] == FLOOR[room] == 3 and target != room:
            found.append(f"line {line}: {room} imports {name}, another room of its floor")
    return found


def test_the_checker_sees_violations() -> None:
    assert problems_of("losses", "import torch\nfrom remend.errors import InputError") == []
    assert problems_of("recovery", "from remend import models\nfrom remend.recovery.objective import f") == []
    assert len(problems_of("losses", "def f():\n    from remend import models, config")) == 2
    assert len(problems_of("degrade", "import remend.recovery\nfrom remend.recovery.held_out import Judge")) == 2
    assert len(problems_of("data", "import remend")) == 1
    assert "on no floor" in problems_of("cli", "from remend.utils import helper")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_is_on_a_floor(path: Path) -> None:
    assert room_of(path) in FLOOR, f"place {room_of(path)} on a floor: in architecture.md and here"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    assert problems_of(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", ["losses.py", "truncated.py", "prefix.py", "grids.py", "formats.py", "solvers.py"])
def test_tensor_mathematics_touches_nothing_else(module: str) -> None:
    names = [name for _, name in imports_of((SOURCE / module).read_text(encoding="utf-8"))]
    for name in names:
        top = name.split(".")[0]
        room = name.split(".")[1] if top == "remend" else ""
        assert top == "torch" or top in sys.stdlib_module_names or FLOOR.get(room) == 0, name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert long == {}
