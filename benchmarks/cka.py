"""Debiased CKA of two real models' layers: remend beside ckatorch, the same activations, in one process.

python benchmarks/cka.py --student damaged [--rows 256] [--out cka.json]

Rows are taken as `remend diagnose` takes them: one completion token a sequence of SmolLM2's own answers. Timed are the
diagonal (each layer with itself in the other model) and the layer × layer grid; the best of three rounds, alternating.
ckatorch is given these rows; by itself it takes all tokens of a sequence as rows, the first and the padding among them.
Needs ckatorch (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remend.data.examples import bundled
from remend.data.order import derive_seed
from remend.data.templates import encode
from remend.files.environment import environment
from remend.maths import cka
from remend.models.activations.capture import as_layers, capture, pick_positions
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.answers import answer
from remend.models.scorer import scorer


def activations(student: str, rows: int) -> tuple[Tensor, Tensor]:
    """[L, S, D] of SmolLM2 and of the student."""
    source = find_model("smollm2")
    tokenizer, cpu = load_tokenizer(source), torch.device("cpu")
    both = [load_model(find_model(s), dtype=torch.float32, device=cpu) for s in ("smollm2", student)]
    prompts = [encode(tokenizer, e) for e in (bundled("held_out") + bundled("train"))[:rows]]
    rollouts = answer(both[0].requires_grad_(False), tokenizer, prompts, "the reference answers", max_new_tokens=32)
    draws = [derive_seed(0, "row", r.id) / 2**63 for r in rollouts]
    picks = pick_positions([len(r.completion) for r in rollouts], draws)
    first, second = (
        as_layers(capture(scorer(m.requires_grad_(False)), "model", rollouts, picks)["residual"], rows) for m in both
    )
    return first, second


def best(functions: dict[str, Callable[[], Any]], rounds: int = 3) -> dict[str, tuple[float, Any]]:
    """Seconds of the fastest round of each, alternating, and what it gave."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            value = function()
            seconds = time.perf_counter() - began
            if name not in found or seconds < found[name][0]:
                found[name] = seconds, value
    return found


def main() -> None:
    """See the module docstring."""
    from ckatorch.core import cka_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    x_LSD, y_LSD = activations(arguments.student, arguments.rows)
    pairs = list(zip(x_LSD, y_LSD, strict=True))
    diagonal = best(
        {
            "remend": lambda: torch.tensor([cka.debiased_cka(x, y) for x, y in pairs]),
            "ckatorch": lambda: torch.stack([cka_base(x, y, unbiased=True) for x, y in pairs]),
        }
    )
    grid = best(
        {
            "remend": lambda: cka.cka_grid(list(x_LSD), list(y_LSD)),
            "ckatorch": lambda: torch.stack(
                [torch.stack([cka_base(x, y, unbiased=True) for y in y_LSD]) for x in x_LSD]
            ),
        },
        rounds=1,
    )
    result: dict[str, Any] = {"rows": len(x_LSD[0]), "layers": len(x_LSD), "width": x_LSD.shape[-1]}
    for name, found in (("diagonal", diagonal), ("grid", grid)):
        difference = float((found["remend"][1] - found["ckatorch"][1].double()).abs().max())
        seconds = {key: round(value[0], 4) for key, value in found.items()}
        ratio = found["remend"][0] / found["ckatorch"][0]
        result[name] = {"seconds": seconds, "ratio": round(ratio, 3), "largest_difference": difference}
    result["environment"] = environment()["hardware"]
    print(json.dumps(result, indent=2))
    if arguments.out:
        with tempfile.NamedTemporaryFile("w", dir=arguments.out.parent, delete=False) as stream:
            json.dump(result, stream, indent=2)
        Path(stream.name).replace(arguments.out)


if __name__ == "__main__":
    main()
