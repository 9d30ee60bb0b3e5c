"""Seconds and error of the solvers on one random layer whose inputs are correlated, against the plain methods.

    python benchmarks/solvers.py [--rows 1536] [--columns 576] [--samples 4096] [--threads 1]

The error is Σ‖W x − V x‖² over the inputs as a share of Σ‖W x‖². The inputs have a spectrum that falls as 1/rank and
channels of unequal size, roughly as a language model's have.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from remend.compression import grids
from remend.compression.grids import GridFormat
from remend.compression.solvers import gptq, keep_mask, refit_kept, sparsegpt, wanda_scores

FORMATS = ("int3-g64", "int4-g32-sym", "gguf:q4_0", "nvfp4")


def problem(rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the gram of its inputs."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spectrum = torch.arange(1, columns + 1).float().rsqrt()
    sizes = torch.rand(columns, generator=generator).square() * 2 + 0.1
    x_NI = (torch.randn(samples, columns, generator=generator) * spectrum) @ rotation * sizes
    return torch.randn(rows, columns, generator=generator) * 0.05, x_NI.T @ x_NI


def methods(weight: Tensor, gram: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is measured, by name."""

    def nearest(fmt: GridFormat) -> Tensor:
        codes, grid = grids.quantize(weight, fmt)
        return grids.decode(codes, grid, fmt)

    def compensated(fmt: GridFormat) -> Tensor:
        result = gptq(weight, gram, fmt)
        return grids.decode(result.codes, result.grid, fmt)

    def onto(fmt: GridFormat) -> Tensor:
        grid = grids.fit(weight, fmt)
        return grids.decode(gptq(weight, gram, fmt, grid).codes, grid, fmt)

    table: dict[str, Callable[[], Tensor]] = {}
    for fmt in map(GridFormat.parse, FORMATS):
        table[f"{fmt.name} round to nearest"] = lambda fmt=fmt: nearest(fmt)  # type: ignore[misc]
        table[f"{fmt.name} gptq, grid kept"] = lambda fmt=fmt: onto(fmt)  # type: ignore[misc]
        table[f"{fmt.name} gptq"] = lambda fmt=fmt: compensated(fmt)  # type: ignore[misc]
    half = keep_mask(weight.abs(), sparsity=0.5, per="matrix")
    scores = wanda_scores(weight, gram)
    table["50% magnitude"] = lambda: weight * half
    table["50% magnitude, sparsegpt's compensation"] = lambda: sparsegpt(weight, gram, mask_OI=half)
    table["50% magnitude, refit"] = lambda: refit_kept(weight, gram, half)
    table["50% sparsegpt"] = lambda: sparsegpt(weight, gram, sparsity=0.5)
    table["2:4 magnitude"] = lambda: weight * keep_mask(weight.abs(), pattern=(2, 4))
    table["2:4 wanda"] = lambda: weight * keep_mask(scores, pattern=(2, 4))
    table["2:4 wanda, refit"] = lambda: refit_kept(weight, gram, keep_mask(scores, pattern=(2, 4)))
    table["2:4 sparsegpt"] = lambda: sparsegpt(weight, gram, pattern=(2, 4))
    return table


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight, gram = problem(options.rows, options.columns, options.samples)
    whole = float(((weight @ gram) * weight).sum())
    print(f"{options.rows} x {options.columns}, {options.samples} inputs, {options.threads} thread(s)")
    for name, solve in methods(weight, gram).items():
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            result = solve()
            seconds.append(time.perf_counter() - began)
        error = (weight - result).double()
        share = float(((error @ gram.double()) * error).sum()) / whole
        print(f"{statistics.median(seconds):8.3f} s   error {share:.5f}   {name}")


if __name__ == "__main__":
    main()
