"""The whole story on a real model: quantize it to 3 bits, hear it babble, repair it, train it on its grid.

remend demo
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import torch

from remend.console import console, stage
from remend.data.examples import bundled
from remend.degrade.quantize import quantize
from remend.errors import InputError
from remend.files.atomic import json_line, new_directory, write_json, write_text
from remend.files.run_directory import INPUTS, occupied
from remend.models.find import CARD, EMBEDDED, ORIGIN_FILE, find_model
from remend.models.load import load_model, load_tokenizer, save_model
from remend.models.origin import origin_of
from remend.recovery.job import RecoverResult, run_recovery, settings
from remend.report import report
from remend.report.card import Card, named, ways_to_use

FORMAT = "int3-g64-asym"
HELD_OUT = 32
STEPS = 4
ANSWERS = 288
"""That repair is fitted to."""
PLAIN_RUN, COMPARISON = "without-repair", "comparison"
"""Directories in a demo's own, of --compare."""
RECOVERY: Mapping[str, object] = {"repair_samples": ANSWERS, "warmup_steps": 2, "final_learning_rate": 0.3}
TRAINING: Mapping[str, object] = {"learning_rate": 4e-4, "warmup_steps": 2, "final_learning_rate": 0.3}
"""Of a short run without repair: a high rate to its end; twice this rate was unstable in its first ten steps."""
PLAIN: Mapping[str, object] = {"repair": False, "steps": 40, **TRAINING}
"""What --compare runs beside it."""


def fresh_directory() -> Path:
    """A new dated folder under runs/."""
    base = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    return next(p for p in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))) if not p.exists())


def write_prompts(directory: Path, most: int | None = None) -> tuple[Path, Path]:
    """Write the bundled prompts as the demo uses them, at most so many of each part: (training, held-out).

    The bundled set is split by topic: no training prompt touches a held-out topic. Of the held-out prompts the demo
    takes HELD_OUT, going round the topics so that each is there.
    """
    parts = {"train.jsonl": bundled("train", mixed=False), "held_out.jsonl": bundled("held_out")[:HELD_OUT]}
    for name, chosen in parts.items():
        write_text(directory / name, "".join(json_line(e.row) for e in chosen[:most]))
    return directory / "train.jsonl", directory / "held_out.jsonl"


def demo(
    out: str | Path | None = None,
    *,
    model: str | Path = EMBEDDED,
    steps: int = STEPS,
    seed: int = 0,
    compare: bool = False,
) -> RecoverResult:
    """Degrade, recover, measure and report on one model.

    Args:
        out: a new directory; None is a dated one under runs/.
        model: the healthy model.
        steps: optimizer steps of the recovery.
        seed: of rollouts and order.
        compare: train the same student without repair too, into PLAIN_RUN, and write a page of both into COMPARISON.

    Returns:
        The recovery's result. `out` is an ordinary run; reference, student and prompts are in inputs/.
    """
    began = time.monotonic()
    directory = Path(out) if out is not None else fresh_directory()
    problem = occupied(directory, inputs=True)
    if problem:
        raise InputError(problem)
    if steps < 0:
        raise InputError(f"steps is {steps}; allowed is 0 or more")
    inputs = directory / INPUTS
    model = os.fspath(model)
    source = find_model(model)
    with stage(f"loading {model}"):
        reference = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    with stage("saving it as a plain directory"), new_directory(inputs / "reference") as target:
        save_model(reference, load_tokenizer(source), target)
        if source.kind == "gguf" and source.path:
            write_json(target / ORIGIN_FILE, {"dequantized_from": source.path.name})
        lead = "The healthy model of a demo, as a plain directory."
        card = Card(title=named(model), lead=lead, parts=[], origin=origin_of(source), use=ways_to_use())
        write_text(target / CARD, card.markdown())
    del reference
    quantize(str(inputs / "reference"), inputs / "degraded", format=FORMAT, probe=False)
    train, held_out = write_prompts(inputs)
    common: dict[str, object] = {
        "student": str(inputs / "degraded"),
        "teacher": str(inputs / "reference"),
        "data": str(train),
        "eval_data": str(held_out),
        "save_every": 0,
        "device": "cpu",
        "seed": seed,
    }
    result = run_recovery(
        settings(overrides={**common, "out": str(directory), "steps": steps, **RECOVERY}), began=began
    )
    if compare:
        console.print("the same student by training alone")
        run_recovery(settings(overrides={**common, "out": str(directory / PLAIN_RUN), **PLAIN}))
        report([directory, directory / PLAIN_RUN], directory / COMPARISON)
    return result
