"""The five golden recipes still compute the figures that stand in fixtures/golden.json.

Exactly on the kind of CPU that gave them, elsewhere to 1e-4. A change that is meant renews them: `make golden-figures`,
and the commit says what changed and why. benchmarks/golden.py compares far more, with the code of another commit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import remend
from helpers.golden import RECIPES, SHARED, assert_same, cpu_kind, figures

FIXTURES = Path(__file__).parent / "fixtures"
FIGURES = FIXTURES / "golden.json"
OLD = FIXTURES / "run-13d6498"

MAKE = {
    "int3": partial(remend.quantize, format="int3-g32", probe=False),
    "mask": partial(remend.prune, method="wanda", sparsity="2:4", data="prompts.jsonl", probe=False),
    # fine-tuning takes bfloat16 where a CPU has it, so its result is kept
    "forgot": lambda _, out: shutil.copytree(OLD / "forgot", out),
    "cache": partial(remend.cache_teacher, data="prompts.jsonl", k=16, max_new_tokens=8),
}
"""What makes the students and the cached teacher that the recipes name."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compute(name: str) -> dict[str, object]:
    """The figures of one recipe, on the healthy model of an old run, in the working directory."""
    for file in ("prompts.jsonl", "rows.jsonl"):
        shutil.copy(OLD / file, file)
    shutil.copytree(OLD / "reference", "reference")
    with one_thread():
        for made, make in MAKE.items():
            if f'"given/{made}"' in json.dumps(RECIPES[name]):
                make("reference", Path("given", made))
        return figures(remend.recover(**{**SHARED, **RECIPES[name], "out": "run"}).out)


@pytest.mark.parametrize("name", RECIPES)
def test_figures_stand(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert_same(compute(name), kept["recipes"][name], kept["cpu"])


def renew() -> None:
    """Write the figures of this machine."""
    recipes = {}
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            recipes[name] = compute(name)
    FIGURES.write_text(json.dumps({"cpu": cpu_kind(), "recipes": recipes}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    renew()
