"""Disturb remend in every way that a machine, a user and a stranger's file can, and see that no result is wrong.

    python tests/campaign/campaign.py --minutes 30 --seed 0 --record       (make campaign MINUTES=30 SEED=0)
    python tests/campaign/campaign.py --only kills --seed 0 --try 17       one try again

The parts take turns until the time is over. A try depends on part, seed and number alone, but for what is done at a
random time. What fell short is printed with the command that shows it again, and then the exit code is 1. With
--record, a row is added to docs/measurements/campaign.jsonl, and docs/measurements/reliability.md is written from it.
The campaign needs Linux; powercuts, and a part of disk, need root.

The remend that is tried is the one that Python finds, so PYTHONPATH chooses another commit.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.update(
    {**QUIET, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "GIT_DIR": os.devnull}
)

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from campaign.disk import disk  # noqa: E402
from campaign.flips import flips  # noqa: E402
from campaign.fuzz import fuzz  # noqa: E402
from campaign.kills import kills  # noqa: E402
from campaign.place import Part, Place, Tried  # noqa: E402
from campaign.powercuts import powercuts  # noqa: E402
from campaign.reliability import RECORD, Row, write_page  # noqa: E402
from campaign.signals import signals  # noqa: E402
from campaign.writers import writers  # noqa: E402
from record import machine  # noqa: E402

PARTS: dict[str, Part] = {
    "kills": kills,
    "powercuts": powercuts,
    "flips": flips,
    "fuzz": fuzz,
    "writers": writers,
    "disk": disk,
    "signals": signals,
}


TURN: dict[str, int] = {"kills": 8, "fuzz": 5}
"""How many tries a part makes when it is its turn; 1 where nothing is said. Wanted are 300 killed recoveries and 10,000
damaged inputs, and of power cuts only 30."""


def one(place: Place, part: str, seed: int, number: int) -> Tried:
    """A try, which these words settle."""
    return PARTS[part](place, Random(f"{part} {seed} {number}"))


def in_turn(place: Place, parts: Sequence[str], seed: int, until: float) -> Iterator[tuple[str, int, Tried]]:
    """Tries of all parts until the time is over, each with its part and its number; what can't be tried is left out."""
    waiting = dict.fromkeys(parts, 0)
    while waiting:
        for part in tuple(waiting):
            for _ in range(TURN.get(part, 1)):
                if time.monotonic() > until:
                    return
                number = waiting[part]
                tried = one(place, part, seed, number)
                waiting[part] += 1
                yield part, number, tried
                if tried.skipped:
                    del waiting[part]
                    break


def summed(tries: Sequence[tuple[str, int, Tried]]) -> dict[str, dict[str, Any]]:
    """Of each part: what was tried how often, how many fell short, and why it was skipped."""
    result: dict[str, dict[str, Any]] = {}
    for part, _, tried in tries:
        row = result.setdefault(part, {"tried": collections.Counter(), "fell_short": 0})
        row["tried"].update(tried.kinds)
        row["fell_short"] += len(tried.fell) if tried.short is None else tried.short
        if tried.skipped:
            row["skipped"] = tried.skipped
    return {part: {**row, "tried": dict(sorted(row["tried"].items()))} for part, row in result.items()}


def ready() -> None:
    """Import once what the forks need."""
    import peft  # noqa: F401
    import torch
    import transformers

    import remend
    import remend.cli

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for lazy in remend.__all__:
        getattr(remend, lazy)


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="after the inputs were made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"of {','.join(PARTS)}; by default all")
    parser.add_argument("--try", dest="number", type=int, help="only this one of the part that --only names")
    parser.add_argument("--record", action="store_true", help=f"add a row to {RECORD.relative_to(ROOT)}")
    parser.add_argument("--work", type=Path, help="a new directory that is kept; by default a temporary one")
    chosen = parser.parse_args()
    parts = [word for word in chosen.only.split(",") if word] or [*PARTS]
    if unknown := [word for word in parts if word not in PARTS]:
        parser.error(f"no part of the campaign: {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    if chosen.number is not None and len(parts) != 1:
        parser.error("--try needs --only with one part")
    root = chosen.work or Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        return campaign(root.resolve(), parts, chosen)
    finally:
        if not chosen.work:
            shutil.rmtree(root, ignore_errors=True)


def campaign(root: Path, parts: Sequence[str], chosen: argparse.Namespace) -> int:
    """Run it in a directory; the exit code."""
    os.environ["REMEND_CACHE"] = str(root / "cache")
    ready()
    place = Place(root)
    place.prepare()
    began = time.monotonic()
    if chosen.number is not None:
        turns = iter([(parts[0], chosen.number, one(place, parts[0], chosen.seed, chosen.number))])
    else:
        turns = in_turn(place, parts, chosen.seed, began + 60 * chosen.minutes)
    tries, since = [], began
    spent: collections.Counter[str] = collections.Counter()
    for part, number, tried in turns:
        tries.append((part, number, tried))
        now = time.monotonic()
        spent[part] += now - since
        since = now
        told = tried.skipped or ", ".join(f"{kind} {count}" for kind, count in tried.kinds.items())
        print(f"{part:9} {number:4}  {told}", flush=True)
        for fell in tried.fell:
            print(f"FELL SHORT  {part}: {fell}", flush=True)
            print(f"  again: python tests/campaign/campaign.py --only {part} --seed {chosen.seed} --try {number}")
    sums = summed(tries)
    row = Row(
        date=str(datetime.datetime.now(datetime.UTC).date()),
        commit=tried_commit(),
        machine=machine(),
        seed=chosen.seed,
        minutes=round((time.monotonic() - began) / 60, 1),
        parts=sums,
    )
    if chosen.record:
        row.add()
        write_page()
    print(json.dumps(sums))
    for part, seconds in spent.items():
        print(f"{part:9} {sum(sums[part]['tried'].values()):6} in {seconds / 60:.1f} minutes")
    short = sum(part["fell_short"] for part in sums.values())
    tried_in_all = sum(sum(part["tried"].values()) for part in sums.values())
    print(f"{tried_in_all} tried in {row.minutes} minutes, {short} fell short")
    return int(short > 0)


def tried_commit() -> str:
    """The commit of the remend that is tried, with a plus where files differ from it."""
    import subprocess

    import remend

    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=7"]
    where = {key: value for key, value in os.environ.items() if key != "GIT_DIR"}
    home = Path(remend.__file__).parent
    told = subprocess.run(described, cwd=home, env=where, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
