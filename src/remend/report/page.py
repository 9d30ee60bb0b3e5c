"""What a report says, as plain data. HTML, Markdown and JSON are three ways to write one Page.

A Page has sections, a section has blocks. No block holds markup: the writers escape everything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from remend.files.atomic import JsonObject
from remend.report.charts import Chart


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
    """Rows of text.

    emphasis: the column whose cells are coloured by `tones`, one a row: 'good' and 'bad' are bold, '' is plain.
    folded: the title under which it is folded away.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    emphasis: int | None = None
    tones: Sequence[str] = ()
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
    """Answers side by side, by prompt: (prompt, answers).

    scale: what the colours of tokens mean, where there are any.
    filter: what the box above says that filters the prompts by their words; without it there is none.
    """

    kind: ClassVar[str] = "samples"
    samples: Sequence[tuple[str, Sequence[Answer]]]
    about: str
    scale: Sequence[tuple[str, str]] = ()
    filter: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure in large letters. tone: 'good' and 'bad' only where its interval says so, else ''."""

    label: str
    value: str
    note: str = ""
    tone: Literal["good", "bad", ""] = ""


Block = Text | Finding | Table | Figure | Facts | Code | Samples


@dataclass(frozen=True)
class Section:
    """Blocks under a heading. place: its name as a link's target."""

    title: str
    place: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report.

    verdict: the one sentence below the title.
    about: what kind of report it is.
    tiles: the figures that decide, in large letters.
    refresh: seconds after which a browser loads the page again; 0 is never.
    """

    title: str
    verdict: str
    about: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default=())
    tiles: Sequence[Tile] = field(default=())
    refresh: int = 0

    @property
    def filtered(self) -> bool:
        """Whether some block has a box that filters."""
        return any(isinstance(b, Samples) and b.filter for section in self.sections for b in section.blocks)

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
