"""Dense: a plain transformers directory. Every model fits, and every reader of transformers models opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remend.compression.containers.measured import CONTAINERS, Measured
from remend.errors import InputError
from remend.models.load import save_model


@CONTAINERS.register("dense", source="safetensors, one float32 tensor a weight")
def write_dense(measured: Measured, target: Path, kind: str) -> dict[str, Any]:
    """Write float32 safetensors, the grid beside them where there is one. Raises InputError for 'dense:KIND'."""
    if kind:
        raise InputError(f'format "dense:{kind}" is unknown; dense has no kinds, write --format dense')
    save_model(measured.model, measured.tokenizer, target)
    if measured.stored:
        measured.stored.write(target)
    if measured.mask:
        return {"container": f"dense with zeros ({measured.mask}); the zeros are stored like any other weight"}
    return {"container": "dense"}
