"""What all degradations share: load the reference, change a copy, probe it, save it with its record."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from remend.compression.recognise import RECORD
from remend.console import console, stage
from remend.data.examples import bundled, choose, data_hash, load_examples
from remend.data.templates import encode
from remend.errors import InputError
from remend.files.atomic import new_directory, write_json
from remend.files.run_directory import occupied
from remend.models.activations.walk import completions
from remend.models.device import choose_device
from remend.models.find import ModelSource, find_model, hash_files, origin_note
from remend.models.layers import linear_layers
from remend.models.load import load_model, load_tokenizer, save_model
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.training.measure import compare, pool

PROBE_PROMPTS, PROBE_TOKENS = 32, 48
CALIBRATION_TOKENS = 64
"""Completion tokens of a calibration sample: 48 samples with their prompts are about 4,000 rows a layer."""

DENSE_BITS = 16
"""Of a weight that is not packed, as models are served."""


class Options(TypedDict, total=False):
    """What every degradation takes beside its own settings.

    seed: of calibration text, training order and whatever else draws; 0.
    data: calibration prompts, JSON lines or a datasets id; None takes bundled ones.
    samples: how many of them; 48.
    probe: measure KL and agreement with the reference on the demo's held-out prompts; True.
    device: auto (the default), cpu, cuda.
    trust_remote_code: let a model directory run its own Python; False.
    """

    seed: int
    data: str | None
    samples: int
    probe: bool
    device: str
    trust_remote_code: bool


@dataclass
class Job:
    """What a degradation works on.

    reference: the healthy model, not to be changed; student: a copy that is.
    samples, data: how many calibration prompts, and from where (None: the bundled training prompts).
    """

    reference: Any
    student: Any
    tokenizer: Any
    source: ModelSource
    seed: int
    samples: int
    data: str | None
    calibration_seconds: float = 0.0
    calibration_hash: str | None = None
    _rollouts: list[Rollout] | None = None

    def calibration(self) -> list[Rollout]:
        """The reference's own completions, sampled once. Raises InputError when there is no prompt."""
        if self._rollouts is None:
            began = time.perf_counter()
            everything = bundled("train") if self.data is None else load_examples(self.data)
            chosen = everything[: self.samples] if self.data is None else choose(everything, self.samples, self.seed)
            self.calibration_hash = data_hash(chosen)
            prompts = [encode(self.tokenizer, e) for e in chosen]
            self._rollouts = completions(
                self.reference, self.tokenizer, prompts, max_new_tokens=CALIBRATION_TOKENS, seed=self.seed
            )
            self.calibration_seconds = time.perf_counter() - began
        return self._rollouts


@dataclass
class Changed:
    """What a degradation made.

    student: the changed model.
    entry: its part of degradation.json: kind, method, and what else describes it.
    files: writes what lies beside the model (a grid, say) into a directory.
    bits_per_weight: of the changed matrices, as packed, scales included; 16 for dense ones.
    packed_bytes: the whole model as packed; None counts every parameter at 16 bits.
    """

    student: Any
    entry: dict[str, Any]
    files: Callable[[Path], None] | None = None
    bits_per_weight: float = DENSE_BITS
    packed_bytes: int | None = None


def run_job(
    model: str,
    out: str | Path,
    change: Callable[[Job], Changed],
    *,
    title: str,
    seed: int = 0,
    data: str | None = None,
    samples: int = 48,
    probe: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load `model`, let `change` damage a copy, measure and save it.

    Args:
        model: the healthy reference: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory.
        change: gets a Job, gives Changed.
        title: what is done, for the progress line.
        seed, data, samples, probe, device, trust_remote_code: see Options.

    Returns:
        The content of degradation.json.

    Raises:
        InputError, FileError: unreadable model, occupied directory, no calibration prompts.
    """
    out = Path(out)
    problem = occupied(out)
    if problem:
        raise InputError(problem)
    job, hashes = _load(model, seed, samples, data, device, trust_remote_code)
    with stage(title):
        began = time.perf_counter()
        changed = change(job)
        seconds = time.perf_counter() - began - job.calibration_seconds
    if data is not None and job.calibration_hash is None:
        console.print(f"[yellow]warning[/]: data {data} has no effect: {title} needs no calibration", soft_wrap=True)
    record = _record(job, changed, model, hashes, seconds)
    if probe:
        record["probe"] = probe_against(job.reference, changed.student, job.tokenizer)
    with stage(f"saving {out}"), new_directory(out) as target:
        save_model(changed.student, job.tokenizer, target)
        if changed.files:
            changed.files(target)
        write_json(target / RECORD, record)
    return record


def _record(job: Job, changed: Changed, model: str, hashes: Mapping[str, str], seconds: float) -> dict[str, Any]:
    record = {
        "sparsity": share_of_zeros([layer.weight for layer in linear_layers(changed.student).values()]),
        **changed.entry,
        "reference": {"model": model, "files": hashes},
        "bits_per_weight": changed.bits_per_weight,
        "packed_bytes": changed.packed_bytes or DENSE_BITS // 8 * sum(p.numel() for p in changed.student.parameters()),
        "seconds": round(seconds, 3),
        "seed": job.seed,
    }
    if job.calibration_hash:
        spent = round(job.calibration_seconds, 3)
        record["calibration"] = {"prompts": len(job.calibration()), "hash": job.calibration_hash, "seconds": spent}
    note = origin_note(job.source)
    if note:
        record["note"] = note
    return record


def share_of_zeros(weights: Sequence[torch.Tensor]) -> float:
    """How many of some matrices' weights are exactly zero, as a share; 0 of none."""
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def _load(
    model: str, seed: int, samples: int, data: str | None, device: str, trust_remote_code: bool
) -> tuple[Job, dict[str, str]]:
    source = find_model(model)
    if source.kind == "adapter":
        raise InputError(
            f"{model} is an adapter on a base, and degrading one without the other makes no model; degrade the base, "
            "or merge the adapter (merge: true in a recipe) and degrade that"
        )
    if samples < 1:
        raise InputError(f"samples is {samples}: the calibration set is empty; allowed is 1 or more")
    where = choose_device(device)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with stage(f"loading {model}"):
        reference = load_model(source, dtype=torch.float32, device=where, trust_remote_code=trust_remote_code)
        reference.requires_grad_(False)
        hashes = hash_files(source)
    return Job(reference, copy.deepcopy(reference), tokenizer, source, seed, samples, data), hashes


@torch.no_grad()
def probe_against(reference: Any, student: Any, tokenizer: Any) -> dict[str, Any]:
    """Forward KL (nats a token) and top-1 agreement on the demo's held-out prompts: the reference's greedy answers."""
    prompts = [encode(tokenizer, e) for e in bundled("held_out")[:PROBE_PROMPTS]]
    parts = scorer(reference)
    rollouts = answer(reference, tokenizer, prompts, "probing: the reference answers", max_new_tokens=PROBE_TOKENS)
    with stage("probing: comparing", len(prompts)) as advance:
        figures = pool(compare(scorer(student), parts, rollouts, on_rows=advance))
    return {"kl": figures["kl"], "top1_agreement": figures["top1_agreement"], "prompts": len(prompts)}


def chosen_layers(model: Any, skip: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """`models.linear_layers` without those that a skip pattern matches (shell patterns over the full name).

    Raises InputError for a pattern that matches nothing, or when nothing is left.
    """
    from fnmatch import fnmatchcase

    layers = linear_layers(model)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            some = ", ".join(list(layers)[:3])
            raise InputError(f'skip "{pattern}" matches no linear layer; names are like {some}; * matches any part')
    kept = {n: m for n, m in layers.items() if not any(fnmatchcase(n, p) for p in skip)}
    if not kept:
        raise InputError(f"skip {', '.join(skip)} leaves no layer to change")
    return kept
