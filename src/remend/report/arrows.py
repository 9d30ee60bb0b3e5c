"""A chart of arrows: where models were, where they are, and where they should be, on two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from remend.report.page import Scatter
from remend.report.svg import TOP, WIDTH, Frame, Key, legend, marker, padded, style, text

HEAD = 9.0
"""Length of an arrow's head, in viewBox units."""


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
