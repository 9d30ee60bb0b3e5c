"""What earlier runs on this machine took: rates.json in remend's cache, written at the end of each recovery.

A run is kept as the seconds of its phases beside those that `estimate` expects of its work at COST, which makes runs of
any length comparable. What is damaged is ignored with a warning, and a cache that can't be written stops no run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from remend.console import warn
from remend.errors import RemendError
from remend.files.atomic import write_json
from remend.files.cache import cache_root
from remend.files.environment import processor
from remend.files.reading import read_object
from remend.recovery.estimate import NOMINAL

FILE, VERSION, KEPT = "rates.json", 2, 100

GUESSING = 0.2
"""Seconds of products by which a machine without a record is judged."""

LIKE = 1.5
"""Models whose sizes differ by this factor at most count as of one size."""


@dataclass(frozen=True)
class Machine:
    """What speed depends on: kind of device, its name, the arithmetic's dtype, and a CPU's threads."""

    device: str
    name: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class RecordedRun:
    """One run.

    machine: where it ran. parameters: of its student. held: what kind of constraint held it.
    expected, seconds: of each phase, as `estimate` has it at COST, and as it was.
    answered: mean length of the completions that were trained on, as a share of what they might have been.
    """

    machine: Machine
    parameters: int
    held: str
    expected: Mapping[str, float]
    seconds: Mapping[str, float]
    answered: float


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine, where arithmetic runs on `device` in `dtype`."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else processor()
    return Machine(device.type, name, str(dtype).removeprefix("torch."), 0 if cuda else torch.get_num_threads())


def recorded() -> list[RecordedRun]:
    """The runs of rates.json, oldest first; none where it is missing or damaged, which is told."""
    path = cache_root() / FILE
    if not path.is_file():
        return []
    try:
        value = read_object(path)
        return [_run(row) for row in value["runs"]] if value["version"] == VERSION else []
    except (RemendError, KeyError, TypeError, ValueError, AttributeError):
        warn(f"{path}, which holds how long earlier runs took, is damaged and is ignored; the next run writes it anew")
        return []


def _run(row: Mapping[str, object]) -> RecordedRun:
    machine, expected, seconds = row["machine"], row["expected"], row["seconds"]
    if not (isinstance(machine, Mapping) and isinstance(expected, Mapping) and isinstance(seconds, Mapping)):
        raise TypeError
    numbers = [row["parameters"], row["answered"], *expected.values(), *seconds.values()]
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        raise ValueError
    return RecordedRun(**{**row, "machine": Machine(**machine)})  # type: ignore[arg-type]


def record(run: RecordedRun) -> None:
    """Add a run to rates.json, whose oldest runs go beyond KEPT. Where it can't be written that is told."""
    path = cache_root() / FILE
    try:
        write_json(path, {"version": VERSION, "runs": [asdict(one) for one in (*recorded(), run)][-KEPT:]})
    except RemendError as error:
        warn(f"how long this run took is not kept for the next check: {error}")


def best_of(runs: Sequence[RecordedRun], machine: Machine, parameters: int, held: str) -> list[RecordedRun]:
    """The runs on this machine that say most of a model, best first: of its size, under its kind of constraint, late.

    Runs with another dtype or number of threads are left out.
    """
    here = [(number, run) for number, run in enumerate(runs) if run.machine == machine]

    def far(item: tuple[int, RecordedRun]) -> tuple[float, bool, int]:
        number, run = item
        apart = abs(math.log(run.parameters / parameters)) if run.parameters and parameters else math.inf
        return (0.0 if apart <= math.log(LIKE) else apart), run.held != held, -number

    return [run for _, run in sorted(here, key=far)]


def factors_of(runs: Sequence[RecordedRun]) -> dict[str, float]:
    """By phase the seconds that a run took as a multiple of those expected at COST; the first run that has it counts.

    Under the empty name stands the factor of the first run as a whole, for phases that none has.
    """
    factors: dict[str, float] = {}
    for run in runs:
        for phase, seconds in run.seconds.items():
            if run.expected.get(phase):
                factors.setdefault(phase, seconds / run.expected[phase])
    if runs and (whole := sum(runs[0].expected.values())):
        factors[""] = sum(runs[0].seconds.values()) / whole
    return factors


@torch.no_grad()
def guessed_factor(device: torch.device, dtype: torch.dtype) -> float:
    """How much longer than NOMINAL this machine takes for products, tried for GUESSING seconds."""
    size = 4096 if device.type == "cuda" else 768
    one = torch.ones(size, size, device=device, dtype=dtype)
    count, _ = 0, one @ one
    began = time.perf_counter()
    while time.perf_counter() - began < GUESSING:
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return NOMINAL / (2 * size**3 * count / (time.perf_counter() - began))
