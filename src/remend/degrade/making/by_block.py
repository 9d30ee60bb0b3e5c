"""A degradation with one block of the model in memory: each is read, changed and written before the next one comes.

What is written is what `run_job` writes of the whole model, byte for byte. A killed process is gone on with, block by
block, by the same command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from remend.console import stage
from remend.data.given import write_rows
from remend.degrade.making.job import Changed, Damage, probed, record_of, write_record
from remend.errors import InputError
from remend.files.atomic import JsonObject, resumable_directory
from remend.files.environment import environment
from remend.models.blocks import part_of, parts_of
from remend.models.blocks.opening import from_disk
from remend.models.blocks.saving import planned_model
from remend.models.blocks.writing import PartByPart, PlannedFile, PlannedFiles, tensors_of
from remend.models.find import find_model
from remend.models.layers import decoder_layers
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM


class BlockWork(Protocol):
    """What a kind of damage does to a model block by block."""

    def chosen(self, model: CausalLM) -> Mapping[str, Matrix]:
        """The matrices that are changed. Raises InputError for those that can't be."""

    def beside(self, chosen: Mapping[str, Matrix], directory: Path) -> list[PlannedFile]:
        """Files that lie beside the model, as they will be."""

    def change(self, matrix: Matrix) -> Mapping[str, Tensor]:
        """Change a matrix in place; what of it goes into the files beside the model, by name."""

    def changed(self, model: CausalLM, chosen: Mapping[str, Matrix], zeros: Mapping[str, int]) -> Changed:
        """What was made. The model is without its blocks' weights; `zeros` are counted for every matrix by its key."""


def run_by_block(damage: Damage, work: BlockWork, model: str, hashes: Mapping[str, str], out: Path) -> JsonObject:
    """Damage a model whose blocks are not in memory, save it and measure what it lost; see `run_job`.

    Args:
        damage: its reference and student are one such model.
        work: what is done.
        model, hashes: its name, and SHA-256 of its files.
        out: a new directory.

    Raises:
        InputError: what `work` raises; a model with matrices outside of its blocks.
        FileError: the model's files change meanwhile, or the disk has no room.
    """
    reference, settings = damage.reference, damage.settings
    chosen, every = work.chosen(reference), matrices(reference)
    _require_inside(reference, chosen)
    asked = {"settings": settings.model_dump(mode="json"), "model": model, "files": dict(hashes), **_versions()}
    with resumable_directory(out, asked) as target:
        files = planned_model(reference, damage.tokenizer, target)
        write_rows(out, target)
        weights = PlannedFiles([*files, *work.beside(chosen, target)])
        parts, zeros = PartByPart(target, weights), dict[str, int]()
        with stage(settings.title(), len(parts_of(reference))) as advance:
            for number in parts_of(reference):
                about = parts.done(number) or _write_part(reference, number, chosen, every, work, weights, parts)
                zeros |= about["zeros"]
                advance()
        parts.end()
        changed = work.changed(reference, chosen, zeros)
        record = record_of(damage, changed, model, hashes)
        write_record(target, damage, reference, record)
    if settings.probe:
        source = find_model(str(out), trust_remote_code=settings.trust_remote_code)
        probed(damage, lambda: from_disk(source, device=reference.device), model, out, record)
    return record


@torch.no_grad()
def _write_part(
    model: CausalLM,
    number: int,
    chosen: Mapping[str, Matrix],
    every: Mapping[str, Matrix],
    work: BlockWork,
    files: PlannedFiles,
    parts: PartByPart,
) -> JsonObject:
    """Change and write a block, or after the last one what is no block; and what is counted in it."""
    tensors: dict[str, Tensor] = {}
    zeros: dict[str, int] = {}
    with part_of(model, number) as modules:
        inside = {id(module) for module in modules.values()}
        for name, matrix in every.items():
            if id(matrix.module) in inside:
                tensors |= work.change(matrix) if name in chosen else {}
                zeros[matrix.key] = int((matrix.weight_OI == 0).sum())
        tensors |= tensors_of(modules, files)
        about: JsonObject = {"zeros": zeros}
        parts.write(tensors, about)
    return about


def _require_inside(model: CausalLM, chosen: Mapping[str, Matrix]) -> None:
    inside = {id(module) for block in decoder_layers(model) for module in block.modules()}
    outside = [name for name, matrix in chosen.items() if id(matrix.module) not in inside]
    if outside:
        raise InputError(
            f"{type(model).__name__} has matrices outside of its blocks ({', '.join(outside[:2])}), and those can't be "
            "changed with the blocks on the disk; give --placement device, or skip these layers"
        )


def _versions() -> dict[str, Any]:
    """What the numbers may depend on."""
    return {key: environment()[key] for key in ("versions", "git_commit")}
