"""Commands that are killed, at a random time or at the n-th file operation, and given again.

What lies there in the end is what an undisturbed command leaves, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from random import Random

from campaign.place import CASES, Case, Hook, Operation, Place, Tried

RECOVERIES = [case for case in CASES.values() if case.resumes]
OTHERS = [case for case in CASES.values() if not case.resumes]
THERE = r"is not empty; name a new|exists; name a new|exists, and nothing is overwritten|left as it is; name a new"
"""What a command says where its result was whole before it was killed."""
PROBE = r"README\.md|degradation\.json (probe|sha256)|\.remend-tmp-(README\.md|degradation\.json)"
"""What is measured of a degraded model after it was saved, with which its record is written and signed anew."""


def kills(place: Place, random: Random) -> Tried:
    """One command, killed once to three times; half of them are recoveries."""
    case = random.choice(RECOVERIES if random.random() < 0.5 else OTHERS)
    operations, seconds = place.size_of(case)
    place.clear(case)
    met = 0
    for _ in range(random.randint(1, 3)):
        words = place.again(case)
        if random.random() < 0.6:
            met += place.run(words, Hook(random.randint(1, operations), die)).code == -signal.SIGKILL
        else:
            running = place.start(words)
            time.sleep(random.random() * seconds)
            met += running.kill()
            running.wait()
    return Tried({case.name: met}, finished(place, case))


def finished(place: Place, case: Case, without: str = "") -> tuple[str, ...]:
    """Give the command again, to its end: how the result falls short. `without`: what may differ, see `differs`."""
    words = place.again(case)
    ended = place.run(words)
    if ended.clean and re.search(THERE, ended.said):
        found = place.differs(case, f"{PROBE}|{without}" if without else PROBE)
        return (f"{case.name}: what is there counts as a result, and is another: {found}",) if found else ()
    if ended.code:
        return (f"{case.name}: remend {words} ended with {ended.code}: {ended.said.strip()[-700:]}",)
    if found := place.differs(case, without):
        return (f"{case.name}: the result is another than undisturbed: {found}",)
    left = [path.name for path in place.disk.rglob(".remend-tmp-*")]
    return (f"{case.name}: left behind: {', '.join(left)}",) if left else ()


def die(operation: Operation) -> None:
    """Kill this process. Where something is written, often only a part of it."""
    if operation.what == "append":
        with Path(operation.path).open("ab") as stream:
            stream.write(b'{"step": 1, "lo')
    elif operation.what in ("open", "tensors") and Path(operation.path).name.startswith(".remend-tmp-"):
        Path(operation.path).write_bytes(b"\0" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
