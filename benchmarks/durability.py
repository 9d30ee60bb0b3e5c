"""What flushing and hashing cost in a recovery of SmolLM2: their seconds beside those of the whole run.

    python benchmarks/durability.py --out DIR [KEY=VALUE …]

The student is SmolLM2-135M-Instruct rounded to int4-g32-sym, its teacher the model as it was, everything else the
defaults, but for the recipe's keys that are given. Each flush of a file or directory and each SHA-256 of a file is
timed where it is called, in this process, so that load on the machine moves both figures alike. Bytes that are flushed
would be written some time later without it; they count as cost in full.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import remend
from remend.files.settings import parse_overrides


class Timed:
    """A function, and the seconds that its calls took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds, self.calls = 0.0, 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Call it."""
        began = time.perf_counter()
        try:
            return self.function(*args, **named)
        finally:
            self.seconds += time.perf_counter() - began
            self.calls += 1


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    student = given.out / "student"
    if not student.exists():
        words = ["degrade", "quantize", "smollm2", "--format", "int4-g32-sym", "--no-probe", "--out", str(student)]
        subprocess.run([sys.executable, "-m", "remend", *words], check=True)
    flushing, hashing = Timed(os.fsync), Timed(hashlib.file_digest)
    os.fsync, hashlib.file_digest = flushing, hashing
    keys = parse_overrides(given.keys)
    began = time.perf_counter()
    remend.recover(student=str(student), teacher="smollm2", out=given.out / "run", **keys)
    whole = time.perf_counter() - began
    for name, timed in (("flushing", flushing), ("hashing", hashing)):
        print(f"{name}: {timed.seconds:.1f} s in {timed.calls} calls, {timed.seconds / whole:.2%} of the run")
    both = flushing.seconds + hashing.seconds
    print(f"both: {both:.1f} s of {whole:.0f} s, {both / whole:.2%}")


if __name__ == "__main__":
    main()
