"""The power is cut: on a small ext4 in a file, whatever was not flushed is gone.

ext4's shutdown (an ioctl that xfstests uses) stops the file system at once, without writing its journal; mounted again,
it holds what a disk would hold after a cut. Needs root and loop devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from campaign.kills import finished
from campaign.place import CASES, Case, Place, Tried

SHUTDOWN, AT_ONCE = 0x8004587D, struct.pack("I", 2)
"""EXT4_IOC_SHUTDOWN, and to flush nothing, not even the journal."""
MIB = 64
ONES = [case for case in CASES.values() if not case.gives]


def powercuts(place: Place, random: Random) -> Tried:
    """A recovery (two of three) or another command; the power is cut on the way, or after it said that it was done."""
    case = random.choice([one for one in ONES if one.resumes] * 2 + [one for one in ONES if not one.resumes])
    _, seconds = place.size_of(case)
    place.clear(case)
    try:
        with ext4(place, random.randint(1, 5)) as cut:
            running = place.start(case.command)
            after = random.random() < 0.25
            if after:
                running.wait()
            else:
                time.sleep((0.2 + 0.8 * random.random()) * seconds)
            done, steps = not running.alive() and running.code == 0, trained(place)
            cut()
            running.kill()
            running.wait()
            kind = f"{case.name}, after it was done" if done else case.name
            return Tried({kind: 1}, _lost(place, case, done, steps))
    except CantMount as error:
        return Tried(skipped=str(error))


def _lost(place: Place, case: Case, done: bool, steps: int) -> tuple[str, ...]:
    if done:
        if found := place.differs(case):
            return (f"{case.name}: it had said that it was done, and the cut changed: {found}",)
        if not case.resumes:
            return ()
    if case.resumes:
        saved = [int(path.parent.name[5:]) for path in place.disk.glob("out/checkpoints/step-*/state.json")]
        every = json.loads((place.home / f"{case.name.split()[1]}.yaml").read_text(encoding="utf-8"))["save_every"]
        if steps - max(saved, default=0) > every:
            return (
                f"{case.name}: {steps} steps were trained, and the newest checkpoint is of {max(saved, default=0)}",
            )
    return finished(place, case)


def trained(place: Place) -> int:
    """The last step that a run has logged."""
    path = place.disk / "out" / "metrics.jsonl"
    if not path.is_file():
        return 0
    whole = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return max((row["step"] for row in whole if "loss" in row), default=0)


class CantMount(Exception):
    """No file system of its own can be had here."""


@contextlib.contextmanager
def ext4(place: Place, commit: int) -> Iterator[Callable[[], None]]:
    """The disk is an ext4 of its own within the block. Gives a function that cuts the power and mounts it again."""
    image = place.home.parent / "disk.img"
    with image.open("wb") as stream:
        stream.truncate(MIB * 2**20)
    called("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", image)
    mount = ("mount", "-o", f"loop,commit={commit}", image, place.disk)
    called(*mount)

    def cut() -> None:
        descriptor = os.open(place.disk, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, AT_ONCE)
        finally:
            os.close(descriptor)
        unmount(place.disk)
        called(*mount)

    try:
        place.clear()
        yield cut
    finally:
        unmount(place.disk)
        image.unlink()


def unmount(directory: Path) -> None:
    """Also where a process has not quite ended yet."""
    for _ in range(100):
        if not os.path.ismount(directory):
            return
        if subprocess.run(["umount", directory], capture_output=True).returncode:
            time.sleep(0.1)
    called("umount", directory)


def called(*words: object) -> None:
    """A command of the system."""
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    except FileNotFoundError:
        raise CantMount(f"there is no {words[0]} here") from None
    if done.returncode:
        raise CantMount(f"{words[0]} failed here (root and loop devices are needed): {done.stderr.strip()[:150]}")
