"""A page as Markdown: the same content for a model card, with tables in place of drawings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from remend.errors import printable
from remend.report.page import Code, Facts, Figure, Finding, Page, Said, Samples, Table, Text

STRONGEST = 3
"""Tokens that are named where HTML would colour all."""


def markdown(page: Page) -> str:
    """The whole page. What models, files and users wrote is escaped: it can't become markup, HTML or a link."""
    lines = [f"# {escape(page.title)}", "", f"**{escape(page.verdict)}**", ""]
    lines += [
        f"- {escape(t.label)}: {escape(t.value)}" + (f" ({escape(t.note)})" if t.note else "") for t in page.tiles
    ]
    lines += [""] if page.tiles else []
    for warning in page.warnings:
        lines += [f"> Warning: {escape(warning)}", ""]
    for section in page.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_WRITERS[block.kind](block), ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """One line of plain text."""
    flat = printable(" ".join(text.split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = re.sub(r"([\\`*_\[\]{}|#!~$])", r"\\\1", flat)
    flat = re.sub(r"^([-+=]|\d+[.)](?=\s|$))", lambda m: m[0][:-1] + "\\" + m[0][-1], flat)  # no list, no rule
    return flat.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def quoted(text: str) -> list[str]:
    """Text of several lines as a quotation."""
    return [f"> {escape(line)}  " if line.strip() else ">" for line in text.split("\n")]


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column to the left, the others to the right."""
    head = [escape(c) or " " for c in columns]
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, marks, *([escape(c) for c in row] for row in rows))]


def _text(block: Text) -> Iterator[str]:
    yield ("> Warning: " if block.tone == "warning" else "") + escape(block.text)


def _finding(block: Finding) -> Iterator[str]:
    yield f"### {escape(block.name)}: {escape(block.severity)}"
    yield ""
    for sentence in (*block.sentences, block.advice):
        rests = ", ".join(f"`{place.replace('`', '')}`" for place, _ in sentence.rests_on)
        yield f"- {escape(sentence.text)}" + (f" ({rests})" if rests else "")


def _table(block: Table) -> Iterator[str]:
    if block.folded:
        yield from (f"### {escape(block.folded)}", "")
    yield from grid(block.columns, block.rows)
    if block.caption:
        yield from ("", escape(block.caption))


def _figure(block: Figure) -> Iterator[str]:
    for chart in block.charts:
        yield from (f"### {escape(chart.title)}", "", *grid(*chart.table()), "")
    yield f"{escape(block.see)} {escape(block.measured)}"


def _facts(block: Facts) -> Iterator[str]:
    if block.folded:
        yield from (f"### {escape(block.folded)}", "")
    for name, value in block.rows:
        yield f"- {escape(name)}: {escape(value)}"


def _code(block: Code) -> Iterator[str]:
    if block.folded:
        yield from (f"### {escape(block.folded)}", "")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
    yield from (f"{fence}text", block.text, fence)


def _samples(block: Samples) -> Iterator[str]:
    for prompt, answers in block.samples:
        yield from ("### Prompt", "", *quoted(prompt), "")
        for answer in answers:
            for said in answer.texts:
                yield from _said(answer.name, said)
    yield escape(block.about)


def _said(name: str, said: Said) -> Iterator[str]:
    label = ", ".join(part for part in (name, said.label) if part)
    note = f" ({escape(said.note)})" if said.note else ""
    yield from (f"{escape(label)}{note}:", "", *quoted("".join(piece.text for piece in said.pieces)), "")
    strong = sorted((p for p in said.pieces if p.kl), key=lambda p: -(p.kl or 0.0))[:STRONGEST]
    if strong:
        named = "; ".join(f"“{escape(p.text)}” ({escape(p.title)})" for p in strong)
        yield from (f"Furthest off at: {named}", "")


_WRITERS: dict[str, Callable[[Any], Iterator[str]]] = {
    "text": _text,
    "finding": _finding,
    "table": _table,
    "figure": _figure,
    "facts": _facts,
    "code": _code,
    "samples": _samples,
}
