"""What a page, a recipe or a comment names is there: files, Python names, make targets, verbs, options and keys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

import remend
from remend.cli import build_app
from remend.degrade import DEGRADATIONS
from remend.evaluation.settings import EvaluateSettings
from remend.recovery.settings import RecoverConfig, StreamConfig
from remend.studies.spec import StudySpec

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PAGES.remove(ROOT / "CHANGELOG.md")  # which tells of things as they were
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SOURCES = sorted(
    [
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
)
FILES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
FOLDERS = {f"/{parent.as_posix()}/" for file in FILES for parent in Path(file).parents}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

ELSEWHERE = {"convert_hf_to_gguf.py", "my_file.py", "my_losses.py"}
"""Files of other projects, and of readers, that are named."""
OTHERS = {"--extra-index-url", "--pure", "--standalone", "actorder: group", "mixed_precision: fp16", "key=value"}
"""Options of pip, llama-quantize and torchrun, settings of compressed-tensors and accelerate, an override's form."""
ANYWHERE = {"--import", "--version", "--quiet", "--verbose", "--install-completion", "--show-completion"}
"""Options of no verb."""
OWN = re.compile(r"^# (\w+\.py)$", re.M)
"""A file that a page's example makes."""


def files_missing(text: str) -> Iterator[str]:
    """Python files, folders of the repository and paths below them that are named and not there."""
    for name in set(re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)\b", text)) - ELSEWHERE - set(OWN.findall(text)):
        if not any(f"/{file}".endswith(f"/{name}") for file in FILES):
            yield name
    for name in set(re.findall(r"(?<![\w/.-])(?:tests|docs|recipes|benchmarks|src)/[\w./-]*\w", text)):
        if not (ROOT / name).exists() and not name.startswith("docs/measurements/"):  # which long checks make
            yield name


def names_missing(text: str) -> Iterator[str]:
    """Dotted names below remend that can't be imported."""
    for name in set(re.findall(r"(?<![\w./-])remend(?:\.[A-Za-z_]\w*)+", text)) - {"remend.base"}:  # a key of metadata
        value: Any = remend
        for part in name.removesuffix(".__main__").split(".")[1:]:  # which runs when it is imported
            inside = f"{value.__name__}.{part}" if hasattr(value, "__path__") else None
            value = import_module(inside) if inside and find_spec(inside) else getattr(value, part, None)
        if value is None:
            yield name


def code_of(text: str) -> tuple[list[str], list[str]]:
    """The lines of a page's blocks of code, and its inline spans."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (?! )(.*)$", prose, re.M)
    spans = [" ".join(span.replace(r"\|", "|").split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line for block in blocks for line in block.splitlines()] + indented, spans


@cache
def verbs() -> dict[str, set[str] | None]:
    """The options that each verb shows in its help; None for a word that more verbs follow."""
    options: dict[str, set[str] | None] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        shown = {o for p in command.params if not getattr(p, "hidden", False) for o in (*p.opts, *p.secondary_opts)}
        options[" ".join(path)] = None if children else shown | {"--help"}
        for name, child in (children or {}).items():
            if not child.hidden:
                walk(child, (*path, name))

    walk(typer.main.get_command(build_app()), ())
    return options


def command_faults(line: str) -> Iterator[str]:
    """What a command line with remend names and that is not there."""
    line = re.sub(r"--import \S+ ?", "", re.split(r"   |  #| \(", line)[0])
    try:
        words = shlex.split(line)[1:]
    except ValueError:
        words = line.split()[1:]
    verb = ""
    while words and verbs().get(verb, set()) is None and not words[0].startswith("-"):
        if f"{verb} {words[0]}".strip() not in verbs():
            if re.match(r"[a-z]", words[0]):
                yield f"remend {verb} {words[0]}"
            return
        verb = f"{verb} {words.pop(0)}".strip()
    options = verbs()[verb] or {"--help"}
    yield from (f"remend {verb} {o}" for w in words if (o := _option(w)) and o not in options)
    if verb == "degrade prune" and "--method" in words:
        method = words[words.index("--method") + 1]
        yield from (f"{line}: teach degrade {name}" for name in ("depth", "width") if name in method.split("|"))
    if verb in ("recover", "check"):
        yield from (f"remend {verb} {w}" for w in words if "=" in w and not w.startswith("-") and not _key(w))


def _option(word: str) -> str | None:
    match = re.match(r"\[?(--\w[\w-]*)", word)
    return match[1] if match else None


@cache
def keys() -> set[str]:
    """Names of the fields of all that a user writes in files."""
    names: set[str] = set()

    def walk(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names.update(getattr(kind, "gone", ()))  # a page may say of a key that it is gone
            for name, field in kind.model_fields.items():
                names.add(name)
                walk(field.annotation)
        elif get_origin(kind) in (Union, UnionType, dict, list) or get_args(kind):
            for part in get_args(kind):
                walk(part)

    for kind in (RecoverConfig, StudySpec, EvaluateSettings, *DEGRADATIONS.entries.values()):
        walk(kind)
    return names


def _key(span: str) -> bool:
    """Whether the first name of `key=value` or `a.key: value` is one that a recipe or a study has."""
    return re.split(r"\W", span)[0] in keys()


@cache
def benchmark_options() -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    return set(re.findall(r'"(--[\w-]+)"', "".join(texts)))


@cache
def words_of_the_source() -> set[str]:
    return {word for path in SOURCES for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}


def code_faults(lines: list[str], spans: list[str]) -> Iterator[str]:
    """Make targets, commands, options, keys and names with underscores that are written as code and not there."""
    for line in [*(line.strip() for line in lines), *spans]:
        if line.startswith("make ") and (line.split()[1] not in TARGETS and not line.split()[1].startswith("-")):
            yield line
        elif match := re.match(r"(?:python -m )?(remend [a-z-].*)", line):
            yield from command_faults(match[1])
        elif match := re.match(r"python (benchmarks/\w+\.py) (.*)", line):
            text = (ROOT / match[1]).read_text(encoding="utf-8")
            yield from (f"{match[1]} {o}" for w in match[2].split() if (o := _option(w)) and f'"{o}"' not in text)
    known = OTHERS | ANYWHERE | benchmark_options() | set().union(*(o for o in verbs().values() if o))
    for span in spans:
        setting = re.match(r"[a-z_]+(\.[a-z_]+)*(=|: )(?!True|…)\S", span) and span not in OTHERS
        name = re.fullmatch(r"[a-z]+(_[a-z]+)+", span)
        if (option := _option(span)) and option not in known:
            yield option
        elif (setting and not _key(span)) or (name and span not in words_of_the_source()):
            yield span
        elif re.fullmatch(r"(?:[\w.]+/)+", span):
            folder = (ROOT / span).is_dir() or any(f.endswith(f"/{span}") for f in FOLDERS)
            of_a_run = span.count("/") == 1 and span[:-1] in words_of_the_source()
            if not folder and not of_a_run:
                yield span


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_names_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    assert [*files_missing(text), *names_missing(text), *code_faults(*code_of(text))] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_recipe_names_what_is_there(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    commands = re.findall(r"(?:^#\s+|: )(remend [a-z].*)", text, re.M)
    assert [*files_missing(text), *names_missing(text), *code_faults(commands, [])] == []


@pytest.mark.parametrize("folder", ["src", "benchmarks", "tests"])
def test_comments_name_what_is_there(folder: str) -> None:
    faults = {}
    for file, path in zip(FILES, SOURCES, strict=True):
        text = path.read_text(encoding="utf-8")
        if file.startswith(f"{folder}/") and file not in ("tests/test_docs.py", "tests/test_layers.py"):
            faults[file] = [*(() if folder == "tests" else files_missing(text)), *names_missing(text)]
    assert {file: names for file, names in faults.items() if names} == {}


def test_the_checks_of_ci_name_what_is_there() -> None:
    for file in ("Makefile", ".ci/run", "pyproject.toml"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [*files_missing(text), *names_missing(text)] == [], file
    targets = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert set(targets) <= TARGETS


def test_the_tables_list_every_key_and_kind() -> None:
    def first_column(page: str) -> set[str]:
        rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
        return {key for row in rows for key in re.findall(r"\w+", row)}

    assert RecoverConfig.model_fields.keys() - first_column("explanation/defaults.md") == set()
    assert StreamConfig.model_fields.keys() - first_column("reference/streams.md") == set()
    assert (
        StudySpec.model_fields.keys() - first_column("how-to/study.md") - {"budget"} == set()
    )  # told by its two parts
    (kinds,) = re.findall(
        r"^\| `degradations` \|(.*)", (ROOT / "docs" / "how-to" / "study.md").read_text(encoding="utf-8"), re.M
    )
    assert [name for name in DEGRADATIONS.names() if f"`{name}`" not in kinds] == []


def test_the_generated_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reference = import_module("reference")
    for name, page in reference.PAGES.items():
        current = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == page()
        assert current, f"docs/reference/{name} is out of date; run: python benchmarks/reference.py"
