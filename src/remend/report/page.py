"""What a report says, as plain data. HTML, Markdown and JSON are three ways to write one Page.

A Page has sections, a section has blocks. No block holds markup: the writers escape everything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup

from remend.files.atomic import JsonObject
from remend.report.plots import Group, Share, forest_plot, heatmap, percent, scatter
from remend.report.svg import Level, Series, line_chart

MOST_ROWS = 40
"""A chart of more points is thinned for the table that stands in its place in Markdown."""

Cells = tuple[list[str], list[list[str]]]
"""Columns and rows of a chart's numbers."""


def number(value: float | None, form: str = ".3f") -> str:
    """A number as text with a true minus, a dash for None or what is not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form).replace("-", "−")


@dataclass(frozen=True)
class Lines:
    """A line chart; see line_chart."""

    kind: ClassVar[str] = "lines"
    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    low: float | None = 0.0
    high: float | None = None
    levels: Sequence[Level] = ()
    nothing: str = "nothing was measured"

    def draw(self) -> Markup:
        """SVG with its legend."""
        return line_chart(
            self.series,
            x_label=self.x_label,
            y_label=self.y_label,
            title=self.title,
            low=self.low,
            high=self.high,
            levels=self.levels,
            nothing=self.nothing,
        )

    def table(self) -> Cells:
        """A row for each x, thinned; intervals in brackets."""
        shown = [s for s in self.series if s.points]
        by_x = [dict(s.points) for s in shown]
        bands = [{x: (low, high) for x, low, high in s.band} for s in shown]
        xs = sorted({x for points in by_x for x in points})
        step = max(1, -(-len(xs) // MOST_ROWS))
        rows = [
            [f"{x:g}", *(_cell(p.get(x), b.get(x)) for p, b in zip(by_x, bands, strict=True))]
            for x in sorted({*xs[::step], *xs[-1:]})
        ]
        return [self.x_label, *(s.name for s in shown)], rows


def _cell(y: float | None, ends: tuple[float | None, float | None] | None) -> str:
    if ends is None or ends[0] is None:
        return number(y)
    return f"{number(y)} ({number(ends[0])} to {number(ends[1])})"


@dataclass(frozen=True)
class Forest:
    """Shares with intervals; see forest_plot."""

    kind: ClassVar[str] = "forest"
    title: str
    rows: Sequence[Share]
    x_label: str

    def draw(self) -> Markup:
        """SVG."""
        return forest_plot(self.rows, x_label=self.x_label, title=self.title)

    def table(self) -> Cells:
        """A row each: share, and its interval."""
        rows = [
            [r.name, percent(r.value), "–" if r.low is None else f"{percent(r.low)} to {percent(r.high)}"]
            for r in self.rows
        ]
        return ["", self.x_label, "95% interval"], rows


@dataclass(frozen=True)
class Scatter:
    """One quantity against another; see scatter."""

    kind: ClassVar[str] = "scatter"
    title: str
    groups: Sequence[Group]
    x_label: str
    y_label: str

    def draw(self) -> Markup:
        """SVG with its legend."""
        return scatter(self.groups, x_label=self.x_label, y_label=self.y_label, title=self.title)

    def table(self) -> Cells:
        """A row a point."""
        rows = [[g.name, said, number(x), number(y)] for g in self.groups for x, y, said in g.points]
        return ["", "point", self.x_label, self.y_label], rows


@dataclass(frozen=True)
class Heatmap:
    """Cells coloured from 0 to 1; see heatmap."""

    kind: ClassVar[str] = "heatmap"
    title: str
    values: Sequence[Sequence[float | None]]
    x_label: str
    y_label: str
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    hover: bool = True

    def draw(self) -> Markup:
        """SVG."""
        return heatmap(
            self.values,
            x_label=self.x_label,
            y_label=self.y_label,
            title=self.title,
            rows=self.rows,
            columns=self.columns,
            hover=self.hover,
        )

    def table(self) -> Cells:
        """For each row of cells the column of its largest value: a grid of numbers would not be read."""
        columns = self.columns or [str(j) for j in range(max(map(len, self.values), default=0))]
        names = self.rows or [str(i) for i in range(len(self.values))]
        square = len(names) == len(columns) and not self.columns
        rows = []
        for i, row in enumerate(self.values):
            value, at = max(((value, j) for j, value in enumerate(row) if value is not None), default=(None, 0))
            rows.append([names[i], columns[at], number(value), *([number(row[i])] if square else [])])
        return [self.y_label, f"largest at {self.x_label}", "there", *(["on the diagonal"] if square else [])], rows


Chart = Lines | Forest | Scatter | Heatmap


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Literal["plain", "soft", "warning"] = "plain"


@dataclass(frozen=True)
class Claim:
    """A sentence and what it rests on: (place in the data, the value there)."""

    text: str
    rests_on: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Finding:
    """What is found of one model: its severity in a word, sentences, and what to do."""

    kind: ClassVar[str] = "finding"
    name: str
    severity: str
    sentences: Sequence[Claim]
    advice: Claim


@dataclass(frozen=True)
class Table:
    """Rows of text. emphasis: a column in bold; folded: the title under which it is folded away."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    emphasis: int | None = None
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """Charts under one caption: what to see, and how it was measured."""

    kind: ClassVar[str] = "figure"
    charts: Sequence[Chart]
    see: str
    measured: str


@dataclass(frozen=True)
class Facts:
    """Names and values. folded: see Table."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it is, to copy. folded: see Table."""

    kind: ClassVar[str] = "code"
    text: str
    folded: str = ""


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer. css: '' as it is, 'differs', or k0 … k4 by its kl, nats; title: what hovering says."""

    text: str
    css: str = ""
    title: str = ""
    kl: float | None = None


@dataclass(frozen=True)
class Said:
    """A text in pieces, what it is (empty where the model's name says enough), and a note below it."""

    pieces: Sequence[Piece]
    label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """What one model said, and a text as it reads it. css: reference, degraded, recovered, or a line's style."""

    name: str
    css: str
    texts: Sequence[Said]


@dataclass(frozen=True)
class Samples:
    """Answers side by side, by prompt: (prompt, answers). scale: whether tokens are coloured by KL."""

    kind: ClassVar[str] = "samples"
    samples: Sequence[tuple[str, Sequence[Answer]]]
    about: str
    scale: Sequence[tuple[str, str]] = ()


Block = Text | Finding | Table | Figure | Facts | Code | Samples


@dataclass(frozen=True)
class Section:
    """Blocks under a heading. place: its name as a link's target."""

    title: str
    place: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report. verdict: the one sentence below the title; about: what kind of report it is."""

    title: str
    verdict: str
    about: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default=())

    def to_json(self) -> JsonObject:
        """The same as plain values: every dataclass an object, with the kind of a block; None for what is no number."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind: JsonObject = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
