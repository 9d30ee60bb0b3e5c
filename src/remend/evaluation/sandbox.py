"""Run programs that a model wrote, apart from everything else: bubblewrap (https://github.com/containers/bubblewrap).

Inside there is no network, no home, no file of the user's: the system's programs and Python are there to be read, /tmp
is empty and in memory, and what is written is gone afterwards. Time, memory, processes and sizes of files are limited.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from remend.errors import FileError, shortened
from remend.evaluation.results import pass_at

SECONDS = 3.0
"""A program may take; as in evaluate's code_eval."""

MEMORY, FILE, PROCESSES = 2**31, 2**24, 64
"""Bytes of address space, bytes of a file, and processes of a program."""

INSTALL = "Install it with: apt install bubblewrap (or the like for your system; it is for Linux alone)"

_RUNNER = f"""
import json, os, resource, sys
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE}, {FILE}))
resource.setrlimit(resource.RLIMIT_NPROC, ({PROCESSES}, {PROCESSES}))
said = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
try:
    exec(compile(given["program"], "program", "exec"), {{"__name__": "__main__"}})
    answer = given["token"]
except BaseException as error:
    answer = f"{{type(error).__name__}}: {{error}}"[:300]
os.write(said, answer.encode("utf-8", "replace"))
os._exit(0)
"""
"""What runs inside: the program passes where it comes to its end, for which it must come back to this."""


@dataclass(frozen=True)
class Ran:
    """How a program ended: whether it came to its end without an error, and else what happened."""

    passed: bool
    result: str


@cache
def require_sandbox() -> str:
    """The path of bubblewrap. Raises FileError where it is missing or can't isolate anything here."""
    path = shutil.which("bwrap")
    if path is None:
        raise FileError(
            "code that a model writes runs isolated by bubblewrap (bwrap) only, which is not installed; without it "
            f"such a program could read and send what you can. {INSTALL}"
        )
    ran = subprocess.run([*_isolated(path), "-c", "pass"], capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        raise FileError(
            "code that a model writes runs isolated by bubblewrap (bwrap) only, which can't isolate anything here "
            f"({shortened(ran.stderr)}); allow user namespaces, or evaluate this task on another machine"
        )
    return path


def _isolated(bwrap: str) -> list[str]:
    """The command before Python's own arguments."""
    python = os.path.realpath(sys.executable)
    seen = [Path(sys.base_prefix).resolve(), Path(python).parent]
    own = [str(path) for path in seen if not path.is_relative_to("/usr")]
    places = [part for path in dict.fromkeys(own) for part in ("--ro-bind", path, path)]
    words = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    words += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "OMP_NUM_THREADS", "1"]
    words += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):
        link = Path("/", name)
        words += ["--symlink", str(link.readlink()), str(link)] if link.is_symlink() else []
        words += ["--ro-bind", str(link), str(link)] if link.is_dir() and not link.is_symlink() else []
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", *places]
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp", "--", python, "-I"]
    return words


def run_program(program: str, seconds: float = SECONDS) -> Ran:
    """Run a Python program apart. Raises FileError where there is no sandbox."""
    token = secrets.token_hex(16)
    words = [*_isolated(require_sandbox()), "-c", _RUNNER]
    try:
        ran = subprocess.run(
            words,
            input=json.dumps({"program": program, "token": token}).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(False, "timed out")
    said = ran.stdout.decode("utf-8", "replace")
    return Ran(True, "passed") if said == token else Ran(False, f"failed: {said or f'it ended with {ran.returncode}'}")


class CodeEval:
    """In the place of evaluate's metric code_eval, whose Python comes from the hub and isolates nothing."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], Mapping[int, list[tuple[int, dict[str, object]]]]]:
        """Run each prediction with the tests of its reference: pass@k (arXiv 2107.03374), and what each did.

        Raises FileError where there is no sandbox.
        """
        require_sandbox()
        asked = [
            (task, number, f"{candidate}\n{tests}")
            for task, (candidates, tests) in enumerate(zip(predictions, references, strict=True))
            for number, candidate in enumerate(candidates)
        ]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            done = list(pool.map(lambda one: run_program(one[2]), asked))
        results: dict[int, list[tuple[int, dict[str, object]]]] = {task: [] for task in range(len(references))}
        for (task, number, _), ran in zip(asked, done, strict=True):
            about = {"task_id": task, "passed": ran.passed, "result": ran.result, "completion_id": number}
            results[task].append((number, about))
        counts = [(len(ran), sum(bool(about["passed"]) for _, about in ran)) for ran in results.values()]
        shares = {
            f"pass@{n}": sum(pass_at(total, correct, n) for total, correct in counts) / len(counts)
            for n in k
            if counts and all(total >= n for total, _ in counts)
        }
        return shares, results
