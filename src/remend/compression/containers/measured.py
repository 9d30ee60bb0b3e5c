"""What is exported: a model directory as it was measured, with the grid that its weights lie on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remend.compression import recognise
from remend.compression.stored_grid import StoredGrid
from remend.console import stage
from remend.errors import InputError
from remend.files.atomic import read_json
from remend.files.run_directory import MANIFEST
from remend.models.adapters import is_adapter
from remend.models.find import ModelSource, fetch_model, find_model
from remend.models.load import load_model, load_tokenizer
from remend.registry import Registry


@dataclass(frozen=True)
class Measured:
    """A loaded model and what is known of it. `run` is the run's directory, or None for a model alone."""

    source: ModelSource
    model: Any
    tokenizer: Any
    stored: StoredGrid | None
    mask: str | None
    degradation: dict[str, Any] | None
    run: Path | None

    @property
    def grid(self) -> str:
        """The grid's name, or 'none'."""
        return self.stored.format.name if self.stored else "none"


Container = Callable[[Measured, Path, str], dict[str, Any]]
"""Writes a measured model into a directory. The string is what follows the colon in --format, or ''. Returns facts."""

CONTAINERS: Registry[Container] = Registry("container")


def open_measured(source: str, *, trust_remote_code: bool = False) -> Measured:
    """Load a run's recovered model, or any model, in float32 on the CPU.

    Raises InputError when a run has no model yet or the weights don't lie on the grid beside them, and FileError when
    the model can't be read.
    """
    path = Path(source)
    of_run = path if (path / MANIFEST).is_file() else None
    finished = (path / "model" / "config.json").is_file() or is_adapter(path / "model")
    if of_run and not finished:
        raise InputError(
            f"the run {path} has no recovered model yet; finish it with remend recover --resume {path}, then export"
        )
    where = find_model(str(path / "model") if of_run else source)
    if where.kind == "adapter":
        raise InputError(
            f"{where.spec} is an adapter, which stays apart from its base: it is a peft directory already, and merged "
            "it would move the base's weights off what was measured. Export the base, and load the adapter on it"
        )
    where = fetch_model(where, weights=True)
    found = recognise.recognise(where, as_dense=True)
    with stage(f"loading {where.spec}"):
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
        model = load_model(where, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    if found.stored:
        found.stored.check(model)
    mask = found.why if found.mask else None
    return Measured(where, model, tokenizer, found.stored, mask, _degradation(where, of_run), of_run)


def _degradation(where: ModelSource, of_run: Path | None) -> dict[str, Any] | None:
    """degradation.json from the model's directory, else from the student that the run began with."""
    places = [where.path] if where.kind == "directory" else []
    if of_run:
        student = read_json(of_run / MANIFEST).get("recipe", {}).get("student")
        places += [Path(student)] if isinstance(student, str) else []
    for place in places:
        if place and (place / "degradation.json").is_file():
            content = read_json(place / "degradation.json")
            return content if isinstance(content, dict) else None
    return None
