"""How large is the code, and how much of what was to leave is still there?

    python benchmarks/count.py --old 13d6498 --where        (make count)

Counts OLD (from git's history) and the files that stand here, prints both beside the targets of the rebuilding, and
ends with code 1 where one is missed. `--where` lists the lines that are counted. A line counts once, however often the
word stands in it; `Any` alone is counted by occurrence. Comments and docstrings count too.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Tree = dict[str, str]
"""Text of each Python file under src/ and tests/, by its path from the repository's root."""

MOST_PARAMETERS = 8


@dataclass(frozen=True)
class Count:
    """One row: what is counted, where it stands, and how many there may be (given OLD's number)."""

    what: str
    places: Callable[[Tree], list[str]]
    most: Callable[[int], int]


def under(tree: Tree, folder: str) -> Tree:
    """The files below that folder."""
    return {name: text for name, text in tree.items() if name.startswith(folder)}


def lines(folder: str) -> Callable[[Tree], list[str]]:
    """Every line of Python below that folder."""
    return lambda tree: [name for name, text in under(tree, folder).items() for _ in text.splitlines()]


def matching(pattern: str, *, each: bool = False) -> Callable[[Tree], list[str]]:
    """Lines under src/ that the pattern is found in; with `each`, every occurrence."""

    def places(tree: Tree) -> list[str]:
        rows = [
            (f"{name}:{number}: {line.strip()}", len(re.findall(pattern, line)))
            for name, text in under(tree, "src/").items()
            for number, line in enumerate(text.splitlines(), 1)
        ]
        return [place for place, times in rows for _ in range(times if each else min(times, 1))]

    return places


def long_signatures(tree: Tree) -> list[str]:
    """Functions of more than MOST_PARAMETERS parameters; self and cls, *args and **kwargs are not counted."""
    places = []
    for name, text in under(tree, "src/").items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                number = len([a for i, a in enumerate(taken) if i or a not in ("self", "cls")])
                if number > MOST_PARAMETERS:
                    places.append(f"{name}:{node.lineno}: {node.name} takes {number}")
    return places


def untyped_settings(tree: Tree) -> list[str]:
    """Calls f(**settings) where the same function has put `settings` together as a dict[str, …]."""
    places = []
    for name, text in under(tree, "src/").items():
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            inside = list(ast.walk(function))
            dicts = {
                node.target.id
                for node in inside
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                if ast.unparse(node.annotation).startswith("dict[str, ")
            }
            places += [
                f"{name}:{call.lineno}: **{keyword.value.id}"
                for call in inside
                if isinstance(call, ast.Call)
                for keyword in call.keywords
                if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id in dicts
            ]
    return places


def root_files(tree: Tree) -> list[str]:
    """Modules that stand directly in the package."""
    return [name for name in tree if re.fullmatch(r"src/remend/\w+\.py", name)]


def root_packages(tree: Tree) -> list[str]:
    """Packages that stand directly in the package."""
    return [name for name in tree if re.fullmatch(r"src/remend/\w+/__init__\.py", name)]


def at_most(number: int) -> Callable[[int], int]:
    """A target of its own."""
    return lambda _: number


def tenth(before: int) -> int:
    """At most a tenth of what OLD has."""
    return before // 10


COUNTS = [
    Count("lines of Python in src/", lines("src/"), at_most(25_500)),
    Count("lines of Python in tests/", lines("tests/"), at_most(16_500)),
    Count("lines of recovery/run.py", lines("src/remend/recovery/run.py"), at_most(150)),
    Count("files in the package's root", root_files, at_most(6)),
    Count("packages in the package's root", root_packages, at_most(15)),
    Count("Any", matching(r"\bAny\b", each=True), at_most(479)),
    Count("isinstance(…, TeacherCache)", matching(r"isinstance\(.*\bTeacherCache\b"), tenth),
    Count("pad_id", matching(r"pad_id"), tenth),
    Count("checked.", matching(r"checked\."), tenth),
    Count("the word found", matching(r"\bfound\b"), tenth),
    Count("settings: dict[str, Any]; f(**settings)", untyped_settings, tenth),
    Count(f"functions of more than {MOST_PARAMETERS} parameters", long_signatures, tenth),
]


def committed(commit: str) -> Tree:
    """The Python files of a commit."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "src", "tests"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".py")]
        return {m.name: file.read().decode() for m in members if (file := archive.extractfile(m))}


def standing() -> Tree:
    """The Python files that stand here."""
    paths = [path for folder in ("src", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--old", default="13d6498", help="commit that is compared with")
    parser.add_argument("--where", action="store_true", help="list the lines that are counted here")
    chosen = parser.parse_args()
    old, new = committed(chosen.old), standing()
    missed = []
    print(f"{'':<42}{chosen.old[:10]:>10}{'now':>10}{'at most':>10}")
    for count in COUNTS:
        before, places = len(count.places(old)), count.places(new)
        most = count.most(before)
        if len(places) > most:
            missed.append(count.what)
        print(f"{count.what:<42}{before:>10,}{len(places):>10,}{most:>10,}{'' if len(places) <= most else '  MISSED'}")
        if chosen.where and not count.what.startswith("lines"):
            print("".join(f"    {place}\n" for place in places), end="")
    sys.exit(f"missed: {'; '.join(missed)}" if missed else None)


if __name__ == "__main__":
    main()
