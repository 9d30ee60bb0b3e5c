"""Where the campaign works: tiny inputs, commands in forks of this process, and what an undisturbed command leaves.

Everything that a command writes lies under `disk/`, at the same path each time, so that what was disturbed is compared
with what was not, byte for byte. The clock stands still in a command, as in benchmarks/golden.py: times are no result.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from golden import compare_files
from helpers import strangers
from helpers.golden import write_inputs

LIMIT = 240.0
"""Seconds after which a command counts as one that never ends."""
SHARED: dict[str, Any] = {
    "teacher": "reference",
    "data": "prompts.jsonl",
    "steps": 6,
    "batch_size": 4,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "max_new_tokens": 6,
    "held_out": 4,
    "save_every": 2,
    "keep_checkpoints": 2,
    "eval_every": 3,
    "repair": False,
    "repair_samples": 8,
    "updates_per_rollout": 1,
    "device": "cpu",
    "dtype": "float32",
    "out": "disk/out",
}
STREAMS: dict[str, Any] = {
    "past": {"teacher": "reference", "data": "prompts.jsonl", "held_out": 4},
    "task": {
        "teacher": "ema",
        "data": "rows.jsonl",
        "demonstrations": True,
        "policy": 0.5,
        "weight": 0.5,
        "held_out": 4,
    },
}
RECIPES: dict[str, dict[str, Any]] = {
    "grid": {"student": "given/int3"},
    "repair": {"student": "given/int3", "repair": True, "bootstrap": "repair"},
    "streams": {"student": "given/forgot", "streams": STREAMS, "ema": {"rate": 0.5, "every": 2}},
    "cache": {"student": "given/int3", "streams": {"stored": {"teacher": "given/cache", "policy": "off", "beta": 0.5}}},
    "lora": {"student": "given/forgot", "lora": {"rank": 4}, "learning_rate": 1e-2, "diagnose_every": 3},
    "bootstrap": {"student": "given/int3", "bootstrap": "on", "bootstrap_steps": 2},
    "best": {"student": "given/int3", "select": "best", "eval_every": 2, "diagnose_every": 2},
}
"""The seven ways of a recovery."""

STUDY: dict[str, Any] = {
    "model": "reference",
    "degradations": {"int3": {"kind": "quantize", "format": "int3-g32"}},
    "methods": {"none": "none", "sdft": "on-policy"},
    "tasks": {
        "science": {"train": "letters-train.jsonl", "held_out": "letters.jsonl", "options": {"max_new_tokens": 4}}
    },
    "data": {"train": "rows.jsonl", "rows": 6},
    "seeds": [0],
    "budget": {"tokens": 60},
    "measurements": 1,
    "recipe": {"batch_size": 4, "max_new_tokens": 4, "device": "cpu", "dtype": "float32"},
    "one_process": True,
}
MADE = {
    "given/int3": "degrade quantize reference --format int3-g32 --no-probe",
    "given/forgot": "degrade finetune reference --data rows.jsonl --steps 4 --learning-rate 3e-3",
    "given/cache": "cache-teacher reference --data prompts.jsonl --k 8 --max-new-tokens 6 --held-out 4",
    "given/int4": "degrade quantize reference --format gguf:q4_0 --no-probe",
    "given/gguf": "export given/int4 --format gguf:q4_0",
    "given/letters.json": "eval reference --task science --data letters.jsonl --how choices",
    "given/letters-int3.json": "eval given/int3 --task science --data letters.jsonl --how choices",
}
"""What the campaign's commands read, and the command that makes it; in order."""


@dataclass(frozen=True)
class Case:
    """A command that the campaign disturbs.

    command: its words, run in the place; it writes into disk/ alone.
    resumes: whether `recover --resume disk/out` continues it once it has begun.
    gives: what must lie on the disk before it begins: names of cases whose result is copied there.
    """

    name: str
    command: str
    resumes: bool = False
    gives: str = ""


_RECOVER = [Case(f"recover {name}", f"recover {name}.yaml", resumes=True) for name in RECIPES]
_DATA = "--data prompts.jsonl"
CASES = {
    case.name: case
    for case in (
        *_RECOVER,
        Case(
            "degrade quantize", f"degrade quantize reference --format int4-g32-sym --method gptq {_DATA} --out disk/out"
        ),
        Case("degrade prune", f"degrade prune reference --method wanda --sparsity 2:4 {_DATA} --out disk/out"),
        Case("degrade depth", f"degrade depth reference --layers 1 {_DATA} --out disk/out"),
        Case("degrade width", f"degrade width reference --ffn 0.25 {_DATA} --out disk/out"),
        Case(
            "degrade finetune",
            "degrade finetune reference --data rows.jsonl --steps 6 --learning-rate 1e-3 --out disk/out",
        ),
        Case("export dense", "export given/int3 --format dense --out disk/out"),
        Case("export gguf", "export given/int4 --format gguf:q4_0 --out disk/out"),
        Case("cache-teacher", f"cache-teacher reference {_DATA} --k 8 --max-new-tokens 6 --out disk/out"),
        Case(
            "diagnose",
            f"diagnose --reference reference --student given/int3 {_DATA} --rows 12 --cache disk/cache --out disk/out",
        ),
        Case("eval", "eval given/int3 --task science --data letters.jsonl --max-new-tokens 4 --out disk/out.json"),
        Case("study", "study study.yaml --out disk/out"),
        Case("prompts", "prompts reference --n 8 --max-new-tokens 24 --out disk/out.jsonl"),
        Case("tasks write", "tasks write tooluse-short --n 20 --out disk/out.jsonl"),
        Case("compare", "compare given/letters.json given/letters-int3.json --out disk/out.md"),
        Case("correlate", "correlate disk/out --permutations 200 --out disk/correlation", gives="recover lora"),
        Case("report", "report disk/out", gives="recover best"),
        Case("track", "track disk/out", gives="recover lora"),
    )
}


class Place:
    """A directory with inputs, what was made of them, and `disk/`."""

    def __init__(self, root: Path) -> None:
        self.home, self.disk, self.whole = root / "place", root / "place" / "disk", root / "whole"
        self.log = root / "log.txt"
        self._numbers: dict[str, tuple[int, float]] = {}
        self._imports = 0.0

    def prepare(self) -> None:
        """Write the inputs, and make what the commands read."""
        self.whole.mkdir(parents=True)
        self.disk.mkdir(parents=True)
        (self.home / "given").mkdir()
        write_inputs(self.home, width=32, layers=2, steps=100)
        for name, settings in RECIPES.items():
            values = {**SHARED, **settings}
            if "streams" in settings:
                values = {key: value for key, value in values.items() if key not in ("data", "held_out", "teacher")}
            (self.home / f"{name}.yaml").write_text(json.dumps(values, indent=1), encoding="utf-8")
        (self.home / "study.yaml").write_text(json.dumps(STUDY, indent=1), encoding="utf-8")
        for target, words in MADE.items():
            self.must(f"{words} --out {target}")

    def must(self, words: str) -> None:
        """Run a command that nothing disturbs. Exits where it does not go well: the campaign has no ground then."""
        ended = self.run(words)
        if ended.code:
            sys.exit(f"remend {words} ended with {ended.code}, undisturbed:\n{ended.said[-3000:]}")

    def clear(self, case: Case | None = None) -> None:
        """Empty the disk, and put there what a case needs."""
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if case is not None and case.gives:
            shutil.copytree(self.result(CASES[case.gives]), self.disk, dirs_exist_ok=True)

    def result(self, case: Case) -> Path:
        """What the disk holds after a case that nothing disturbed; made at its first use."""
        kept = self.whole / case.name
        if not kept.is_dir():
            self.clear(case)
            began = time.monotonic()
            ended = self.run(case.command)
            if ended.code:
                sys.exit(f"remend {case.command} ended with {ended.code}, undisturbed:\n{ended.said[-3000:]}")
            self._numbers[case.name] = ended.operations, time.monotonic() - began
            shutil.copytree(self.disk, kept, symlinks=True)
            self.clear()
        return kept

    def size_of(self, case: Case) -> tuple[int, float]:
        """How many file operations a case has, and how many seconds."""
        self.result(case)
        return self._numbers[case.name]

    def again(self, case: Case) -> str:
        """What a user would type after a case was broken off."""
        out = self.disk / "out"
        begun = case.resumes and all((out / name).is_file() for name in ("manifest.json", "recipe.yaml"))
        return "recover --resume disk/out" if begun else case.command

    def start(
        self, words: str, hook: Hook | None = None, log: Path | None = None, *, from_nothing: bool = False
    ) -> Running:
        """A command in a fork of this process; or from nothing, as a user's shell starts it, which takes its time."""
        log = log or self.log
        log.write_text("", encoding="utf-8")
        counted = log.with_suffix(".count")
        counted.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # this process's own would raise here
                self._settle(log)
                if from_nothing:
                    os.execv(sys.executable, [sys.executable, "-m", "remend", *words.split()])
                self._command(words.split(), hook or Hook(), counted)
            finally:
                os._exit(70)  # a fault of the campaign's own
        return Running(pid, log, counted)

    def importing(self) -> float:
        """How many seconds a process from nothing takes before it does anything; measured at the first use."""
        if not self._imports:
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", "import torch, transformers, peft"], check=True, capture_output=True)
            self._imports = time.monotonic() - began
        return self._imports

    def run(self, words: str, hook: Hook | None = None) -> Ended:
        """The same, and wait for its end."""
        return self.start(words, hook).wait()

    def _settle(self, log: Path) -> None:
        """In a fork: a group of its own, its words into the log, its paths from here."""
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(self.home)

    def _command(self, words: Sequence[str], hook: Hook, counted: Path) -> None:
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        still()
        code = 1
        watch = Watch(str(self.disk), hook)
        watch.begin()
        try:
            code = command_line(words)
        finally:
            counted.write_text(str(watch.count), encoding="utf-8")
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def differs(self, case: Case, without: str = "") -> str:
        """How the disk differs from an undisturbed result, in words; empty where it does not.

        without: a regular expression of files and keys that may differ.
        """
        return differences(self.result(case), self.disk, without)


def command_line(words: Sequence[str]) -> int:
    """One call of the command line in this process: its exit code. 70 is what an escaped error gives."""
    from remend.exporting import check

    check.ask_stranger, check.DTYPES = strangers.ask, ("auto",)
    sys.argv = ["remend", *words]
    try:
        from remend.__main__ import main

        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def still() -> None:
    """Time hardly passes and memory stays the same, so that neither stands in a file or in the hash of one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.getrusage = lambda who: usage
    ticks = itertools.count()
    time.perf_counter = time.monotonic = lambda: next(ticks) * 2.0**-24


# what a command does with files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hook:
    """Do something at the n-th file operation on the disk; 0 is never."""

    at: int = 0
    do: Callable[[Operation], None] | None = None
    begin: Callable[[], None] | None = None
    """Before the command, in its process."""


@dataclass(frozen=True)
class Operation:
    """A file operation that is about to be done: what, and on which path."""

    what: str
    path: str


class Watch:
    """Counts file operations under a directory: opened for writing, flushed, renamed, made, removed."""

    def __init__(self, under: str, hook: Hook) -> None:
        self.under, self.hook, self.count = under, hook, 0

    def begin(self) -> None:
        """In the command's process, which ends with it: an audit hook can't be taken away."""
        import safetensors.torch

        if self.hook.begin:
            self.hook.begin()
        fsync, serialize = os.fsync, safetensors.torch.serialize_file

        def flushed(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.seen("fsync", Path(f"/proc/self/fd/{number}").readlink())
            fsync(descriptor)

        def written(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
            self.seen("tensors", os.fspath(path))
            serialize(tensors, path, *rest, **named)

        os.fsync = flushed
        safetensors.torch.serialize_file = written
        sys.addaudithook(self._heard)

    def _heard(self, event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_APPEND):
                self.seen("append" if details[2] & os.O_APPEND else "open", details[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"):
            self.seen(event, details[0])

    def seen(self, what: str, path: object) -> None:
        """An operation is about to be done."""
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = str(Path.cwd() / os.fsdecode(path))
            if whole.startswith(self.under):
                self.count += 1
                if self.count == self.hook.at and self.hook.do:
                    self.hook.do(Operation(what, whole))


@dataclass(frozen=True)
class Ended:
    """The exit code (negative: the signal), what was printed, and how many file operations there were."""

    code: int
    said: str
    operations: int

    @property
    def clean(self) -> bool:
        """Whether it refused with a message of its own."""
        return self.code == 2 and "error: " in self.said and "Traceback" not in self.said


@dataclass
class Running:
    """A command under way."""

    pid: int
    log: Path
    counted: Path
    code: int | None = field(default=None)

    def alive(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal to it; whether it was alive."""
        if self.alive():
            os.kill(self.pid, number)
            return True
        return False

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end. One that does not end in time is killed, and its code is -9."""
        until = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > until:
                self.kill()
            time.sleep(0.005)
        assert self.code is not None
        count = int(self.counted.read_text(encoding="utf-8") or 0) if self.counted.is_file() else 0
        return Ended(self.code, self.log.read_text(encoding="utf-8", errors="replace"), count)


# two results ---------------------------------------------------------------------------------------------------------

NO_MATTER = re.compile(
    r"\.aside-\d+/(.*/)?\.remend-tmp-|(^|/)(timing\.jsonl|\.remend-lock|report\.(html|md|json)|study\.(html|md)|results\.html|work\.log)$"
)
"""Files that say when and how quickly, or a page of other files."""
TIMES = re.compile(
    r"seconds|minutes|peak_rss|started|"
    r"finished|tokens_at_once|created|^date|\bcommand\b|\bresumed|written_at|per_second|\bpid\b"
)
"""Keys in JSON that say so."""


SIGNS_TIMES = re.compile(r"(^|/)(summary\.json|[^/]*\.answers\.jsonl|records/[^/]*\.json)$")
"""Files whose records sign such keys too."""


def differences(undisturbed: Path, other: Path, without: str = "") -> str:
    """How a file or a directory differs from that of the same command undisturbed; times and pages are left aside."""
    one, two = (_files(place) for place in (undisturbed, other))
    told = [f"{name} is {'missing' if name in one else 'there'}" for name in sorted(one.keys() ^ two.keys())]
    told = [text for text in told if not without or not re.search(without, text)]
    for name in sorted(one.keys() & two.keys()):
        try:
            told += [
                f"{name} {key}: {str(before)[:80]} → {str(after)[:80]}"
                for key, before, after, _ in compare_files(one[name], two[name])
                if not TIMES.search(key)
                and not (key.endswith("sha256") and SIGNS_TIMES.search(name))
                and not (without and re.search(without, f"{name} {key}"))
            ]
        except ValueError as error:
            told.append(f"{name} can't be read: {error}")
    return "; ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")


def _files(place: Path) -> dict[str, Path]:
    """Those that matter, by name."""
    paths = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    names = {path.relative_to(place).as_posix() if path != place else place.name: path for path in paths}
    return {name: path for name, path in names.items() if not NO_MATTER.search(name)}


# what a part of the campaign says ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """What one try came to.

    kinds: how often what was tried, by a name for the table.
    fell: what fell short, a sentence each, or one for several of one sort.
    short: how many fell short, where it is not the number of sentences.
    skipped: why nothing could be tried; empty where something was.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    fell: tuple[str, ...] = ()
    skipped: str = ""
    short: int | None = None


class Part(Protocol):
    """A part of the campaign: one try, which the seed of `random` settles."""

    def __call__(self, place: Place, random: Random) -> Tried: ...
