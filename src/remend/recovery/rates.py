"""AdamW's peak where the recipe names none: by what is trained, and by the size of the model.

What is trained sets the rate at 135M parameters (`ConstraintKind.learning_rate`), where it was measured. Larger models
want smaller steps. Between the sizes of a table the share of that rate lies on a line in log size and log rate; below
the first size and above the last it stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEASURED = "measured on SmolLM2-135M (docs/measurements/degradations.md)"


@dataclass(frozen=True)
class Point:
    """At this many parameters a rate is `share` of what it is at 135M, by `source`."""

    parameters: float
    share: float
    source: str


WEIGHTS = (
    Point(135e6, 1.0, MEASURED),
    Point(3e9, 0.1, "after SDFT's 2e-5 for all weights"),
    Point(7e9, 0.05, "after SDFT's 1e-5 for all weights"),
)
"""Of all weights, of which dense ones have 2e-4 at 135M. The authors of SDFT (arXiv 2601.19897) trained models of 3B to
14B with 1e-5, in one script with 2e-5, which is taken for the smallest. Grids and masks have the same shares: for them
that is no measurement."""

ADAPTER = (
    Point(135e6, 1.0, MEASURED),
    Point(3e9, 0.25, "the lower end of tinker's recipes for LoRA"),
)
"""Of an adapter, which has 2e-3 at 135M."""


@dataclass(frozen=True)
class Rate:
    """AdamW's peak, and where it comes from in words."""

    value: float
    source: str

    def line(self) -> str:
        """learning rate 5e-5: measured on …"""
        return f"learning rate {in_words(self.value)}: {self.source}"


def rate_for(parameters: int, small: float, points: Sequence[Point]) -> Rate:
    """The rate of a model of this size.

    Args:
        parameters: of the whole model, trained or not.
        small: the rate at the first point's size.
        points: by rising size.
    """
    after = next((i for i, point in enumerate(points) if parameters <= point.parameters), len(points))
    if after in (0, len(points)):
        point = points[min(after, len(points) - 1)]
        return Rate(_rounded(small * point.share), point.source)
    low, high = points[after - 1], points[after]
    progress = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
    share = low.share * (high.share / low.share) ** progress
    ends = (f"{in_words(_rounded(small * p.share))} at {_size(p.parameters)}, {p.source}," for p in (low, high))
    return Rate(_rounded(small * share), f"{_size(parameters)} parameters lie between {' and '.join(ends)}"[:-1])


def in_words(rate: float) -> str:
    """5e-5, as people write it."""
    digits, e, power = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}{e}{int(power)}"


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
