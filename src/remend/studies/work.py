"""Do a study's jobs one after the other in this process, or several at once in processes of their own.

A job that fails leaves its message beside its log, and the others go on. This module is also the program of such a
process: python -m remend.studies.work JOB.json FAILED.txt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from remend.console import console
from remend.errors import RemendError
from remend.files.atomic import JsonRow, write_json, write_text
from remend.files.reading import read_object
from remend.plugins import asked_for, import_installed, import_modules
from remend.studies.cell import grade_reference, run_cell
from remend.studies.made import make_student
from remend.training.stopping import Stopped, ending_on_signals

JOBS: dict[str, Callable[..., None]] = {"degrade": make_student, "grade": grade_reference, "cell": run_cell}

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""

LAST_LINES = 3
"""Of a log, in the message of a process that ended without one."""


@dataclass(frozen=True)
class Job:
    """A function of JOBS with plain arguments. Its log and message go to logs/ under its name."""

    name: str
    do: str
    arguments: JsonRow


def paths_of(out: Path, name: str) -> tuple[Path, Path, Path]:
    """A job's arguments, log and message of failure."""
    stem = name.replace("/", ".")
    folder = out / "logs"
    return folder / f"{stem}.job.json", folder / f"{stem}.log", folder / f"{stem}.failed.txt"


def failure_of(out: Path, name: str) -> str | None:
    """Why a job failed when it was last tried, or None."""
    path = paths_of(out, name)[2]
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _explained(error: Exception) -> str:
    """A failure in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, RemendError) else f"{type(error).__name__}: {said}"


def run_jobs(out: Path, jobs: Sequence[Job], *, processes: int, shared: bool) -> Iterator[tuple[Job, str | None]]:
    """Each job as it ends, with the message of its failure or None.

    Args:
        out: of the study.
        jobs: in the order in which they are begun.
        processes: how many at once.
        shared: do all in this process, one after the other.
    """
    if shared:
        for job in jobs:
            yield job, _noted(out, job, _here(job))
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ThreadPoolExecutor(processes) as pool:
        at_work: set[subprocess.Popen[bytes]] = set()
        waiting = {pool.submit(_apart, out, job, threads, at_work): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], _noted(out, waiting[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in list(at_work):
                worker.terminate()  # a training saves first
            raise


def _here(job: Job) -> str | None:
    try:
        JOBS[job.do](**job.arguments)
    except Exception as error:  # whatever one cell does wrong must not stop the others
        return _explained(error)
    return None


def _apart(out: Path, job: Job, threads: int, at_work: set[subprocess.Popen[bytes]]) -> str | None:
    given, log, failed = paths_of(out, job.name)
    failed.unlink(missing_ok=True)
    write_json(given, {"do": job.do, "arguments": dict(job.arguments), "imports": asked_for})
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [sys.executable, "-m", "remend.studies.work", str(given), str(failed)]
    with log.open("w", encoding="utf-8") as stream:
        # a session of its own: what Ctrl-C in a terminal reaches is the study, which ends its workers
        worker = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        at_work.add(worker)
        try:
            code = worker.wait()
        finally:
            at_work.discard(worker)
    if code == 0:
        return None
    if failed.is_file():
        return failed.read_text(encoding="utf-8").strip()
    last = " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:])
    killed = f"was ended by signal {-code} (9 is often a lack of memory)" if code < 0 else f"ended with code {code}"
    return f"its process {killed}; its log, {log}, ends: {last}"


def _noted(out: Path, job: Job, message: str | None) -> str | None:
    failed = paths_of(out, job.name)[2]
    if message is None:
        failed.unlink(missing_ok=True)
    else:
        write_text(failed, message + "\n")
        console.print(f"failed: {job.name}: {message}", soft_wrap=True)
    return message


def _end_with_the_study() -> None:
    """Let the kernel end this process when the study's dies, however it dies. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(words: Sequence[str]) -> int:
    """Do the job in a file; its failure goes into another."""
    _end_with_the_study()
    given, failed = map(Path, words)
    job = read_object(given)
    try:
        import_installed()
        import_modules(job.get("imports", []))
        with ending_on_signals():
            JOBS[job["do"]](**job["arguments"])
    except Stopped as stopped:
        return stopped.code
    except Exception as error:
        write_text(failed, _explained(error) + "\n")
        if not isinstance(error, RemendError):
            raise
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
