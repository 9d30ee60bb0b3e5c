"""Open what is exported: a model as it was measured, a run's recovered one or any other."""

from __future__ import annotations

from pathlib import Path

import torch

from remend.compression.containers import Measured
from remend.compression.recognise import recognise
from remend.compression.record import read_record
from remend.console import stage
from remend.errors import InputError
from remend.files.atomic import JsonObject, read_json
from remend.files.run_directory import MANIFEST
from remend.models.adapters import is_adapter
from remend.models.find import ModelSource, fetch_model, find_model
from remend.models.load import load_model, load_tokenizer


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
    where = find_model(str(path / "model") if of_run else source, trust_remote_code=trust_remote_code)
    if where.kind == "adapter":
        raise InputError(
            f"{where.spec} is an adapter, which stays apart from its base: it is a peft directory already, and merged "
            "it would move the base's weights off what was measured. Export the base, and load the adapter on it"
        )
    where = fetch_model(where, weights=True)
    held = recognise(where, as_dense=True)
    with stage(f"loading {where.spec}"):
        tokenizer = load_tokenizer(where)
        model = load_model(where, dtype=torch.float32, device=torch.device("cpu"))
    if held.stored:
        held.stored.check(model)
    mask = held.why if held.mask else None
    return Measured(where, model, tokenizer, held.stored, mask, _degradation(where, of_run), of_run)


def _degradation(where: ModelSource, of_run: Path | None) -> JsonObject | None:
    """degradation.json from the model's directory, else from the student that the run began with."""
    places = [where.path] if where.kind == "directory" else []
    if of_run:
        student = read_json(of_run / MANIFEST).get("recipe", {}).get("student")
        places += [Path(student)] if isinstance(student, str) else []
    records = (read_record(place) for place in places if place)
    return next((record for record in records if record), None)
