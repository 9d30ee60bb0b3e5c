"""A page written three ways into a directory: report.html, report.md, report.json."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from remend.files.atomic import write_json, write_text
from remend.report.markdown import markdown
from remend.report.page import Page

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("remend", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html(page: Page) -> str:
    """One self-contained document: no script, nothing loaded; all text escaped."""
    return _environment().get_template("page.html.j2").render(page=page)


def write_page(directory: Path, page: Page) -> Path:
    """Write the page's three forms; the path of report.html. Raises FileError where that can't be done."""
    write_json(directory / JSON, page.to_json())
    write_text(directory / MARKDOWN, markdown(page))
    write_text(directory / HTML, html(page))
    return directory / HTML
