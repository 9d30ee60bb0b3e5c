"""Charts: lines, shares with intervals, one quantity against another, arrows, cells. Each draws itself as inline SVG
and gives its numbers as a table, for writers that can't draw. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from markupsafe import Markup, escape

from remend.report.svg import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    Key,
    Point,
    legend,
    marker,
    padded,
    start,
    style,
    text,
    ticks,
)
from remend.report.words import number, percent

T = TypeVar("T")

MOST_ROWS = 40
"""A chart of more points is thinned for the table that stands in its place in Markdown."""

Cells = tuple[list[str], list[list[str]]]
"""Columns and rows of a chart's numbers."""

HEAD = 9.0
"""Length of an arrow's head, in viewBox units."""

NARROW, ROW = 440, 50
"""Width of a forest plot, so that a phone shows it whole, and height of its rows, in viewBox units."""

BARS = (
    "A bar wholly above 0% is recovery beyond chance, one wholly be"
    "low 0% further damage; a bar that holds 0% shows neither."
)
"""How the bars of a forest plot are read."""

LETTERS = 40
"""Longer names are cut in the middle; hovering shows them whole."""

LEAST = -1.0
"""A gap closed below it is drawn at the edge: a failed run must not squeeze the others. Its figure stands beside it."""


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, its CSS class, its points.

    dots: mark every point; joined: draw the line; band: (x, low, high) of an interval around it; titles: what hovering
    over each point says, by default its name and coordinates.
    """

    name: str
    css: str
    points: Sequence[Point]
    dots: bool = False
    joined: bool = True
    band: Sequence[tuple[float, float | None, float | None]] = ()
    titles: Sequence[str] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line across a chart: a limit, or what chance reaches."""

    name: str
    css: str
    y: float


@dataclass(frozen=True)
class Lines:
    """Lines with bands, dots and hover titles, and a legend below.

    series: a point without a y breaks its line.
    title: the drawing's text alternative.
    low, high: where the y axis begins and ends at the latest, values beyond included; None is the data's own.
    levels: horizontal lines.
    nothing: what is said in place of a drawing without points.
    """

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
        drawn = [s for s in self.series if any(y is not None for _, y in s.points)]
        if not drawn:
            return Markup("<p>{}</p>").format(self.nothing)
        frame = _frame(drawn, self.levels, self.low, self.high)
        parts = frame.axes(self.x_label, self.y_label, self.title)
        for s in drawn:
            parts += _bands(s, frame)
        for level in self.levels:
            _, at = frame.place(frame.x_low, level.y)
            hover = f"<title>{escape(level.name)}: {level.y:.3g}</title>"
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"'
            parts.append(f'<line class="line {escape(level.css)}" {ends}>{hover}</line>')
        for s in drawn:
            parts += _line(s, frame, self.x_label)
        parts.append("</svg>")
        keys = [Key(s.name, s.css, s.dots, s.joined) for s in drawn] + [Key(v.name, v.css) for v in self.levels]
        named = len(keys) > 1 or keys[0].name.lower() != self.title.lower()  # the title names a line that is alone
        return Markup("".join(parts)) + (legend(keys) if named else Markup(""))

    def table(self) -> Cells:
        """A row for each x, thinned; intervals in brackets."""
        shown = [s for s in self.series if s.points]
        by_x = [dict(s.points) for s in shown]
        bands = [{x: (low, high) for x, low, high in s.band} for s in shown]
        xs = sorted({x for points in by_x for x in points})
        step = max(1, -(-len(xs) // MOST_ROWS))
        rows = [
            [f"{x:g}", *(_with_ends(p.get(x), b.get(x)) for p, b in zip(by_x, bands, strict=True))]
            for x in sorted({*xs[::step], *xs[-1:]})
        ]
        return [self.x_label, *(s.name for s in shown)], rows


def _with_ends(y: float | None, ends: tuple[float | None, float | None] | None) -> str:
    if ends is None or ends[0] is None:
        return number(y)
    return f"{number(y)} ({number(ends[0])} to {number(ends[1])})"


def _frame(series: Sequence[Series], levels: Sequence[Level], low: float | None, high: float | None) -> Frame:
    xs = [x for s in series for x, _ in s.points if math.isfinite(x)] or [0.0]  # a damaged file may say anything
    ys = [y for s in series for _, y in s.points if y is not None] + [level.y for level in levels]
    ys += [y for s in series for _, *ends in s.band for y in ends if y is not None]
    ys = [y for y in ys if math.isfinite(y)] or [0.0]
    bottom, top = min(ys), max(ys)
    if low is not None:
        bottom = min(low, bottom)
    top = max(high, top) if high is not None else top + 0.05 * (top - bottom)
    x_low, x_high = min(xs), max(xs)
    whole = all(x == round(x) for x in xs)
    return Frame(
        x_low, x_high if x_high > x_low else x_low + 1, bottom, top if top > bottom else bottom + 1.0, whole=whole
    )


def _line(s: Series, frame: Frame, x_label: str) -> list[str]:
    parts = []
    placed = [(x, y, frame.place(x, y)) if y is not None else None for x, y in s.points]
    if s.joined:
        for run in _runs([p and p[2] for p in placed]):
            if len(run) == 1 and not s.dots:  # a line of one point would not be seen
                parts.append(marker(*run[0], s.css))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(f'<polyline class="line {escape(s.css)}" points="{path}"/>')
    for i, point in enumerate(placed):
        if point is None:
            continue
        x, y, (across, up) = point
        said = s.titles[i] if i < len(s.titles) else f"{s.name}: {y:.4g} ({x_label} {x:g})"
        if s.dots:
            parts.append(marker(across, up, s.css, said, 4.0 if len(s.points) <= 40 else 2.5))
        else:
            hover = f"<title>{escape(said)}</title>"
            parts.append(f'<circle class="hit" cx="{across:.1f}" cy="{up:.1f}" r="6">{hover}</circle>')
    return parts


def _bands(s: Series, frame: Frame) -> list[str]:
    ends = [
        (frame.place(x, low), frame.place(x, high)) if low is not None and high is not None else None
        for x, low, high in s.band
    ]
    parts = []
    for run in _runs(ends):
        corners = [b for b, _ in run] + [t for _, t in reversed(run)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(f'<polygon class="band {escape(s.css)}" points="{path}"/>')
    return parts


def _runs(items: Iterable[T | None]) -> list[list[T]]:
    """Stretches without a gap."""
    runs: list[list[T]] = [[]]
    for item in items:
        if item is None:
            runs.append([])
        else:
            runs[-1].append(item)
    return [run for run in runs if run]


@dataclass(frozen=True)
class Share:
    """A row of a forest plot: a share with the ends of its interval, None where there is none."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def tone(self) -> Literal["good", "bad", ""]:
        """Which side of 0 the interval is on; '' where it holds 0, and where there is none."""
        if self.low is None or self.high is None:
            return ""
        return "good" if self.low > 0 else "bad" if self.high < 0 else ""

    def words(self) -> str:
        """'57% (53% to 61%)'."""
        if self.value is None:
            return "–"
        ends = "" if self.low is None or self.high is None else f" ({percent(self.low)} to {percent(self.high)})"
        return percent(self.value) + ends


@dataclass(frozen=True)
class Forest:
    """Shares with their intervals, one row each, between 0% and 100% or wider."""

    kind: ClassVar[str] = "forest"
    title: str
    rows: Sequence[Share]
    x_label: str

    def draw(self) -> Markup:
        """SVG."""
        drawn = [row for row in self.rows if row.value is not None]
        if not drawn:
            return Markup("<p>no gap was there to close</p>")
        ends = [v for row in drawn for v in (row.value, row.low, row.high) if v is not None]
        low, high = max(LEAST, min(0.0, *ends)), max(1.0, min(2.0, max(ends)))
        height, left, right = TOP + ROW * len(self.rows) + BOTTOM, 24, NARROW - 24

        def at(value: float) -> float:
            inside = min(max(value, low), high)
            return left + (inside - low) / (high - low) * (right - left)

        parts = [start(NARROW, height, self.title, "chart rows")]
        floor = height - BOTTOM
        for tick in ticks(low, high):
            css = "axis" if tick in (0, 1) else "grid"
            parts.append(f'<line class="{css}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP}" y2="{floor}"/>')
            parts.append(text(at(tick), floor + 18, percent(tick)))
        parts.append(text((left + right) / 2, height - 8, self.x_label))
        for i, row in enumerate(self.rows):
            parts += _row(row, TOP + ROW * i, at)
        return Markup("".join(parts) + "</svg>")

    def table(self) -> Cells:
        """A row each: share, and its interval."""
        rows = [
            [r.name, percent(r.value), "–" if r.low is None else f"{percent(r.low)} to {percent(r.high)}"]
            for r in self.rows
        ]
        return ["", self.x_label, "95% interval"], rows


def _row(row: Share, top: float, at: Callable[[float], float]) -> list[str]:
    """A row of a forest plot: name and figures, and below them the bar with its marker."""
    hover = f"<title>{escape(row.name)}: {escape(row.words())}</title>"
    middle = top + 32
    name, words = shortened(row.name), row.words()
    places = ("start", 24, name, "name"), ("end", NARROW - 24, words, "name sure" if row.tone else "name")
    parts = [f'<rect class="ground" x="0" y="{top + 2}" width="{NARROW}" height="17"/>']  # keeps grid lines out
    parts += [
        f'<text class="{css}" x="{x}" y="{top + 15}" text-anchor="{anchor}">{escape(said)}{hover}</text>'
        for anchor, x, said, css in places
    ]
    known = row.low is not None and row.high is not None
    if row.low is not None and row.high is not None:
        where = f'x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{middle}" y2="{middle}"'
        parts.append(f'<line class="whisker" {where}>{hover}</line>')
    if row.value is not None:
        parts.append(marker(at(row.value), middle, "s0" if known else "s0 open", f"{row.name}: {row.words()}", 5.5))
    return parts


def shortened(name: str, letters: int = LETTERS) -> str:
    """The name, with … for its middle where it is longer than so many letters."""
    if len(name) <= letters:
        return name
    tail = (letters - 1) // 2
    return f"{name[: letters - 1 - tail]}…{name[-tail:]}"


@dataclass(frozen=True)
class Points:
    """Points of a scatter: (x, y, what hovering says), None where not measured.

    joined: a path in their order, its first point open.
    """

    name: str
    points: Sequence[tuple[float | None, float | None, str]]
    joined: bool = True


@dataclass(frozen=True)
class Scatter:
    """One quantity against another; neither axis is forced to zero. A group has its colour and marker.

    diagonal: the name of the line where both are equal; with it both axes are one, from 0.
    """

    kind: ClassVar[str] = "scatter"
    title: str
    groups: Sequence[Points]
    x_label: str
    y_label: str
    diagonal: str = ""

    def draw(self) -> Markup:
        """SVG with its legend."""
        measured = [(x, y) for g in self.groups for x, y, _ in g.points if x is not None and y is not None]
        if not measured:
            return Markup("<p>nothing was measured</p>")
        frame = Frame(*padded(x for x, _ in measured), *padded(y for _, y in measured))
        if self.diagonal:
            ends = 0.0, 1.06 * max(max(point) for point in measured) or 1.0
            frame = Frame(*ends, *ends)
        parts = frame.axes(self.x_label, self.y_label, self.title)
        if self.diagonal:
            (left, low), (right, high) = (frame.place(end, end) for end in ends)
            parts.append(f'<polyline class="line random" points="{left:.1f},{low:.1f} {right:.1f},{high:.1f}"/>')
        for index, group in enumerate(self.groups):
            css = style(index)
            placed = [(frame.place(x, y), said) for x, y, said in group.points if x is not None and y is not None]
            if group.joined and len(placed) > 1:
                path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in placed)
                parts.append(f'<polyline class="line thin {css}" points="{path}"/>')
            for i, ((x, y), said) in enumerate(placed):
                look = f"{css} open" if group.joined and not i and len(placed) > 1 else css
                parts.append(marker(x, y, look, f"{group.name}: {said}", 5))
        keys = [Key(g.name, style(n), dots=True, line=g.joined) for n, g in enumerate(self.groups)]
        keys += [Key(self.diagonal, "random")] if self.diagonal else []
        return Markup("".join(parts) + "</svg>") + legend(keys)

    def table(self) -> Cells:
        """A row a point."""
        rows = [[g.name, said, number(x), number(y)] for g in self.groups for x, y, said in g.points]
        return ["", "point", self.x_label, self.y_label], rows


@dataclass(frozen=True)
class Arrows(Scatter):
    """A scatter whose groups are arrows, from an open marker to a head. `goal` is where they should go."""

    goal: tuple[float, float, str] | None = None

    def draw(self) -> Markup:
        """SVG with its legend."""
        known = [(x, y) for g in self.groups for x, y, _ in g.points if x is not None and y is not None]
        if not known:
            return Markup("<p>nothing was measured</p>")
        ends = known + ([self.goal[:2]] if self.goal else [])
        frame = Frame(*padded(x for x, _ in ends), *padded(y for _, y in ends))
        parts = frame.axes(self.x_label, self.y_label, self.title)
        keys = []
        for index, group in enumerate(self.groups):
            placed = [(frame.place(x, y), said) for x, y, said in group.points if x is not None and y is not None]
            parts += _arrow(placed, style(index), group.name)
            keys.append(Key(group.name, style(index), dots=True))
        if self.goal:
            across, up = frame.place(*self.goal[:2])
            parts.append(marker(across, up, "null", self.goal[2], 6))
            edge = across > WIDTH - 140
            beside, anchor = (across - 10, "end") if edge else (across + 10, "start")
            parts.append(text(beside, max(TOP + 10, up - 9), "reference", anchor))
        return Markup("".join(parts) + "</svg>") + legend(keys)


def _arrow(placed: Sequence[tuple[tuple[float, float], str]], css: str, name: str) -> list[str]:
    """From the first point, open, to the last, with a head; hovering says both."""
    if not placed:
        return []
    (start, said), (end, reached) = placed[0], placed[-1]
    across, up = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, up)
    if length < HEAD:
        return [marker(*end, css, f"{name}: {reached}", 5)]
    a, b = across / length, up / length
    base = end[0] - HEAD * a, end[1] - HEAD * b
    left, right = ((base[0] - side * b, base[1] + side * a) for side in (HEAD / 2, -HEAD / 2))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, left, right))
    hover = f"<title>{escape(name)}: {escape(reached)}</title>"
    return [
        f'<polyline class="line {css}" points="{start[0]:.1f},{start[1]:.1f} {base[0]:.1f},{base[1]:.1f}"/>',
        marker(*start, f"{css} open", f"{name}: {said}", 5),
        f'<polygon class="dot {css}" points="{points}">{hover}</polygon>',
    ]


_ANCHORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""The viridis scale, which colour-blind readers and grey printers see rise."""

SIDE = 310.0
"""Length of a heatmap's longer side, in viewBox units."""

SHADES = 48
"""Colours of a heatmap; cells of one shade are one path where hovering is left out."""


def shade(share: float) -> str:
    """The colour of a value between 0 and 1, '#rrggbb'."""
    at = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    i = min(int(at), len(_ANCHORS) - 2)
    pair = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in _ANCHORS[i : i + 2]]
    mixed = [round(a + (b - a) * (at - i)) for a, b in zip(*pair, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


@dataclass(frozen=True)
class Heatmap:
    """Cells coloured from 0 (dark) to 1 (bright), values beyond drawn as these; row 0 is at the bottom.

    values: [rows][columns]; None is left blank.
    rows, columns: their names, by default their numbers.
    hover: say each cell's value when hovered; without it, cells of one shade are joined into one path.
    """

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
        down, across = len(self.values), max(map(len, self.values), default=0)
        if not across:
            return Markup("<p>nothing was measured</p>")
        names = (self.rows or [str(i) for i in range(down)], self.columns or [str(i) for i in range(across)])
        width, side = _cell(across, down)
        left = 48.0
        size = left + SIDE + 52, down * side + 58
        parts = [start(*size, self.title, "chart cells")]
        floor = 10 + down * side
        for i, row in enumerate(self.values):
            for j, value in enumerate(row):
                if self.hover and value is not None:
                    x, y = left + j * width, floor - (i + 1) * side
                    said = f"{self.y_label} {names[0][i]}, {self.x_label} {names[1][j]}: {value:.3f}"
                    box = f'x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{side + 0.3:.1f}"'
                    parts.append(f'<rect {box} fill="{shade(value)}"><title>{escape(said)}</title></rect>')
        if not self.hover:
            parts += _paths(self.values, left, floor, width, side)
        for i in _some(down):
            parts.append(text(left - 6, floor - (i + 0.5) * side + 4, names[0][i], "end"))
        for j in _some(across):
            parts.append(text(left + (j + 0.5) * width, floor + 16, names[1][j]))
        parts.append(text(left + across * width / 2, floor + 38, self.x_label))
        middle = 10 + down * side / 2
        turned = f'transform="rotate(-90 14 {middle:.0f})"'
        parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(self.y_label)}</text>')
        return Markup("".join(parts + _bar(left + across * width + 16, 10, down * side)) + "</svg>")

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


def _cell(across: int, down: int) -> tuple[float, float]:
    """Width and height of a cell: square where the grid nearly is."""
    if across <= 2 * down and down <= 2 * across:
        return (SIDE / max(across, down),) * 2
    return SIDE / across, min(24.0, SIDE / down)


def _paths(values: Sequence[Sequence[float | None]], left: float, floor: float, width: float, side: float) -> list[str]:
    """One path for each shade, its cells as rectangles."""
    cells: dict[int, list[str]] = {}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                corner = f"M{left + j * width:.1f} {floor - (i + 1) * side:.1f}"
                level = round(min(max(value, 0.0), 1.0) * (SHADES - 1))
                cells.setdefault(level, []).append(f"{corner}h{width:.1f}v{side:.1f}h-{width:.1f}z")
    return [f'<path fill="{shade(k / (SHADES - 1))}" d="{"".join(d)}"/>' for k, d in sorted(cells.items())]


def _bar(x: float, y: float, height: float) -> list[str]:
    """The scale of colours beside a heatmap, 1 on top."""
    steps = 24
    piece = height / steps
    parts = []
    for i in range(steps):
        at = y + height - (i + 1) * piece
        where = f'x="{x:.1f}" y="{at:.1f}" width="10" height="{piece + 0.3:.1f}"'
        parts.append(f'<rect {where} fill="{shade((i + 0.5) / steps)}"/>')
    return parts + [text(x + 14, y + height * (1 - v) + (9 if v == 1 else 0), f"{v:g}", "start") for v in (0, 0.5, 1)]


def _some(count: int, about: int = 6) -> list[int]:
    """Positions to label: all where they are few, else evenly spread from 0."""
    return list(range(0, count, max(1, -(-count // about))))


Chart = Lines | Forest | Scatter | Heatmap
