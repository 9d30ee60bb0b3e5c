"""Two processes with one `out`: never do both write, and what one writes is what it would have written alone."""

from __future__ import annotations

import time
from random import Random

from campaign.kills import RECOVERIES, die
from campaign.place import CASES, Case, Ended, Hook, Place, Running, Tried

NEW = [case for case in CASES.values() if not case.gives]


def writers(place: Place, random: Random) -> Tried:
    """Two new ones, or two that resume what was broken off."""
    resume = random.random() < 0.5
    case = random.choice(RECOVERIES if resume else NEW)
    operations, seconds = place.size_of(case)
    place.clear(case)
    words = case.command
    if resume:
        while not (place.disk / "out" / "recipe.yaml").is_file():
            place.clear(case)
            place.run(words, Hook(random.randint(operations // 3, operations), die))
        words = place.again(case)
    first = place.start(words, log=place.log.with_name("first.txt"))
    time.sleep(random.choice([0.0, 0.1, random.random() * seconds]))
    second = place.start(words, log=place.log.with_name("second.txt"))
    kind = f"{case.name}, {'resumed' if resume else 'new'}"
    return Tried({kind: 1}, tuple(f"{kind}: {fell}" for fell in _fell(place, case, [first, second])))


def _fell(place: Place, case: Case, both: list[Running]) -> list[str]:
    ended: list[Ended] = [one.wait() for one in both]
    fell = [f"one ended with {one.code}: {one.said.strip()[-500:]}" for one in ended if one.code and not one.clean]
    if all(one.code for one in ended):
        fell.append(f"both were refused: {' and '.join(one.said.strip()[-300:] for one in ended)}")
    elif found := place.differs(case):
        fell.append(f"the result is another than that of one alone: {found}")
    return fell
