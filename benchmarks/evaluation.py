"""Seconds and scores of `remend eval` on the papers' two tasks; the rows are files that you have.

python benchmarks/evaluation.py --science FILE --tooluse FILE [--out runs/evaluation] [--model smollm2] [--limit N]

    science   by the log-likelihoods of the answer letters (--how choices)
    tooluse   by greedy answers

Each is a process of its own. `whole` counts its start and the loading of the model, `eval` is the command's own time.
An --out that holds results already would time nothing, so it must be new.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from remend.files.reading import read_object
from remend.files.run_directory import occupied

HOW = {"science": ("--how", "choices"), "tooluse": ()}


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--model", default="smollm2")
    for task in HOW:
        parser.add_argument(f"--{task}", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, help="only so many rows of each")
    options = parser.parse_args()
    problem = occupied(options.out)
    missing = [str(path) for task in HOW if not (path := getattr(options, task)).is_file()]
    if problem or missing:
        sys.exit(problem or f"{' and '.join(missing)} can't be found")
    load, lines = os.getloadavg(), []
    for task, words in HOW.items():
        out, began = options.out / f"{task}.json", time.monotonic()
        limit = [] if options.limit is None else ["--limit", str(options.limit)]
        given = [options.model, "--task", task, "--data", str(getattr(options, task)), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "remend", "eval", *given, *words, *limit], check=True)
        whole, found = time.monotonic() - began, read_object(out)
        low, high = found["interval_95"]
        score = f"{found['score']:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {task} | {found['how']} | {found['n']} | {score} | {found['seconds']:.0f} | {whole:.0f} |")
    around = found["environment"]
    machine, versions = around["hardware"], around["versions"]
    print(
        f"\n{machine['processor']}, {machine['cores']} cores, {', '.join(machine['gpus']) or 'no GPU'}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, load average at the start {load[0]:.1f}\n\n"
        "| task | how | rows | score (95%) | eval, s | whole, s |\n| --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
