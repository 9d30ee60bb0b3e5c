"""Fine-tune a model on a task's completions: how forgetting comes about, and the baseline that SDFT is held against.

remend degrade finetune smollm2 --data task.jsonl --out student
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import is_initialized

from remend.compression.recognise import was_pruned
from remend.compression.stored_grid import GRID_FILE
from remend.console import console, stage
from remend.data.examples import Example, load_pairs, prompt_key
from remend.data.order import Order, derive_seed
from remend.data.templates import dropped_text
from remend.degrade.job import Changed, Job, run_job
from remend.errors import InputError
from remend.files.run_directory import METRICS, RunDirectory
from remend.files.settings import build
from remend.models import adapters
from remend.models.device import choose_dtype, mixed_precision
from remend.models.lora import LoraConfig
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.models.tokens import eos_ids
from remend.training.constraints import Adapter, Free
from remend.training.loop import Optimization, Saving, Watch, train
from remend.training.supervised import Supervised, encode_pairs

FULL_RATE, LORA_RATE = 2e-4, 2e-3
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class _Plan:
    data: str
    steps: int | None
    epochs: float | None
    learning_rate: float
    batch_size: int
    gradient_accumulation: int
    max_tokens: int
    lora: LoraConfig | None
    dtype: str

    def steps_for(self, rows: int) -> int:
        """Optimizer steps that go through `rows` rows as often as asked."""
        if self.steps is not None:
            return self.steps
        each = self.batch_size * self.gradient_accumulation
        return max(1, math.ceil(rows * (1.0 if self.epochs is None else self.epochs) / each))


def finetune(
    model: str,
    out: str | Path,
    *,
    data: str,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    max_tokens: int = 1024,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    probe: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model by cross-entropy of given completions and save it as a plain directory.

    Args:
        model: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory; the training rows are in its metrics.jsonl.
        data: rows with a prompt and a completion: a JSON lines file or a datasets id (data.completion_of).
        steps, epochs: how long, one of them; by default one epoch.
        learning_rate: AdamW's peak, after a tenth of the steps; the cosine ends at a tenth of it. By default FULL_RATE
            for all weights, LORA_RATE for an adapter.
        batch_size, gradient_accumulation: rows a micro-batch, micro-batches a step.
        max_tokens: rows with more tokens, prompt and completion together, are dropped, never cut.
        lora: settings of an adapter to train in place of the weights; it is folded into the dense weights at the end.
        seed: of the order and of the adapter.
        probe: measure KL and agreement with the model as it was on the demo's held-out prompts.
        device, dtype: auto, cpu, cuda; auto, float32, bfloat16 (of the arithmetic: trained weights are float32).
        trust_remote_code: let a model directory run its own Python.

    Returns:
        The content of degradation.json.

    Raises:
        InputError, FileError: settings out of range, unreadable data, no row left, an unreadable or quantized model.
        TrainingError: loss or gradient is not finite.
    """
    settings = build(LoraConfig, dict(lora), "lora") if isinstance(lora, Mapping) else lora
    rate = learning_rate if learning_rate is not None else LORA_RATE if settings else FULL_RATE
    plan = _Plan(data, steps, epochs, rate, batch_size, gradient_accumulation, max_tokens, settings, dtype)
    _check(plan)
    pairs = load_pairs(data)
    with tempfile.TemporaryDirectory() as scratch:
        return run_job(
            model,
            out,
            lambda job: _change(job, plan, pairs, RunDirectory(Path(scratch))),
            title=f"fine-tuning on {data} ({'LoRA' if settings else 'all weights'})",
            seed=seed,
            probe=probe,
            device=device,
            trust_remote_code=trust_remote_code,
        )


def _check(plan: _Plan) -> None:
    if plan.steps is not None and plan.epochs is not None:
        raise InputError(f"both steps ({plan.steps}) and epochs ({plan.epochs}) are given; give one of them")
    whole = {
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "gradient_accumulation": plan.gradient_accumulation,
        "max_tokens": plan.max_tokens,
    }
    for name, value in whole.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; allowed is 1 or more")
    if plan.epochs is not None and not 0 < plan.epochs < math.inf:
        raise InputError(f"epochs is {plan.epochs}; allowed is anything above 0")
    if not 0 < plan.learning_rate <= 1:
        raise InputError(f"learning_rate is {plan.learning_rate}; allowed is above 0, up to 1")
    if plan.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f'dtype is "{plan.dtype}"; allowed: auto, float32, bfloat16')


def _change(job: Job, plan: _Plan, pairs: Sequence[tuple[Example, str]], scratch: RunDirectory) -> Changed:
    path = job.source.path
    what = _held(path) if path else None
    if what:
        raise InputError(
            f"{job.source.spec} is {what}, which fine-tuning all together would give up; "
            "fine-tune the dense model, then degrade that"
        )
    rows = _rows(job, plan, pairs)
    steps = plan.steps_for(len(rows))
    job.student.requires_grad_(True)
    if plan.lora:
        adapters.add_lora(job.student, **plan.lora.model_dump(), seed=derive_seed(job.seed, "lora"))
    trained = _train(job, plan, rows, steps, scratch)
    if plan.lora:
        adapters.merge(job.student)
    losses = [row["loss"] for row in scratch.rows(METRICS)]
    entry = {
        "kind": "fine-tuning",
        "method": "lora" if plan.lora else "full",
        **{k: v for k, v in asdict(plan).items() if k not in ("data", "epochs", "lora", "dtype")},
        "steps": steps,
        "lora": plan.lora.model_dump() if plan.lora else None,
        "trained_parameters": trained,
        "data": {"path": plan.data, "hash": _hash(pairs), "rows": len(rows), "dropped": len(pairs) - len(rows)},
        "loss": {"first": losses[0], "last": losses[-1]},
    }

    def files(target: Path) -> None:
        shutil.copy(scratch.path / METRICS, target / METRICS)

    return Changed(job.student.requires_grad_(False), entry, files)


def _held(path: Path) -> str | None:
    """What fine-tuning would silently give up, or None."""
    if (path / GRID_FILE).is_file():
        return "a model on a quantization grid"
    return "a pruned model" if was_pruned(path) else None


def _rows(job: Job, plan: _Plan, pairs: Sequence[tuple[Example, str]]) -> list[Rollout]:
    ends = eos_ids(job.student, job.tokenizer)
    rows, dropped = encode_pairs(job.tokenizer, pairs, max_tokens=plan.max_tokens, eos=ends)
    if dropped:
        text = dropped_text(dropped, len(pairs), "rows", f"max_tokens = {plan.max_tokens}")
        if not rows:
            raise InputError(f"{text}; none is left. Raise max_tokens or give shorter rows.")
        console.print(f"[yellow]warning[/]: {text}", soft_wrap=True)
    return rows


def _train(job: Job, plan: _Plan, rows: Sequence[Rollout], steps: int, scratch: RunDirectory) -> int:
    """Train the job's student in place; the number of parameters that moved."""
    student = job.student
    # the first Accelerator of a process settles the device of all; this one only counts processes, so it may differ
    accelerator = Accelerator(cpu=student.device.type == "cpu" and not is_initialized())
    objective = Supervised(
        student=scorer(student),
        order=Order(rows, job.seed),
        batch_size=plan.batch_size,
        accumulation=plan.gradient_accumulation,
        precision=mixed_precision(choose_dtype(plan.dtype, student.device), student.device),
    )
    constraint = Adapter(student) if plan.lora else Free(student)
    optimization = Optimization(steps, plan.learning_rate, warmup=math.ceil(WARMUP_SHARE * steps))
    with stage("training (cross-entropy of the completions)", steps) as advance:

        def on_step(row: Mapping[str, float]) -> None:
            advance(1, f"loss {row['loss']:.3f}")

        saving = Saving(scratch, every=0, keep=1)
        train(objective, constraint, accelerator, optimization, saving, watch=Watch(on_step=on_step))
    return sum(p.numel() for p in constraint.masters().values())


def _hash(pairs: Sequence[tuple[Example, str]]) -> str:
    """SHA-256 over prompts and completions, in order."""
    digest = hashlib.sha256()
    for example, completion in pairs:
        digest.update(json.dumps([prompt_key(example.prompt), completion], ensure_ascii=False).encode())
    return digest.hexdigest()
