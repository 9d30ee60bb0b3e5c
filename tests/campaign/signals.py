"""SIGTERM and SIGINT at any moment of any command: its exit code, and that what is left is what the message says."""

from __future__ import annotations

import os
import re
import signal
import time
from random import Random

from campaign.kills import finished
from campaign.place import CASES, Ended, Hook, Place, Tried

OLDER = r"^out/checkpoints/step-00000[1-5]/|state\.json (logged\.repair\.json\.)?sha256"
"""A signal has one checkpoint more written, and one that an undisturbed run keeps may be too old then. repair.json says
how long repair took, and the clock stands still only in processes that are forked."""
STRANGERS = r"export\.json (check\.(read_by|strangers)|sha256)"
"""A command from nothing asks transformers at more precisions than one in a fork of this process."""
BEGINNING = ".remend-tmp-beginning"
"""By it the same command knows that a run which has no manifest yet is its own; the next one takes it away."""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def signals(place: Place, random: Random) -> Tried:
    """One signal, at a file operation or at any time, also while Python starts; or two: the second ends at once."""
    case = random.choice([*CASES.values()])
    operations, seconds = place.size_of(case)
    place.clear(case)
    number = random.choice([*CODES])
    way = random.random()
    without = OLDER
    if way < 0.15:
        without += f"|{STRANGERS}"
        running = place.start(case.command, from_nothing=True)
        time.sleep(random.random() * (seconds + place.importing()))
        running.kill(number)
        ended = running.wait()
    elif way < 0.5:
        ended = place.run(
            case.command, Hook(random.randint(1, operations), lambda operation: os.kill(os.getpid(), number))
        )
    else:
        running = place.start(case.command)
        time.sleep((0.05 + 0.95 * random.random()) * seconds)
        running.kill(number)
        if random.random() < 0.3:
            time.sleep(0.02)
            running.kill(number)
        ended = running.wait()
    name = signal.Signals(number).name
    fell = _told(place, ended, CODES[number])
    if fell:
        return Tried({f"{case.name} {name}": 1}, (f"{case.name} {name}: {fell}",))
    return Tried({f"{case.name} {name}": 1}, finished(place, case, without))


def _told(place: Place, ended: Ended, code: int) -> str:
    """What was said and what is there, where they are not the same."""
    if ended.code == 0:  # it had come to its end
        return ""
    if ended.code == -(code - 128) and "/remend/" not in ended.said:
        return ""  # before remend was reached: what any program does
    if ended.code != code:
        return f"it ended with {ended.code}, not {code}: {ended.said.strip()[-500:]}"
    if "Traceback" in ended.said:
        return f"a traceback: {ended.said.strip()[-700:]}"
    if left := [path.name for path in place.disk.rglob(".remend-tmp-*") if path.name != BEGINNING]:
        return f"it left {', '.join(left)}"
    if (said := re.search(r"saved up to step (\d+)", ended.said)) and not (
        place.disk / "out" / "checkpoints" / f"step-{int(said[1]):06d}" / "state.json"
    ).is_file():
        return f"it said {said[0]!r}, and there is no such checkpoint"
    if (said := re.search(r"recover --resume (\S+)", ended.said)) and not (
        place.home / said[1] / "recipe.yaml"
    ).is_file():
        return f"it said {said[0]!r}, and there is no such run"
    return ""
