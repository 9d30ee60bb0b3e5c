"""A page written three ways into a directory: report.html, report.md, report.json."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from remend.errors import printable
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
    """One self-contained document: nothing is loaded, all text is escaped, and no script may run but the one that
    filters prompts, which the page's policy names by its hash."""
    script = files("remend.report").joinpath("filter.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().get_template("page.html.j2")
    return printable(template.render(page=page, script=Markup(script), script_hash=f"sha256-{digest}"))


def write_page(directory: Path, page: Page) -> Path:
    """Write the page's three forms; the path of report.html. Raises FileError where that can't be done."""
    write_json(directory / JSON, page.to_json())
    write_text(directory / MARKDOWN, markdown(page))
    write_text(directory / HTML, html(page))
    return directory / HTML
