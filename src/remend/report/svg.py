"""Line charts as inline SVG, readable without scripts and in dark mode (colours are CSS variables)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, its CSS class, its points. `dots` marks every point; `joined` draws the line."""

    name: str
    css: str
    points: Sequence[Point]
    dots: bool = False
    joined: bool = True


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high, `about` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> Markup:
    """An SVG element. The y axis begins at zero; the title is its text alternative."""
    points = [p for s in series for p in s.points]
    if not points:
        return Markup("<p>no steps were trained</p>")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_high = max(y for _, y in points) * 1.05 or 1.0
    x_high = x_high if x_high > x_low else x_low + 1

    def place(x: float, y: float) -> Point:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">']
    for y in ticks(0, y_high):
        _, at = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high, 8):
        at, _ = place(x, 0)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    for s in series:
        placed = [place(x, y) for x, y in s.points]
        if s.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="line {s.css}" points="{path}"/>')
        if s.dots:
            parts += [f'<circle class="dot {s.css}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in placed]
    parts.append("</svg>")
    legend = "".join(f'<span class="key {s.css}">{escape(s.name)}</span>' for s in series if s.points)
    return Markup("".join(parts) + f'<p class="legend">{legend}</p>')
