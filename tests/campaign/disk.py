"""A full disk, a file that may not grow, a file system that becomes read-only: one message, and then equal."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from campaign.kills import finished
from campaign.place import CASES, Case, Ended, Hook, Place, Tried
from campaign.powercuts import CantMount, called, unmount

ONES = [case for case in CASES.values() if not case.gives]
"""Commands whose whole result fits a small file system that is empty at first."""


def disk(place: Place, random: Random) -> Tried:
    """One of the three."""
    case, how = random.choice(ONES), random.choice(["full", "file size", "read-only"])
    whole = place.result(case)
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    place.clear(case)
    kind = {f"{case.name}, {how}": 1}
    if how == "file size":
        limit = max(100, int(random.random() * max(sizes)))
        ended = place.run(case.command, Hook(begin=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        return Tried(kind, _fell(place, case, ended, f"a limit of {limit} bytes a file"))
    try:
        with tmpfs(place.disk):
            if how == "full":
                pages = max(2, int(random.random() * 1.2 * sum(sizes)) // 4096)
                called("mount", "-o", f"remount,size={4096 * pages}", place.disk)
                ended = place.run(case.command)
                what = f"a disk of {4096 * pages} bytes"
            else:
                running = place.start(case.command)
                time.sleep(random.random() * place.size_of(case)[1])
                while running.alive() and _read_only(place.disk):
                    time.sleep(0.001)
                ended, what = running.wait(), "read-only in the middle"
            called("mount", "-o", "remount,rw,size=256m", place.disk)
            return Tried(kind, _fell(place, case, ended, what))
    except CantMount as error:
        return Tried(skipped=str(error))


def _fell(place: Place, case: Case, ended: Ended, what: str) -> tuple[str, ...]:
    # a study ends with 1 where a cell of it failed, and says of each why
    failed = (
        case.name == "study" and ended.code == 1 and "Traceback" not in ended.said and "Exception" not in ended.said
    )
    if ended.code and not (ended.clean or failed):
        return (f"{case.name}, {what}: it ended with {ended.code}: {ended.said.strip()[-700:]}",)
    if sum(line.startswith("error: ") for line in ended.said.splitlines()) > 1:
        return (f"{case.name}, {what}: more than one message: {ended.said.strip()[-700:]}",)
    return tuple(f"{what}: {fell}" for fell in finished(place, case))


def _read_only(directory: Path) -> int:
    """Refused while a file is open for writing."""
    return subprocess.run(["mount", "-o", "remount,ro", directory], capture_output=True).returncode


@contextlib.contextmanager
def tmpfs(directory: Path) -> Iterator[None]:
    """Mounted there within the block."""
    called("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", directory)
    try:
        yield
    finally:
        called("mount", "-o", "remount,rw", directory)
        unmount(directory)
