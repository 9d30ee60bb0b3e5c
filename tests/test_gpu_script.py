"""benchmarks/gpu.sh is a script that bash can read, and names cells that the study has."""

from __future__ import annotations

import subprocess
from pathlib import Path

from remend.studies.grid import chosen
from remend.studies.plan import read_study

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def bash(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], capture_output=True, text=True, check=False)


def test_bash_can_read_it() -> None:
    assert bash("-n", str(SCRIPT)).returncode == 0


def test_every_part_names_cells_of_the_study_and_together_they_are_all() -> None:
    study = read_study("paper-small")
    parts = bash(str(SCRIPT), "list").stdout.split()
    assert parts[0] == "named"
    cells = {part: chosen(study, bash(str(SCRIPT), "cells", part).stdout.split()) for part in parts}
    named = [cell for cell in cells["named"] if cell.method.trained]
    assert len(named) == 3 * 4 * 3  # grids and width × SFT, repair, SDFT and both × seeds
    assert len(cells["rest"]) == len(study.cells)


def test_unknown_words_are_refused() -> None:
    for words in (("run", "nothing"), ("ran",)):
        done = bash(str(SCRIPT), *words)
        assert done.returncode == 2
        assert "unknown" in done.stderr
