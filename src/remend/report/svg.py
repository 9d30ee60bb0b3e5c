"""Pieces of charts as inline SVG, readable without scripts and in dark mode: colours, dashes, markers are CSS classes.

A class s0 … s5 is a colour with a dash and a marker of its own, so that no line is told apart by its colour alone.
Lengths are in the units of the viewBox; every function is pure and returns Markup with all text escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 290
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 14, 46
STYLES = 6
"""How many lines are told apart; a seventh looks like the first again."""

Point = tuple[float, float | None]
"""x, and y or None where nothing was measured."""


@dataclass(frozen=True)
class Frame:
    """Where a value lies in a drawing of `height`. whole: x counts something, so only whole numbers are ticked."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int = HEIGHT
    whole: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates of a point."""
        across = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)
        return across, self.height - BOTTOM - up

    def axes(self, x_label: str, y_label: str, title: str) -> list[str]:
        """The element's start, with grid, ticks and labels."""
        parts = [start(WIDTH, self.height, title)]
        for y in ticks(self.y_low, self.y_high, 6):
            _, at = self.place(self.x_low, y)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(text(LEFT - 8, at + 4, f"{y:g}", "end"))
        across = ticks(self.x_low, self.x_high, 8)
        for x in [x for x in across if not self.whole or x == round(x)]:
            at, _ = self.place(x, self.y_low)
            parts.append(text(at, self.height - BOTTOM + 18, f"{x:g}"))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, self.height - 8, x_label))
        if not y_label:
            return parts
        middle = (TOP + self.height - BOTTOM) / 2
        turned = f'transform="rotate(-90 12 {middle:.0f})"'
        parts.append(f'<text x="12" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
        return parts


def start(width: float, height: float, title: str, css: str = "chart") -> str:
    """The opening tag of a drawing; the title is its text alternative."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" class="{css}">'


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    """A text element; anchor is start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def padded(values: Iterable[float]) -> tuple[float, float]:
    """Where an axis begins and ends so that its outermost points stay clear of the edge."""
    known = list(values)
    low, high = min(known), max(known)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return low - pad, high + pad


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high, `about` of them."""
    raw = (high - low) / about
    if not 0 < raw < math.inf or not math.isfinite(low / raw) or not math.isfinite(high / raw):
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def style(number: int) -> str:
    """The class of the number-th line of a chart."""
    return f"s{number % STYLES}"


def marker(x: float, y: float, css: str, title: str = "", size: float = 4.0) -> str:
    """A dot whose shape goes with its class: circle, square, diamond, triangle up, triangle down, ring."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    look = f'class="dot {escape(css)}"'
    kind = next((name for name in css.split() if name in _SHAPES), "")
    if kind:
        corners = " ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in _SHAPES[kind])
        return f'<polygon {look} points="{corners}">{inner}</polygon>'
    return f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="{size:g}">{inner}</circle>'


_SHAPES = {
    "s1": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "s2": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "s3": ((0, -1.2), (1.2, 0.9), (-1.2, 0.9)),
    "s4": ((-1.2, -0.9), (1.2, -0.9), (0, 1.2)),
}


@dataclass(frozen=True)
class Key:
    """A name in a legend, its class, and whether it stands for a marker, a line or both."""

    name: str
    css: str
    dots: bool = False
    line: bool = True


def legend(keys: Sequence[Key]) -> Markup:
    """The names of lines, each after a piece of its line."""
    parts = []
    for key in keys:
        line = f'<line class="line {escape(key.css)}" x1="0" x2="26" y1="6" y2="6"/>' if key.line else ""
        swatch = line + (marker(13, 6, key.css) if key.dots else "")
        drawing = f'<svg viewBox="0 0 26 12" aria-hidden="true">{swatch}</svg>'
        parts.append(f'<span class="key">{drawing}{escape(key.name)}</span>')
    return Markup('<p class="legend">' + "".join(parts) + "</p>")
