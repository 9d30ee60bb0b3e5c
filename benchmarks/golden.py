"""Do old and new code compute the same? Both run side by side on one machine, and every file is compared.

    python benchmarks/golden.py --old 13d6498          (make golden OLD=13d6498)

A refactoring must not change a number. Unit tests can't show that: they are refactored with the code, and what they
don't look at may move unseen. So this script unpacks OLD from git's history, hands one set of files to it and
to the code that stands here, and lets both go through the command line: every way of degrading, five recoveries that
are killed in the middle and resumed, and what looks at a recovery afterwards. Then it compares whatever was written.

It stands in benchmarks/, not in tests/: it needs the repository's history, two interpreters and minutes, and its result
is about two commits. `tests/test_golden.py` keeps figures of the same commands for a quick look.

A side is one process with one thread, in float32 on the CPU. Each command runs in a fork of it, so that the imports are
paid once and no command sees what another left behind. A run is killed by SIGKILL when it opens metrics.jsonl for the
row KILLED_AT: that needs no name of the code's insides, which differ between the sides.

Equal means: tensors bit for bit, text byte for byte, numbers in JSON exactly. Statistics (intervals, p-values) may
differ by 1e-9, since a library's formula rounds in another order. Seconds and memory get one value on both sides before
the pages are made. A difference with a reason stands in EXPLAINED; any other makes the exit code 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.golden import DEGRADE, KILLED_AT, RECIPES, write_inputs, write_recipes  # noqa: E402

AFTERWARDS = [
    "diagnose --reference reference --student given/int3 --student given/runs/grid --out after/diagnosis --rows 24",
    "track given/runs/lora",
    "correlate given/runs/grid given/runs/mask given/runs/lora --out after/correlation --permutations 500",
    "export given/runs/grid --format dense --out after/dense",
    "export given/int4 --format compressed-tensors --out after/packed",
    "export given/gptq --format gguf:q4_0 --out after/gguf",
    "eval reference --task tooluse --data tools.jsonl --out after/tools.json --max-new-tokens 12 --samples 2",
    "eval given/runs/grid --task tooluse --data tools.jsonl --out after/tools-grid.json --max-new-tokens 12",
    "eval reference --task science --data letters.jsonl --out after/letters.json --how choices",
    "eval given/int3 --task science --data letters.jsonl --out after/letters-int3.json --how choices",
    "eval given/runs/grid --task science --data letters.jsonl --out after/letters-grid.json --how choices",
    "compare after/letters.json after/letters-int3.json after/letters-grid.json --out after/compared.json",
    *(f"report runs/{name}" for name in RECIPES),
    f"report {' '.join(f'given/runs/{name}' for name in RECIPES)} --out after/report",
]
"""What looks at models and runs: those that OLD made, for both, so that a difference before does not show again here,
and since a run that OLD wrote must be taken. Reports are also made of each side's own runs."""

TIMES = ("seconds", "training_seconds", "peak_rss_mib")
"""Keys of JSON that differ between any two runs."""

CHANGED_KEYS = {"importance_clip": None, "scales": "fixed", "loss": None}
"""Keys of a recipe that are gone or new since OLD, with the value at which they do nothing. Both sides' own runs lose
them before their pages are made; the runs of OLD that both are given keep them."""

STATISTICS = r"interval|_95$|^p$|p_value|\blow\b|\bhigh\b|detectable|spearman|pearson|error"
CLOSE = 1e-9
"""What a library's formula may round otherwise, by a part of the key's path, and how much."""


@dataclass(frozen=True)
class Explained:
    """A difference that is meant: files and keys by pattern (of fnmatch), and why."""

    files: str
    keys: str
    reason: str


EXPLAINED: list[Explained] = []


@dataclass(frozen=True)
class Difference:
    """What one file says on each side."""

    file: str
    key: str
    before: str
    after: str
    statistic: bool = False
    """Below CLOSE, and of a number that may differ by so much."""

    def reason(self) -> str | None:
        """Why it is meant, or None."""
        if self.statistic:
            return f"a statistic, below {CLOSE}"
        fits = (e for e in EXPLAINED if fnmatch.fnmatch(self.file, e.files) and fnmatch.fnmatch(self.key, e.keys))
        return next((e.reason for e in fits), None)


# one side ------------------------------------------------------------------------------------------------------------


def side(jobs: list[dict[str, Any]]) -> None:
    """Run commands one after another, each in a fork; prints a JSON line with the exit status of each."""
    import torch

    import remend

    home = str(Path(remend.__file__).parent.parent)
    assert home == os.environ["PYTHONPATH"], f"remend comes from {home}"
    for name in remend.__all__:
        getattr(remend, name)  # imports what the commands will need
    assert torch.get_num_threads() == 1
    for job in jobs:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _command(job)
        _, status = os.waitpid(child, 0)
        seconds = round(time.monotonic() - began, 2)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({**job, "code": code, "seconds": seconds}), flush=True)


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
            text=True,
        )


def both(sides: tuple[Side, Side], jobs: list[dict[str, Any]]) -> None:
    """Run the same jobs on both sides at once. Exits where one ends otherwise than it should."""
    running = [one.start(jobs) for one in sides]
    for one, process in zip(sides, running, strict=True):
        lines = process.communicate()[0].splitlines()
        ended = [json.loads(line) for line in lines if line.startswith("{")]
        if process.returncode or len(ended) != len(jobs):
            sys.exit(f"{one.name}: the side broke off\n" + "\n".join(lines[-20:]))
        for job in ended:
            expected = -signal.SIGKILL if job["killed_at"] else 0
            if job["code"] != expected:
                log = (one.directory / job["log"]).read_text(encoding="utf-8")
                sys.exit(f"{one.name}: remend {job['command']} ended with {job['code']}\n{log[-4000:]}")
        spent = ", ".join(f"{Path(job['log']).stem} {job['seconds']}" for job in ended)
        print(f"{one.name}: {spent} s", flush=True)


def job(log: str, command: str, killed_at: int = 0) -> dict[str, Any]:
    """A command; its output goes to logs/LOG.txt."""
    return {"log": f"logs/{log}.txt", "command": command, "killed_at": killed_at}


def stop_the_clock(directory: Path) -> None:
    """Put one value for what the clock said into the files, so that the pages made of them can be compared."""
    for path in sorted(directory.rglob("*.json*")):
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            path.write_text("".join(json.dumps(_stopped(row)) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(_stopped(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def _stopped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: 0.5 if key in TIMES else _stopped(part) for key, part in value.items()}
    return [_stopped(part) for part in value] if isinstance(value, list) else value


def leave_out_changed_keys(directory: Path) -> None:
    """CHANGED_KEYS leave what a run says of its recipe."""
    import yaml

    for path in sorted(directory.rglob("recipe.yaml")):
        recipe = _without_changed(yaml.safe_load(path.read_text(encoding="utf-8")))
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        manifest = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
        manifest["recipe"] = _without_changed(manifest["recipe"])
        (path.parent / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _without_changed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key: part for key, part in value.items() if key not in CHANGED_KEYS or part != CHANGED_KEYS[key]}
    return {key: _without_changed(part) for key, part in kept.items()}


# the comparison ------------------------------------------------------------------------------------------------------


def compare_trees(before: Path, after: Path) -> tuple[int, list[Difference]]:
    """Number of files, and all differences."""
    names = [{str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} for root in (before, after)]
    differences: list[Difference] = []
    for name in sorted(names[0] | names[1]):
        if name not in names[1] or name not in names[0]:
            there = ["there" if name in side_names else "missing" for side_names in names]
            differences.append(Difference(name, "", there[0], there[1]))
        else:
            differences += [
                Difference(name, key, old, new, statistic)
                for key, old, new, statistic in compare_files(before / name, after / name)
            ]
    return len(names[0] | names[1]), differences


Found = Iterator[tuple[str, str, str, bool]]
"""(key, before, after, whether it is a statistic that is close enough)."""


def compare_files(before: Path, after: Path) -> Found:
    """Differences between two files, by what they are."""
    if before.read_bytes() == after.read_bytes():
        return
    suffix = before.suffix
    if suffix == ".safetensors":
        yield from _tensors(before, after)
    elif suffix == ".json":
        yield from compare_values("", *(json.loads(p.read_text(encoding="utf-8")) for p in (before, after)))
    elif suffix == ".jsonl":
        rows = [[json.loads(line) for line in p.read_text(encoding="utf-8").splitlines()] for p in (before, after)]
        yield from compare_values("", *rows)
    elif suffix in (".yaml", ".yml"):
        import yaml

        yield from compare_values("", *(yaml.safe_load(p.read_text(encoding="utf-8")) for p in (before, after)))
    elif suffix in (".html", ".md", ".txt"):
        yield from _text(before, after)
    else:
        yield "", f"{before.stat().st_size} bytes", f"{after.stat().st_size} other bytes", False


def _tensors(before: Path, after: Path) -> Found:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        yield from compare_values("metadata", old.metadata(), new.metadata())
    ours, theirs = load_file(before), load_file(after)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield name, *("there" if name in tensors else "missing" for tensors in (ours, theirs)), False
            continue
        x, y = ours[name], theirs[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            yield name, f"{x.dtype} {list(x.shape)}", f"{y.dtype} {list(y.shape)}", False
        elif x.numpy().tobytes() != y.numpy().tobytes():
            off = (x.double() - y.double()).abs()
            yield name, f"{int((off > 0).sum())} of {off.numel()} differ", f"by up to {off.max():.3g}", False


def compare_values(key: str, before: Any, after: Any) -> Found:
    """Differences of two values of JSON, to the leaves."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            path = f"{key}.{name}" if key else name
            if name not in before or name not in after:
                yield path, *(_short(v.get(name, "missing")) for v in (before, after)), False
            else:
                yield from compare_values(path, before[name], after[name])
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from compare_values(f"{key}[{i}]", old, new)
    elif type(before) is not type(after) or before != after:
        close = isinstance(before, float) and isinstance(after, float) and re.search(STATISTICS, key)
        statistic = bool(close) and abs(before - after) <= CLOSE * max(1.0, abs(before))
        yield key, _short(before), _short(after), statistic


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


CLOCK = re.compile(r"\d+(\.\d+)? (s|MiB)\b")


def _text(before: Path, after: Path) -> Found:
    texts = [p.read_text(encoding="utf-8") for p in (before, after)]
    lines = [(CLOCK.sub("…", text) if before.suffix == ".txt" else text).splitlines() for text in texts]
    if len(lines[0]) != len(lines[1]):
        yield "lines", str(len(lines[0])), str(len(lines[1])), False
        return
    for i, (old, new) in enumerate(zip(*lines, strict=True)):
        if old != new:
            at = next((k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
            start = max(0, at - 20)
            yield f"line {i + 1}", _short(old[start : at + 40]), _short(new[start : at + 40]), False


# the whole -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--old", default="13d6498", help="commit of the old code")
    parser.add_argument("--keep", type=Path, help="a new directory for everything, to look at afterwards")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        side(json.loads(chosen.side))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = chosen.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        old = subprocess.run(["git", "-C", str(ROOT), "archive", chosen.old], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(old)) as archive:
            archive.extractall(Path(temporary) / "tree", filter="data")
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
    runs = [
        part
        for name in RECIPES
        for part in (
            job(f"{name}-killed", f"recover {name}.yaml", KILLED_AT),
            job(f"{name}-resumed", f"recover --resume runs/{name}"),
        )
    ]
    both(sides, runs)
    give(sides, "runs", "given/runs")
    for one in sides:
        leave_out_changed_keys(one.directory / "runs")
    both(sides, [job(f"{i + 1:02d}-{words.split()[0]}", words) for i, words in enumerate(AFTERWARDS)])
    for one in sides:
        stop_the_clock(one.directory / "after")
    count, differences = compare_trees(sides[0].directory, sides[1].directory)
    show(differences)
    unexplained = [d for d in differences if d.reason() is None]
    minutes = (time.monotonic() - began) / 60
    print(f"{count} files of {commit} and of the code here, {minutes:.1f} min: ", end="")
    print(f"{len(unexplained)} differences unexplained, {len(differences) - len(unexplained)} explained")
    return int(bool(unexplained))


def give(sides: tuple[Side, Side], made: str, given: str) -> None:
    """Hand what OLD made to both sides."""
    for one in sides:
        stop_the_clock(one.directory / made)
    for one in sides:
        shutil.copytree(sides[0].directory / made, one.directory / given)


def show(differences: list[Difference]) -> None:
    """The table: file, key, before, after, reason."""
    rows = [("file", "key", "before", "after", "reason")]
    rows += [(d.file, d.key, d.before, d.after, d.reason() or "NONE") for d in differences]
    if len(rows) == 1:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
