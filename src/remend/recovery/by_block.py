"""A run whose student's blocks are on the disk: what it was repaired to lies there too, until the model is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from remend.compression.recognise import record_to_keep
from remend.compression.stored_grid import StoredGrid
from remend.console import console, stage
from remend.files.atomic import JsonObject, new_directory, remove_directory, write_json
from remend.files.signed import signed
from remend.models.blocks import blocks_in, by_block, part_of, parts_of
from remend.models.blocks.disk import OnDisk
from remend.models.blocks.journal import BlockJournal
from remend.models.blocks.saving import planned_model
from remend.models.blocks.writing import PlannedFiles, tensors_of
from remend.models.protocols import CausalLM
from remend.models.written import FILES, RECORD, hashes_of
from remend.recovery.begin import Run

BLOCKS = "repaired-blocks"
"""In a run's directory, while it repairs: what has come of each block."""


def journal_of(run: Run, student: CausalLM) -> BlockJournal | None:
    """Where a repair keeps its blocks; None for a student in memory."""
    return BlockJournal(_on_disk(student), _place(run)) if by_block(student) else None


def forget_blocks(run: Run, student: CausalLM) -> None:
    """The student is what it came as."""
    _on_disk(student).keep_changes(None)
    remove_blocks(run)


def remove_blocks(run: Run) -> None:
    """Remove what a repair kept, once nothing will ask for it: until then a killed run need not repair again."""
    if _place(run).is_dir():
        remove_directory(_place(run))


@torch.no_grad()
def save_by_block(run: Run, student: CausalLM, dtype: torch.dtype, why: str) -> JsonObject:
    """`save.save` of a student whose blocks are on the disk, with the same files: block by block.

    Args:
        student: as it was repaired.
        dtype, why: of the saved weights, and why it is that.
    """
    plan, stored = run.plan, run.plan.facts.recognised.stored
    with stage("saving the model", len(parts_of(student))) as advance, new_directory(run.results / "model") as target:
        size = plan.config.max_shard_size
        files = planned_model(student, plan.tokenizer, target, max_shard_size=size, dtype=dtype)
        grid = [stored.planned(target)] if stored else []
        weights = PlannedFiles([*files, *grid])
        weights.create()
        for number in parts_of(student):
            weights.write(_part(student, number, stored, weights, dtype))
            advance()
        if stored:
            weights.write(stored.carried_tensors())
        record = record_to_keep(plan.student, plan.facts.recognised)
        if record:
            write_json(target / RECORD, signed(record))
        files_written = hashes_of(target)
    name = str(dtype).removeprefix("torch.")
    console.print(f"the model is saved in {name}: {why}", soft_wrap=True)
    return {"dtype": name, "why": why, FILES: files_written}


def _part(
    student: CausalLM, number: int, stored: StoredGrid | None, files: PlannedFiles, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is written of a block, or after the last one of everything else."""
    with part_of(student, number) as modules:
        parameters = {f"{n}.{own}" for n, m in modules.items() for own, _ in m.named_parameters(recurse=False)}
        tensors = {n: t.to(dtype) if n in parameters else t for n, t in tensors_of(modules, files).items()}
    if stored is None:
        return tensors
    written = _on_disk(student).written(number) if number < _on_disk(student).count else None
    return tensors | stored.parts_in(student, modules) | dict(written[0] if written else {})


def _on_disk(student: CausalLM) -> OnDisk:
    blocks = blocks_in(student)
    assert isinstance(blocks, OnDisk)
    return blocks


def _place(run: Run) -> Path:
    return run.directory.path / BLOCKS


def without_steps(run: Run, saved: JsonObject, repair: JsonObject | None) -> JsonObject:
    """What the summary says of a run that was asked for no steps: what was saved, and the record of its repair."""
    return {
        "saved": saved,
        "repair": repair,
        "steps": 0,
        "learning_rate": run.plan.learning_rate,
        "gradient_checkpointing": False,
        "selected": {"step": 0},
        "streams": {},
    }
