"""What keeping freed memory saves (remend.host_memory): the same recovery with and without, seconds and peak memory.

    python benchmarks/allocator.py --out runs/allocator [--rounds 2] [--steps 6] [--answers 64]

`remend recover` repairs and trains the embedded model under zeros 2:4, once with malloc as the system sets it up and
once with freed memory kept; the two alternate, each in a process of its own. GLIBC_TUNABLES with a setting that changes
nothing makes remend leave malloc alone. Printed are the seconds of repair, the mean of a training step over whole
rounds of sampling (the first round, which pays for allocation, is left out), the largest resident set, and the KL that
both ways end at; with several rounds their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remend.flows.demo import write_prompts

MODEL = "smollm2"
WAYS = {"as it is": {"GLIBC_TUNABLES": "glibc.malloc.arena_test=8"}, "kept": {}}


def remend(*words: str, environment: Mapping[str, str] | None = None) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True, env={**os.environ, **(environment or {})})


def recover(out: Path, environment: Mapping[str, str], settings: list[str]) -> dict[str, Any]:
    """One recovery, and what its files say of time and memory."""
    shutil.rmtree(out, ignore_errors=True)
    remend("recover", f"out={out}", *settings, environment=environment)
    summary = json.loads((out / "summary.json").read_text())
    spent = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    steps = [row["seconds"] for row in spent if "stage" not in row]
    return {
        "repair": summary["repair"]["seconds"],
        "step": statistics.mean(steps[2:]),
        "peak": summary["peak_rss_mib"],
        "kl": summary["recovered"]["kl"],
    }


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="training steps of a recovery, even, at least 4")
    parser.add_argument("--answers", type=int, default=64, help="that repair is fitted to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = write_prompts(options.out)
    student = options.out / "student"
    if not student.exists():
        remend("degrade", "prune", MODEL, "--method", "magnitude", "--sparsity", "2:4", "--out", str(student))
    settings = [f"student={student}", f"teacher={MODEL}", f"data={train}", f"eval_data={held_out}"]
    settings += [f"steps={options.steps}", f"repair_samples={options.answers}"]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, environment in WAYS.items():
            found[way].append(recover(options.out / "recovered", environment, settings))
    middle = {w: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for w, runs in found.items()}
    print("| malloc | repair, s | a step, s | peak, MiB | KL |\n| --- | --- | --- | --- | --- |")
    for way, row in middle.items():
        print(f"| {way} | {row['repair']:.1f} | {row['step']:.2f} | {row['peak']:.0f} | {row['kl']:.6f} |")
    plain, kept = middle["as it is"], middle["kept"]
    print(f"ratio: repair {kept['repair'] / plain['repair']:.2f}, a step {kept['step'] / plain['step']:.2f}")


if __name__ == "__main__":
    main()
