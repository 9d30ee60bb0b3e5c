"""What a page or a comment points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")])
FILES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
ELSEWHERE = {"convert_hf_to_gguf.py", "my_file.py", "my_losses.py"}
"""Files of other projects, and of readers, that are named."""

OWN = re.compile(r"^# (\w+\.py)$", re.M)
"""A file that a page's example makes."""


def unknown(text: str) -> list[str]:
    """Python files that a text names and that are nowhere in the repository."""
    names = set(re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)\b", text)) - ELSEWHERE - set(OWN.findall(text))
    return sorted(name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in FILES))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_points_at_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    if page.name != "CHANGELOG.md":  # which tells of files as they were
        assert unknown(text) == []


def test_comments_name_files_that_are_there() -> None:
    missing = {file: names for file, path in zip(FILES, SOURCES, strict=True) if (names := unknown(path.read_text()))}
    missing.pop("tests/test_docs.py", None)
    assert {file: names for file, names in missing.items() if file.startswith(("src/", "benchmarks/"))} == {}
