"""Fine-tune a model: the rows, the training, and what describes the result."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from remend.compression.recognise import was_pruned
from remend.compression.stored_grid import GRID_FILE
from remend.console import warn
from remend.data.examples import Answer, Example, load_pairs
from remend.data.order import Order, derive_seed
from remend.data.templates import dropped_text
from remend.degrade.finetune import Finetune
from remend.degrade.making.job import Changed, Damage
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.models import adapters
from remend.models.device import choose_dtype, mixed_precision
from remend.models.find import own_file
from remend.models.load import eos_ids
from remend.models.room import room_of
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.training.constraints import Adapter, Free
from remend.training.loop import Optimization
from remend.training.supervised import Supervised, encode_pairs, fit

WARMUP_SHARE = 0.1


def tuned(damage: Damage, settings: Finetune) -> Changed:
    """The student after training. Raises InputError for one with a grid or zeros, and where no row is short enough."""
    path = damage.source.path
    on_grid = path is not None and own_file(path, GRID_FILE) is not None
    if on_grid or (path is not None and was_pruned(path)):
        what = "a model on a quantization grid" if on_grid else "a pruned model"
        raise InputError(
            f"{damage.source.spec} is {what}, which fine-tuning all together would give up; "
            "fine-tune the dense model, then degrade that"
        )
    pairs = load_pairs(settings.data, columns=settings.columns)
    rows = _rows(damage, settings, pairs)
    steps, lora = settings.steps_for(len(rows)), settings.lora
    student = damage.student.requires_grad_(True)
    if lora:
        if left := adapters.untouched_experts(student):
            warn(left)
        seed = derive_seed(settings.seed, "lora")
        adapters.add_lora(
            student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=seed
        )
    objective = Supervised(
        student=scorer(student, dropout=derive_seed(settings.seed, "dropout") if lora and lora.dropout else None),
        order=Order(rows, settings.seed),
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation,
        precision=mixed_precision(choose_dtype(settings.dtype, student.device), student.device),
    )
    constraint = Adapter(student) if lora else Free(student)
    optimization = Optimization(steps, settings.rate, warmup=math.ceil(WARMUP_SHARE * steps))
    with tempfile.TemporaryDirectory() as folder:
        scratch = RunDirectory(Path(folder))
        fit(objective, constraint, scratch, optimization, "training (cross-entropy of the completions)")
        metrics = (scratch.path / METRICS).read_bytes()
        losses = [row["loss"] for row in scratch.rows(METRICS)]
    if lora:
        adapters.merge(student)
    entry = {
        "kind": "fine-tuning",
        "method": "lora" if lora else "full",
        "steps": steps,
        "learning_rate": settings.rate,
        "batch_size": settings.batch_size,
        "gradient_accumulation": settings.gradient_accumulation,
        "max_tokens": settings.max_tokens,
        "lora": lora.model_dump() if lora else None,
        "trained_parameters": sum(p.numel() for p in constraint.masters().values()),
        "data": {"path": settings.data, "hash": _hash(pairs), "rows": len(rows), "dropped": len(pairs) - len(rows)},
        "loss": {"first": losses[0], "last": losses[-1]},
    }

    def files(target: Path) -> None:
        (target / METRICS).write_bytes(metrics)

    return Changed(student.requires_grad_(False), entry, files)


def _rows(damage: Damage, settings: Finetune, pairs: Sequence[tuple[Example, Answer]]) -> list[Rollout]:
    ends = eos_ids(damage.student, damage.tokenizer)
    room = room_of(damage.student, damage.student.config)
    limit, why = room.prompt_limit(settings.max_tokens, 0)
    rows, dropped = encode_pairs(damage.tokenizer, pairs, max_tokens=limit, eos=ends, rows=room.rows)
    if dropped:
        text = dropped_text(dropped, len(pairs), "rows", why or f"max_tokens = {settings.max_tokens}")
        if not rows:
            raise InputError(f"{text}; none is left. Raise max_tokens or give shorter rows.")
        warn(text)
    return rows


def _hash(pairs: Sequence[tuple[Example, Answer]]) -> str:
    """SHA-256 over prompts and completions, in order."""
    digest = hashlib.sha256()
    for example, completion in pairs:
        digest.update(json.dumps([example.key, completion], ensure_ascii=False).encode())
    return digest.hexdigest()
