"""One bit is flipped in a file, and a command reads it: it is found, or the result is the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from campaign.kills import die
from campaign.place import CASES, Ended, Hook, Place, Tried, differences

INTERRUPTED = ("repair", "streams", "lora", "best")
NOTES = re.compile(r"(^|/)(manifest\.json|recipe\.yaml|README\.md|samples\.jsonl|worst\.jsonl|[\w.-]+\.log)$")
"""Files in which a flipped bit may stay, where the result beside them is the same."""
INPUTS = r"^manifest\.json|^graded\.json files\.|^graded\.answers\.jsonl \[\d+\]\.key"
"""What says what a result was made of, as it lies there."""
ASIDE = r"\.aside-\d+ is there$"
"""A file that was found damaged, which a warning names, and made again."""


@dataclass(frozen=True)
class Reading:
    """Something that lies on the disk, and a command that reads it."""

    name: str
    give: Callable[[Place], None]
    command: str
    gives: Sequence[str]
    """What the command's result is, below disk/."""


def flips(place: Place, random: Random) -> Tried:
    """One bit of one file."""
    reading = random.choice(READINGS)
    undisturbed = _undisturbed(place, reading)
    place.clear()
    reading.give(place)
    files = sorted(path for path in place.disk.rglob("*") if path.is_file() and path.stat().st_size)
    path = random.choice(files)
    at, bit = random.randrange(path.stat().st_size), random.randrange(8)
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    ended = place.run(reading.command)
    what = f"{reading.name}: bit {bit} of byte {at} of {path.relative_to(place.disk)} flipped, {reading.command}"
    fell = _fell(place, reading, ended, undisturbed, path)
    return Tried({reading.name: 1}, (f"{what}: {fell}",) if fell else ())


def _fell(place: Place, reading: Reading, ended: Ended, undisturbed: Path, flipped: Path) -> str:
    if ended.clean:
        return ""
    if ended.code:
        return f"it ended with {ended.code}: {ended.said.strip()[-700:]}"
    without = f"{INPUTS}|{ASIDE}" + (f"|{flipped.name}" if NOTES.search(str(flipped)) else "")
    for name in reading.gives:
        if found := differences(undisturbed / name, place.disk / name, without):
            return f"silently another result: {found}"
    return ""


def _undisturbed(place: Place, reading: Reading) -> Path:
    kept = place.whole / f"flips {reading.name}"
    if not kept.is_dir():
        place.clear()
        reading.give(place)
        place.must(reading.command)
        shutil.copytree(place.disk, kept)
    return kept


def _interrupted(name: str) -> Callable[[Place], None]:
    """A run that was killed when half of its file operations were done and a checkpoint was there."""

    def give(place: Place) -> None:
        case = CASES[f"recover {name}"]
        kept = place.whole / f"interrupted {name}"
        at = int(place.size_of(case)[0] * 0.6)
        while not kept.is_dir():
            place.clear()
            place.run(case.command, Hook(at, die))
            if len(list(place.disk.glob("out/checkpoints/step-*/state.json"))) > 1:
                shutil.copytree(place.disk, kept)
            at += 5
        place.clear()
        shutil.copytree(kept, place.disk, dirs_exist_ok=True)

    return give


def _copy(source: str, to: str) -> Callable[[Place], None]:
    def give(place: Place) -> None:
        shutil.copytree(place.home / source, place.disk / to)

    return give


def _finished(place: Place) -> None:
    shutil.copytree(place.result(CASES["recover best"]), place.disk, dirs_exist_ok=True)


def _exported(place: Place) -> None:
    shutil.copytree(place.result(CASES["export dense"]) / "out", place.disk / "model")


def _cache(place: Place) -> None:
    recipe = json.loads((place.home / "cache.yaml").read_text(encoding="utf-8"))
    recipe["streams"]["stored"]["teacher"] = "disk/cache"
    (place.home / "cache-on-disk.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    _copy("given/cache", "cache")(place)


SCIENCE = "--task science --data letters.jsonl --how choices --out disk/graded.json"
GRADED = ("graded.json", "graded.answers.jsonl")
READINGS = (
    *(
        Reading(f"interrupted run {name}", _interrupted(name), "recover --resume disk/out", ("out",))
        for name in INTERRUPTED
    ),
    Reading("finished run, export", _finished, "export disk/out --format dense --out disk/exported", ("exported",)),
    Reading("finished run, eval", _finished, f"eval disk/out {SCIENCE}", GRADED),
    Reading(
        "degraded model, export",
        _copy("given/int3", "model"),
        "export disk/model --format dense --out disk/exported",
        ("exported",),
    ),
    Reading("degraded model, eval", _copy("given/int3", "model"), f"eval disk/model {SCIENCE}", GRADED),
    Reading("cache, recover", _cache, "recover cache-on-disk.yaml", ("out",)),
    Reading("export, eval", _exported, f"eval disk/model {SCIENCE}", GRADED),
)
