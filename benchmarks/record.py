"""Run a long check and keep what came of it: a row in docs/measurements/runs.md for each run.

    python benchmarks/record.py slow --seed 0 -- python -m pytest -m slow
    python benchmarks/record.py --show

The exit code is the command's. CI runs only a part of the checks, and prints this table for the rest.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "measurements" / "runs.md"
HEAD = """# Long checks, run by hand

What `.ci/run` does not run in full. Each row was added by `benchmarks/record.py`, which the make targets call.

| date | commit | check | seed | minutes | machine | result |
| --- | --- | --- | --- | --- | --- | --- |
"""


def commit() -> str:
    """The commit that stands here, with a plus where files differ from it."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=7"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    """The processor's name and how many cores are used."""
    import os

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else 'unknown'}, {os.cpu_count()} cores"


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="?", help="name of the row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    chosen = parser.parse_args(words[:at])
    if chosen.show:
        print(TABLE.read_text(encoding="utf-8") if TABLE.is_file() else "no long check was recorded yet")
        return 0
    command = words[at + 1 :]
    if not chosen.check or not command:
        parser.error("name the check and, after --, its command")
    began, date = time.monotonic(), datetime.datetime.now(datetime.UTC).date()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    code = process.wait()
    minutes = (time.monotonic() - began) / 60
    result = f"{'passed' if code == 0 else f'failed ({code})'}: {last.strip('= ')}".replace("|", "/")
    row = f"| {date} | {commit()} | {chosen.check} | {chosen.seed} | {minutes:.1f} | {machine()} | {result} |\n"
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    text = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else HEAD
    TABLE.write_text(text + row, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
