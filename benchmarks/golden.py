"""Do old and new code compute the same? Both run side by side on one machine, and every file is compared.

    python benchmarks/golden.py --old 13d6498          (make golden OLD=13d6498)

A refactoring must not change a number. Unit tests can't show that: they are refactored with the code, and what they
don't look at may move unseen. So this script unpacks OLD from git's history, hands one set of files to it and
to the code that stands here, and lets both go through the command line: every way of degrading, recoveries that
are killed in the middle and resumed, and what looks at a recovery afterwards. Then it compares whatever was written.

It stands in benchmarks/, not in tests/: it needs the repository's history, two interpreters and minutes, and its result
is about two commits. `tests/test_golden.py` keeps figures of the same commands for a quick look.

A side is one process with one thread, in float32 on the CPU. Each command runs in a fork of it, so that the imports are
paid once and no command sees what another left behind. A run is killed by SIGKILL when it opens metrics.jsonl for the
row KILLED_AT: that needs no name of the code's insides, which differ between the sides.

Equal means: tensors bit for bit, text byte for byte, numbers in JSON exactly. Statistics (intervals, p-values) may
differ by 1e-9, since a library's formula rounds in another order. The clock stands still and memory is constant, as
far as a side can see. A difference that is meant has its reason in golden_reasons.py; any other makes the exit code 1.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from golden_reasons import CLOSE, MISSING, Difference, reason  # noqa: E402
from helpers.golden import DEGRADE, KILLED_AT, MORE_RECIPES, RECIPES, cpu_kind, write_inputs, write_recipes  # noqa: E402

AFTERWARDS = [
    "diagnose --reference reference --student given/int3 --student given/runs/grid --out after/diagnosis --rows 24",
    "track given/runs/lora",
    "correlate given/runs/grid given/runs/mask given/runs/lora --out after/correlation --permutations 500",
    "export given/runs/grid --format dense --out after/dense",
    "export given/nf4 --format dense --out after/nf4",
    "export given/mask --format gguf --out after/gguf",
    "study study.yaml --out after/study",
    "eval reference --task tooluse --data tools.jsonl --out after/tools.json --max-new-tokens 12 --samples 2",
    "eval given/runs/grid --task tooluse --data tools.jsonl --out after/tools-grid.json --max-new-tokens 12",
    "eval reference --task science --data letters.jsonl --out after/letters.json --how choices",
    "eval given/int3 --task science --data letters.jsonl --out after/letters-int3.json --how choices",
    "eval given/runs/grid --task science --data letters.jsonl --out after/letters-grid.json --how choices",
    "compare after/letters.json after/letters-int3.json after/letters-grid.json --out after/compared.json",
    *(f"report runs/{name}" for name in (*RECIPES, *MORE_RECIPES)),
    f"report {' '.join(f'given/runs/{name}' for name in RECIPES)} --out after/report",
]
"""What looks at models and runs: those that OLD made, for both, so that a difference before does not show again here,
and since a run that OLD wrote must be taken. Reports are also made of each side's own runs."""

STATISTICS = r"interval|_95$|^p$|p_value|(\b|_)(low|high)\b|\bband\[|detectable|spearman|pearson|error"
"""What a library's formula may round otherwise, by less than CLOSE: a part of the key's path."""
MOVED = re.compile(r"\bremend/(?=(grid|width)\.safetensors$)")
"""The folder in a model's directory to which files moved that lay beside the weights."""


# one side ------------------------------------------------------------------------------------------------------------


def side(jobs: list[dict[str, Any]]) -> None:
    """Run commands one after another, each in a fork; prints a JSON line with the exit status of each."""
    _stop_the_clock()
    import peft  # noqa: F401  (a command would import it otherwise, each anew)
    import torch

    import remend

    home = str(Path(remend.__file__).parent.parent)
    assert home == os.environ["PYTHONPATH"], f"remend comes from {home}"
    for name in remend.__all__:
        getattr(remend, name)  # imports what the commands will need
    assert torch.get_num_threads() == 1
    for job in jobs:
        began = time.time()
        child = os.fork()
        if child == 0:
            _command(job)
        _, status = os.waitpid(child, 0)
        seconds = round(time.time() - began, 2)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({**job, "code": code, "seconds": seconds}), flush=True)


def _stop_the_clock() -> None:
    """Time hardly passes and memory stays the same, so that neither stands in a file or in the hash of one."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.getrusage = lambda who: usage
    ticks = itertools.count()
    time.perf_counter = time.monotonic = lambda: next(ticks) * 2.0**-24  # rounded, it is 0 s; but one may divide by it


def _command(job: dict[str, Any]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["killed_at"]:
        sys.addaudithook(_killer(job["killed_at"]))
    sys.argv = ["remend", *job["command"].split()]
    code: object = 0
    try:
        runpy.run_module("remend", run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _killer(row: int) -> Any:
    opened = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and str(details[0]).endswith("metrics.jsonl") and details[2] & os.O_APPEND:
            opened += 1
            if opened == row:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


class Side:
    """Old or new code, with a directory of its own that holds the same files."""

    def __init__(self, name: str, source: Path, directory: Path) -> None:
        self.name, self.source, self.directory = name, source, directory

    def start(self, jobs: list[dict[str, Any]]) -> subprocess.Popen[str]:
        """Run the jobs in the background."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        quiet = {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "GIT_DIR": os.devnull,
        }
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--side", json.dumps(jobs)],
            cwd=self.directory,
            env={**os.environ, **threads, **quiet, "GIT_DIR": os.devnull, "PYTHONPATH": str(self.source)},
            stdout=subprocess.PIPE,
            stderr=(self.directory.parent / f"{self.name}.txt").open("w"),
            text=True,
        )


def both(sides: tuple[Side, ...], jobs: list[dict[str, Any]]) -> None:
    """Run the same jobs on all sides at once. Exits where one ends otherwise than it should."""
    running = [one.start(jobs) for one in sides]
    for one, process in zip(sides, running, strict=True):
        lines = process.communicate()[0].splitlines()
        ended = [json.loads(line) for line in lines if line.startswith("{")]
        if process.returncode or len(ended) != len(jobs):
            said = (one.directory.parent / f"{one.name}.txt").read_text(encoding="utf-8")
            sys.exit(f"{one.name}: the side broke off\n{said[-4000:]}")
        for job in ended:
            expected = -signal.SIGKILL if job["killed_at"] else 0
            if job["code"] != expected:
                log = (one.directory / job["log"]).read_text(encoding="utf-8")
                sys.exit(f"{one.name}: remend {job['command']} ended with {job['code']}\n{log[-4000:]}")
        print(f"{one.name}: {len(ended)} commands, {sum(job['seconds'] for job in ended):.0f} s", flush=True)


def job(log: str, command: str, killed_at: int = 0) -> dict[str, Any]:
    """A command; its output goes to logs/LOG.txt."""
    return {"log": f"logs/{log}.txt", "command": command, "killed_at": killed_at}


def set_seconds(runs: Path) -> None:
    """Half a second for every step, so that a report has a speed to show."""
    for path in sorted(runs.rglob("timing.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps({**row, "seconds": 0.5}) + "\n" for row in rows), encoding="utf-8")


# the comparison ------------------------------------------------------------------------------------------------------


Differences = Iterator[tuple[str, object, object, bool]]
"""(place, before, after, whether it is a statistic that is close enough)."""


def compare_trees(before: Path, after: Path) -> tuple[int, list[Difference]]:
    """Number of files, and all differences."""
    old, new = (
        {MOVED.sub("", str(path.relative_to(root))): path for path in root.rglob("*") if path.is_file()}
        for root in (before, after)
    )
    differences = [Difference(name, "", "there", MISSING) for name in sorted(old.keys() - new)]
    differences += [Difference(name, "", MISSING, "there") for name in sorted(new.keys() - old)]
    for name in sorted(old.keys() & new):
        differences += [Difference(name, *rest) for rest in compare_files(old[name], new[name])]
    return len(old | new), differences


def compare_files(before: Path, after: Path) -> Differences:
    """Differences between two files, by what they are."""
    if before.read_bytes() == after.read_bytes():
        return
    readers: dict[str, Callable[[str], Any]] = {
        ".json": json.loads,
        ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
        ".yaml": yaml.safe_load,
        ".csv": lambda text: list(csv.DictReader(text.splitlines())),
    }
    if before.suffix == ".safetensors":
        yield from compare_tensors(before, after)
        return
    try:
        old, new = (path.read_text(encoding="utf-8") for path in (before, after))
    except UnicodeDecodeError:
        yield "", f"{before.stat().st_size} bytes", f"{after.stat().st_size} other bytes", False
        return
    if before.suffix == ".txt":  # what was printed; that stages come in another order is no difference
        yield from compare_texts("", *("\n".join(sorted(text.splitlines())) for text in (old, new)))
    elif before.suffix == ".jsonl" and len(old.splitlines()) != len(new.splitlines()):
        yield from compare_texts("", old, new)
    elif before.suffix in readers:
        yield from compare_values("", *map(readers[before.suffix], (old, new)))
    else:
        yield from compare_texts("", old, new)


def compare_tensors(before: Path, after: Path) -> Differences:
    """Bit for bit, with metadata."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        yield from compare_values("metadata", old.metadata(), new.metadata())
    ours, theirs = load_file(before), load_file(after)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield name, *("there" if name in tensors else MISSING for tensors in (ours, theirs)), False
            continue
        x, y = ours[name], theirs[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            yield name, f"{x.dtype} {list(x.shape)}", f"{y.dtype} {list(y.shape)}", False
        elif not x.reshape(-1).view(torch.uint8).equal(y.reshape(-1).view(torch.uint8)):
            off = (x.double() - y.double()).abs()
            yield name, f"{int((off > 0).sum())} of {off.numel()} differ", f"by up to {off.max():.3g}", False


def compare_values(place: str, before: object, after: object) -> Differences:
    """Differences of two values of JSON, down to the leaves."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            path = f"{place}.{name}" if place else name
            if name in before and name in after:
                yield from compare_values(path, before[name], after[name])
            else:
                yield path, before.get(name, MISSING), after.get(name, MISSING), False
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from compare_values(f"{place}[{i}]", old, new)
    elif isinstance(before, str) and isinstance(after, str) and "\n" in before:
        yield from compare_texts(f"{place} ", before, after)
    elif type(before) is not type(after) or before != after:
        close = False
        if isinstance(before, float) and isinstance(after, float) and re.search(STATISTICS, place):
            close = math.isclose(before, after, rel_tol=CLOSE, abs_tol=CLOSE)
        yield place, before, after, close


def compare_texts(place: str, before: str, after: str) -> Differences:
    """By line; a line that only one side has is missing on the other."""
    old, new = before.splitlines(), after.splitlines()
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        if kind != "equal":
            pairs = itertools.zip_longest(old[i:i_end], new[j:j_end], fillvalue=MISSING)
            for k, (left, right) in enumerate(pairs):
                yield f"{place}line {i + k + 1}", left, right, False


# the whole -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--old", default="13d6498", help="commit of the old code")
    parser.add_argument("--keep", type=Path, help="a new directory for everything, to look at afterwards")
    parser.add_argument("--compare", type=Path, help="only compare what --keep has kept there")
    parser.add_argument("--fixture", type=Path, help="only write a new directory with runs of OLD, for the tests")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        side(json.loads(chosen.side))
        return
    if chosen.compare:
        sys.exit(verdict(chosen.compare, str(chosen.compare)))
    with tempfile.TemporaryDirectory() as temporary:
        directory = chosen.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        old = subprocess.run(["git", "-C", str(ROOT), "archive", chosen.old], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(old)) as archive:
            archive.extractall(Path(temporary) / "tree", filter="data")
        if chosen.fixture:
            fixture(Path(temporary) / "tree", chosen.fixture.resolve())
        else:
            sys.exit(golden(Path(temporary) / "tree", directory.resolve(), chosen.old))


def golden(tree: Path, directory: Path, commit: str) -> int:
    """Run and compare; the exit code."""
    began = time.monotonic()
    sides = (Side("old", tree / "src", directory / "old"), Side("new", ROOT / "src", directory / "new"))
    write_inputs(directory / "inputs")
    write_recipes(directory / "inputs")
    for one in sides:
        shutil.copytree(directory / "inputs", one.directory)
        for name in ("logs", "made", "runs", "after"):
            (one.directory / name).mkdir()
    both(sides, [job(f"degrade-{name}", f"{words} --out made/{name}") for name, words in DEGRADE.items()])
    give(sides, "made", "given")
    both(sides, [part for name in RECIPES for part in killed_and_resumed(name)])
    give(sides, "runs", "given/runs")
    both(sides, [part for name in MORE_RECIPES for part in killed_and_resumed(name)])
    both(sides, [job(f"{i + 1:02d}-{words.split()[0]}", words) for i, words in enumerate(AFTERWARDS)])
    return verdict(directory, f"{(time.monotonic() - began) / 60:.1f} min, OLD is {commit}")


def fixture(tree: Path, directory: Path) -> None:
    """A complete and a killed run as OLD writes them, with what they were made from. Paths in them are relative."""
    write_inputs(directory, width=32, layers=2, steps=60)
    write_recipes(directory)
    (directory / "logs").mkdir()
    one = Side("old", tree / "src", directory)
    jobs = [
        job("student", "degrade quantize reference --format int2-g32 --out student"),
        job("forgot", f"{DEGRADE['forgot']} --out forgot"),
        job("complete", "recover complete.yaml"),
        job("killed", "recover killed.yaml", KILLED_AT),
    ]
    both((one,), jobs)
    set_seconds(directory)
    both((one,), [job("report", "report complete")])
    unneeded = [directory / "tools.jsonl", directory / "letters-train.jsonl"]
    for path in [*directory.glob("*.yaml"), *unneeded]:
        path.unlink()
    shutil.rmtree(directory / "logs")
    (directory.parent / "old.txt").unlink()
    (directory / "cpu.json").write_text(json.dumps(cpu_kind(), indent=1) + "\n", encoding="utf-8")


def verdict(directory: Path, about: str) -> int:
    """Compare, print the table; the exit code."""
    count, differences = compare_trees(directory / "old", directory / "new")
    show(differences)
    unexplained = [d for d in differences if reason(d) is None]
    print(f"{count} files compared ({about}): {len(unexplained)} differences without a reason, ", end="")
    print(f"{len(differences) - len(unexplained)} with one")
    return int(bool(unexplained))


def killed_and_resumed(name: str) -> list[dict[str, Any]]:
    """The two commands of a recipe."""
    killed = job(f"{name}-killed", f"recover {name}.yaml", KILLED_AT)
    return [killed, job(f"{name}-resumed", f"recover --resume runs/{name}")]


def give(sides: tuple[Side, Side], made: str, given: str) -> None:
    """Hand what OLD made to both sides."""
    for one in sides:
        set_seconds(one.directory / made)
    for one in sides:
        shutil.copytree(sides[0].directory / made, one.directory / given)


def show(differences: list[Difference]) -> None:
    """The table: file, place, before, after, reason. What differs alike for one reason is one row with the first place
    and how many there are."""
    rows = [("file", "place", "before", "after", "reason")]
    alike: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in differences:
        why, cut = reason(difference), _around(difference.before, difference.after)
        if why is None:
            rows.append((difference.file, difference.place, *cut, "NONE"))
        else:
            alike.setdefault((*cut, why), []).append(difference)
    for (before, after, why), group in alike.items():
        also = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        rows.append((group[0].file, group[0].place + also, before, after, why))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows if len(rows) > 1 else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _around(before: object, after: object, width: int = 60) -> tuple[str, str]:
    """Both, cut to where they begin to differ."""
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in (before, after)]
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    start = max(0, at - width // 3) if max(map(len, texts)) > width else 0
    first, second = (text[start : start + width] for text in texts)
    return first, second


if __name__ == "__main__":
    main()
