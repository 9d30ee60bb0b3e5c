"""Does AWQ's scaling pay (arXiv 2306.00978)? KL of SmolLM2 on a grid with and without it, before and after repair.

    python benchmarks/awq.py [--formats int3-g64 int4-g32-sym] [--answers 96] [--prompts 32] [--calibration 48]

Inputs of a group of layers are divided by s, and its weights' columns multiplied by it, so that the model says the same
and rounding spares the columns that matter: s = (root mean square input)^α, with the α of 0, 0.05 … 1 that costs least,
Σ‖(W − Q(W s)/s) x‖². The division goes into what is in front: a norm's weight, or `up_proj` for `down_proj`. `o_proj`
is left out, as in AWQ's own code where key and value heads are fewer. AWQ's clipping is left out too; GPTQ's search of
ranges (solvers.gptq) is beside it.

All see the same calibration text, answers as `degrade` takes them; repair sees --answers others. KL is on the
reference's greedy answers to --prompts bundled held-out prompts, in float32.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from remend.compression.grids import GridFormat, decode, quantize
from remend.data.examples import bundled
from remend.data.templates import encode
from remend.degrade.making.job import PROBE_TOKENS, Damage
from remend.degrade.making.onto_grid import quantize_in_place
from remend.degrade.quantize import Quantize
from remend.models.activations.walk import Sites, completions, walk
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.recovery.calibration_text import TOKENS
from remend.training.constraints import Calibration
from remend.training.constraints.grid import repair_grid
from remend.training.measure import compare, pool
from remend.training.teachers.frozen import Frozen

CPU, SEED = torch.device("cpu"), 0
FRONT = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "down_proj": "mlp.up_proj"}
"""Of a group, named by its first layer: what its inputs' division goes into, within the block."""


def best_scale(sites: Sites, fmt: GridFormat) -> Tensor:
    """[I]: the scales of the columns, AWQ's equation 5 with the loss of equation 4, over the group's layers."""
    size_I = (sites.gram_II.diagonal() / sites.rows).clamp(min=1e-10).sqrt()
    best, least = torch.ones_like(size_I), float("inf")
    for step in range(21):
        raw_I = size_I ** (step / 20)
        scale_I = raw_I / (raw_I.max() * raw_I.min()).sqrt()
        loss = 0.0
        for matrix in sites.matrices:
            codes, grid = quantize(matrix.weight_OI * scale_I, fmt)
            error_OI = decode(codes, grid, fmt) / scale_I - matrix.weight_OI
            loss += float(((error_OI @ sites.gram_II) * error_OI).sum())
        if loss < least:
            best, least = scale_I, loss
    return best


@torch.no_grad()
def scaled(damage: Damage, fmt: GridFormat) -> Any:
    """A copy of the reference that says the same with other weights."""
    model = copy.deepcopy(damage.reference)
    found: list[tuple[Sites, Tensor]] = []

    def visit(sites: Sites) -> None:
        if sites.matrices[0].name.rsplit(".", 1)[-1] in FRONT:
            found.append((sites, best_scale(sites, fmt)))

    walk(model, damage.calibration(), visit, title="choosing scales")
    modules = dict(model.named_modules())
    for sites, scale_I in found:
        for matrix in sites.matrices:
            matrix.weight_OI.mul_(scale_I)
        block, first = sites.matrices[0].name.rsplit(".", 2)[0], sites.matrices[0].name.rsplit(".", 1)[-1]
        front: nn.Module = modules[f"{block}.{FRONT[first]}"]
        front.weight.div_(scale_I if front.weight.ndim == 1 else scale_I[:, None])  # type: ignore[operator]
    return model


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int3-g64", "int4-g32-sym"])
    parser.add_argument("--answers", type=int, default=96, help="that repair is fitted to; 0 leaves it out")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--calibration", type=int, default=48, help="answers that scales and GPTQ are fitted to")
    options = parser.parse_args()
    source = find_model("smollm2")
    reference = load_model(source, dtype=torch.float32, device=CPU).requires_grad_(False)
    settings = Quantize.model_validate({"seed": SEED, "samples": options.calibration})
    damage = Damage(reference, reference, load_tokenizer(source), source, settings)
    prompts = [encode(damage.tokenizer, e) for e in bundled("held_out")[: options.prompts]]
    rollouts = answer(reference, damage.tokenizer, prompts, "the reference answers", max_new_tokens=PROBE_TOKENS)
    text: list[Rollout] = []
    if options.answers:
        others = [encode(damage.tokenizer, e) for e in bundled("train")[48 : 48 + options.answers]]
        text = completions(reference, damage.tokenizer, others, max_new_tokens=TOKENS, seed=SEED + 1)

    def kl(model: Any) -> float:
        return float(pool(compare(scorer(model), Frozen(scorer(reference)), rollouts))["kl"])

    print(f"{torch.get_num_threads()} threads, repair on {len(text)} answers, KL on {len(prompts)} prompts", flush=True)
    for fmt in map(GridFormat.parse, options.formats):
        began = time.perf_counter()
        moved = scaled(damage, fmt)
        print(f"{fmt.name}: scales chosen in {time.perf_counter() - began:.0f} s, KL {kl(moved):.1e}", flush=True)
        for method in ("rtn", "gptq"):
            for name, healthy in (("", reference), ("awq + ", moved)):
                student = copy.deepcopy(healthy)
                stored = quantize_in_place(student, fmt, method, damage=damage)
                line = f"{fmt.name} {name}{method}: KL {kl(student):.3f}"
                if text:
                    repair_grid(student, stored, Calibration(healthy, text))
                    line += f", after repair {kl(student):.3f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
