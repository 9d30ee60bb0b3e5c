"""Further charts as inline SVG: intervals side by side, one quantity against another, a grid of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from remend.report.svg import BOTTOM, TOP, Frame, Key, legend, marker, padded, start, style, text, ticks

NARROW, ROW = 440, 50
"""Width of a forest plot, so that a phone shows it whole, and height of its rows, in viewBox units."""

LETTERS = 40
"""Longer names are cut in the middle; hovering shows them whole."""

LEAST = -1.0
"""A gap closed below it is drawn at the edge: a failed run must not squeeze the others. Its figure stands beside it."""


@dataclass(frozen=True)
class Share:
    """A row of a forest plot: a share with the ends of its interval, None where there is none."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None

    def words(self) -> str:
        """'57% (53% to 61%)'."""
        if self.value is None:
            return "–"
        ends = "" if self.low is None or self.high is None else f" ({percent(self.low)} to {percent(self.high)})"
        return percent(self.value) + ends


@dataclass(frozen=True)
class Group:
    """Points of a scatter: (x, y, what hovering says), None where not measured.

    joined: a path in their order, its first point open.
    """

    name: str
    points: Sequence[tuple[float | None, float | None, str]]
    joined: bool = True


def percent(value: float | None) -> str:
    """'57%', with a true minus; a dash for None."""
    return "–" if value is None else f"{value:.0%}".replace("-", "−")


def shortened(name: str, letters: int = LETTERS) -> str:
    """The name, with … for its middle where it is longer than so many letters."""
    if len(name) <= letters:
        return name
    tail = (letters - 1) // 2
    return f"{name[: letters - 1 - tail]}…{name[-tail:]}"


def forest_plot(rows: Sequence[Share], *, x_label: str, title: str) -> Markup:
    """Shares with their intervals, one row each, between 0% and 100% or wider."""
    drawn = [row for row in rows if row.value is not None]
    if not drawn:
        return Markup("<p>no gap was there to close</p>")
    ends = [v for row in drawn for v in (row.value, row.low, row.high) if v is not None]
    low, high = max(LEAST, min(0.0, *ends)), max(1.0, min(2.0, max(ends)))
    height, left, right = TOP + ROW * len(rows) + BOTTOM, 24, NARROW - 24

    def at(value: float) -> float:
        inside = min(max(value, low), high)
        return left + (inside - low) / (high - low) * (right - left)

    parts = [start(NARROW, height, title, "chart rows")]
    floor = height - BOTTOM
    for tick in ticks(low, high):
        css = "axis" if tick in (0, 1) else "grid"
        parts.append(f'<line class="{css}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(text(at(tick), floor + 18, percent(tick)))
    parts.append(text((left + right) / 2, height - 8, x_label))
    for i, row in enumerate(rows):
        parts += _row(row, TOP + ROW * i, at)
    return Markup("".join(parts) + "</svg>")


def _row(row: Share, top: float, at: Callable[[float], float]) -> list[str]:
    """A row of a forest plot: name and figures, and below them the bar with its marker."""
    hover = f"<title>{escape(row.name)}: {escape(row.words())}</title>"
    middle = top + 32
    shown = f"{shortened(row.name)}: {row.words()}"
    width = 7.0 * len(shown)  # a generous guess: the ground that keeps grid lines out of the words
    parts = [
        f'<rect class="ground" x="{(NARROW - width) / 2:.1f}" y="{top + 2}" width="{width:.1f}" height="17"/>',
        f'<text class="name" x="{NARROW / 2}" y="{top + 15}" text-anchor="middle">{escape(shown)}{hover}</text>',
    ]
    known = row.low is not None and row.high is not None
    if row.low is not None and row.high is not None:
        where = f'x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{middle}" y2="{middle}"'
        parts.append(f'<line class="whisker" {where}>{hover}</line>')
    if row.value is not None:
        parts.append(marker(at(row.value), middle, "s0" if known else "s0 open", f"{row.name}: {row.words()}", 5.5))
    return parts


def scatter(groups: Sequence[Group], *, x_label: str, y_label: str, title: str) -> Markup:
    """One quantity against another; neither axis is forced to zero. A group has its colour and marker."""
    measured = [(x, y) for g in groups for x, y, _ in g.points if x is not None and y is not None]
    if not measured:
        return Markup("<p>nothing was measured</p>")
    frame = Frame(*padded(x for x, _ in measured), *padded(y for _, y in measured))
    parts = frame.axes(x_label, y_label, title)
    for number, group in enumerate(groups):
        css = style(number)
        placed = [(frame.place(x, y), said) for x, y, said in group.points if x is not None and y is not None]
        if group.joined and len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in placed)
            parts.append(f'<polyline class="line thin {css}" points="{path}"/>')
        for i, ((x, y), said) in enumerate(placed):
            look = f"{css} open" if group.joined and not i and len(placed) > 1 else css
            parts.append(marker(x, y, look, f"{group.name}: {said}", 5))
    keys = [Key(g.name, style(n), dots=True, line=g.joined) for n, g in enumerate(groups)]
    return Markup("".join(parts) + "</svg>") + legend(keys)


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


def heatmap(
    values: Sequence[Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    hover: bool = True,
) -> Markup:
    """Cells coloured from 0 (dark) to 1 (bright), values beyond drawn as these; row 0 is at the bottom.

    Args:
        values: [rows][columns]; None is left blank.
        x_label, y_label, title: of the axes and the text alternative.
        rows, columns: their names, by default their numbers.
        hover: say each cell's value when hovered; without it, cells of one shade are joined into one path.
    """
    down, across = len(values), max(map(len, values), default=0)
    if not across:
        return Markup("<p>nothing was measured</p>")
    names = (rows or [str(i) for i in range(down)], columns or [str(i) for i in range(across)])
    width, side = _cell(across, down)
    left = 48.0
    size = left + SIDE + 52, down * side + 58
    parts = [start(*size, title, "chart cells")]
    floor = 10 + down * side
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if hover and value is not None:
                x, y = left + j * width, floor - (i + 1) * side
                said = f"{y_label} {names[0][i]}, {x_label} {names[1][j]}: {value:.3f}"
                box = f'x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{side + 0.3:.1f}"'
                parts.append(f'<rect {box} fill="{shade(value)}"><title>{escape(said)}</title></rect>')
    if not hover:
        parts += _paths(values, left, floor, width, side)
    for i in _some(down):
        parts.append(text(left - 6, floor - (i + 0.5) * side + 4, names[0][i], "end"))
    for j in _some(across):
        parts.append(text(left + (j + 0.5) * width, floor + 16, names[1][j]))
    parts.append(text(left + across * width / 2, floor + 38, x_label))
    middle = 10 + down * side / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return Markup("".join(parts + _bar(left + across * width + 16, 10, down * side)) + "</svg>")


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
