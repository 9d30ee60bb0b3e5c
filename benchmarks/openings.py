"""What running the rows' common opening once saves: a pass over 8 rows with and without, and with its gradients.

    python benchmarks/openings.py [--rounds 5] [--tokens 48] [--opening N]

The rows are the embedded model's own chat prompts (its template opens all of them with one system prompt) and random
completion tokens. --opening puts N more tokens in front of all rows, as a long system prompt would. Both ways alternate
in one process; medians and their ratio are printed, and how far the states are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from remend.data.examples import bundled
from remend.data.templates import encode
from remend.models.device import mixed_precision
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.protocols import Tokenizer
from remend.models.scorer import Packed, Scorer, pack, scorer

ROWS, SEED = 8, 0


def rows(tokenizer: Tokenizer, tokens: int, opening: int) -> Packed:
    """The batch."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> list[int]:
        return torch.randint(5, 40_000, (count,), generator=generator).tolist()

    front = draw(opening)
    prompts = [encode(tokenizer, e) for e in bundled("train")[:ROWS]]
    pairs = [([*front, *p.tokens], draw(tokens)) for p in prompts]
    return pack(pairs, device=torch.device("cpu"))


def timed(parts: Scorer, batch: Packed, dtype: torch.dtype, gradients: bool) -> tuple[float, torch.Tensor]:
    """Seconds of one pass, and its states."""
    for parameter in parts.model.parameters():
        parameter.grad = None
    began = time.perf_counter()
    with mixed_precision(dtype, torch.device("cpu")), torch.set_grad_enabled(gradients):
        states_ND = parts.states(batch)
        if gradients:
            torch.autograd.backward(states_ND.float().square().sum())
    return time.perf_counter() - began, states_ND.detach().float()


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="completion tokens a row")
    parser.add_argument("--opening", type=int, default=0, help="tokens more in front of all rows")
    options = parser.parse_args()
    source = find_model("smollm2")
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    batch = rows(load_tokenizer(source), options.tokens, options.opening)
    once = scorer(model)
    whole = replace(once, prefixes=False)
    shape = f"{ROWS} rows of up to {batch.tokens_BT.shape[1]} tokens, {once.opening(batch)} of them shared"
    print(f"{torch.get_num_threads()} threads, {shape}")
    for dtype in (torch.float32, torch.bfloat16):
        for gradients in (False, True):
            seconds: list[list[float]] = [[], []]
            for _ in range(options.rounds):
                passes = [timed(parts, batch, dtype, gradients) for parts in (whole, once)]
                for kept, (spent, _) in zip(seconds, passes, strict=True):
                    kept.append(spent)
            (_, a), (_, b) = passes
            all_rows, shared = (statistics.median(s) for s in seconds)
            print(
                f"{str(dtype).removeprefix('torch.')}, {'with' if gradients else 'without'} gradients: all rows "
                f"{all_rows:.2f} s, opening once {shared:.2f} s, ratio {shared / all_rows:.2f}, states apart by "
                f"{float((a - b).norm() / a.norm()):.1e}"
            )


if __name__ == "__main__":
    main()
