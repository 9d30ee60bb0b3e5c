"""The learning rate's default follows what is trained and how large the model is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from remend.recovery.rates import ADAPTER, WEIGHTS, rate_for
from remend.training.constraints.adapter import ADAPTER_RATE
from remend.training.constraints.grid import FINE_GRID_RATE
from remend.training.constraints.kind import RATE, REPAIRED_RATE


def test_small_models_keep_what_was_measured_and_large_ones_have_the_authors() -> None:
    assert rate_for(200_000, RATE, WEIGHTS).line() == (
        "learning rate 2e-4: measured on SmolLM2-135M (docs/measurements/degradations.md)"
    )
    assert rate_for(134_515_008, FINE_GRID_RATE, WEIGHTS).value == FINE_GRID_RATE
    assert rate_for(3_000_000_000, RATE, WEIGHTS).value == pytest.approx(2e-5)
    assert rate_for(70_000_000_000, RATE, WEIGHTS).line() == "learning rate 1e-5: after SDFT's 1e-5 for all weights"
    assert rate_for(70_000_000_000, ADAPTER_RATE, ADAPTER).value == 5e-4


def test_between_two_sizes_it_lies_between_and_says_so() -> None:
    made = rate_for(1_100_000_000, RATE, WEIGHTS)
    assert 2e-5 < made.value < 2e-4
    assert made.source == (
        "1.1B parameters lie between 2e-4 at 135M, measured on SmolLM2-135M (docs/measurements/degradations.md), and "
        "2e-5 at 3B, after SDFT's 2e-5 for all weights"
    )


def test_the_table_in_the_docs_is_what_is_computed() -> None:
    text = (Path(__file__).parents[2] / "docs/explanation/defaults.md").read_text()
    sizes = (135_000_000, 500_000_000, 1_000_000_000, 3_000_000_000, 7_000_000_000)
    rows = {"all weights": RATE, "a repaired grid of up": REPAIRED_RATE, "a repaired grid of more": FINE_GRID_RATE}
    for words, small, points in [*((w, s, WEIGHTS) for w, s in rows.items()), ("an adapter", ADAPTER_RATE, ADAPTER)]:
        (row,) = re.findall(rf"^\| {words}[^|]*\| [0-9].*", text, re.M)
        shown = [float(cell) for cell in row.strip("| ").split("|")[1:]]
        assert shown == [rate_for(size, small, points).value for size in sizes]
