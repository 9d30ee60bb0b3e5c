"""Sampling on a CPU with weights laid out beforehand (models/sampling/prepacked.py) and keys and values written in
place (kv_cache.py), and without: tokens a second.

    python benchmarks/decoding.py [--rows 8 32 64] [--tokens 48] [--rounds 3]

SmolLM2-135M-Instruct answers the bundled training prompts at temperature 1, with no early end, so that lengths are
equal. The ways alternate in one process; the medians and ratios are printed, in float32 and under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from remend.data.examples import bundled
from remend.data.order import Order
from remend.data.templates import encode
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling import kv_cache, prepacked, transformers_engine
from remend.models.sampling.transformers_engine import TransformersSampler

PACKED, IN_PLACE = prepacked.packed_linears, kv_cache.decoding_cache


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """In place of packing: nothing."""
    yield


def copied(config: Any) -> DynamicCache:
    """In place of a cache with room: transformers', which copies all at every token."""
    return DynamicCache(config=config)


WAYS = {"plain": (plain, copied), "packed": (PACKED, copied), "both": (PACKED, IN_PLACE)}


def seconds(sampler: TransformersSampler, prompts: list[Any], tokens: int) -> float:
    """Of one round of sampling."""
    began = time.perf_counter()
    sampler(prompts, max_new_tokens=tokens, temperature=1.0, seeds=list(range(len(prompts))))
    return time.perf_counter() - began


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source = find_model("smollm2")
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    order = Order([encode(tokenizer, e) for e in bundled("train")], 0)
    sampler = TransformersSampler(model, len(tokenizer), (), max_rows=max(options.rows))
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    heads = ("arithmetic", "rows", "plain, tokens/s", "packed", "and in place", "packed over plain", "both over packed")
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name, precision in (("float32", nullcontext()), ("bfloat16", torch.autocast("cpu", torch.bfloat16))):
        for rows in options.rows:
            prompts = [p for _, p in order.take(0, rows)]
            spent: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, (transformers_engine.packed_linears, kv_cache.decoding_cache) in WAYS.items():  # type: ignore[attr-defined]
                    with precision:
                        spent[way].append(seconds(sampler, prompts, options.tokens))
            took = [statistics.median(spent[way]) for way in WAYS]
            speeds = [f"{rows * options.tokens / t:.0f}" for t in took]
            ratios = [f"{took[1] / took[0]:.2f}", f"{took[2] / took[1]:.2f}"]
            print("| " + " | ".join((name, str(rows), *speeds, *ratios)) + " |", flush=True)


if __name__ == "__main__":
    main()
