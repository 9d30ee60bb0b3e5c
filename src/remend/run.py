"""The run directory: everything a run writes, each file to a temporary name first and then renamed.

recipe.yaml      the resolved settings
manifest.json    versions, seeds, git commit, hashes of models and data, command line, hardware, warnings
metrics.jsonl    one row a training step (`step`, `loss`, `tokens`, …), evaluation rows between; the same on every rerun
timing.jsonl     seconds of each step, apart from the metrics since they differ on every rerun; at step 0, with `stage`,
                 those of what came before: prompts, repair, gate, pool
baseline.json    the degraded student's measurement;  reference.jsonl the reference's held-out completions
repair.json      KL after one-shot repair, on fitted text too, and whether kept;  held_out_repaired.jsonl by prompt
track.jsonl      with diagnose_every: KL, agreement and each layer's CKA at the start, on the way and at the end
checkpoints/     step-000050/ with masters, optimizer tensors and counters
model/           the recovered model, as measured
samples.jsonl    what reference, degraded and recovered say to the same prompts
summary.json     what was measured;  report.html, report.md, report.json  the same to look at, for a card, as data
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remend.errors import FileError, InputError

INPUTS = "inputs"
"""A run's directory may hold this folder before the run begins: what a flow made for it."""

MANIFEST, RECIPE, METRICS, SUMMARY = "manifest.json", "recipe.yaml", "metrics.jsonl", "summary.json"
REPAIR = "repair.json"
TRACK = "track.jsonl"
TIMING = "timing.jsonl"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's errors while writing `target` into one message. What stood there before is untouched."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileError):
            raise
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error)
        if full:
            free = shutil.disk_usage(_existing(target)).free / 2**20
            raise FileError(
                f"the disk is full: {target} could not be written ({free:.0f} MiB are free). "
                "Nothing that stood there was overwritten. Free some space and run the command again; an interrupted "
                "run continues with remend recover --resume."
            ) from None
        raise FileError(f"{target} can't be written: {getattr(error, 'strerror', None) or error}") from None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: temporary name, flush to disk, rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """One line of a JSON lines file. NaN and infinities are refused."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON. Raises FileError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and vanishes when it does not."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):  # some writers create files that only their owner can read
                if file.is_file():
                    file.chmod(0o644)
            if target.exists():
                old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".old-{target.name}."))
                target.replace(old / "x")
                temporary.replace(target)
                shutil.rmtree(old)
            else:
                temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of training after `step` steps."""

    step: int
    path: Path

    def masters(self) -> dict[str, Tensor]:
        """Masters by parameter name."""
        return _tensors(self.path / "masters.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """'<name>.exp_avg' and '<name>.exp_avg_sq'."""
        return _tensors(self.path / "optimizer.safetensors")

    def follower(self) -> dict[str, Tensor]:
        """What follows the weights: a teacher that is their moving average."""
        return _tensors(self.path / "follower.safetensors")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"checkpoint file {path} can't be read: {error}; remove {path.parent} to go on from the one before"
        ) from None
    return tensors


class RunDirectory:
    """Read and write one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path) -> RunDirectory:
        """A new run. Raises InputError when the directory holds anything already but its inputs."""
        problem = occupied(path, inputs=True)
        if problem:
            raise InputError(problem)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return RunDirectory(path)

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """An existing run. Raises InputError when it is none."""
        if not (path / MANIFEST).is_file() or not (path / RECIPE).is_file():
            raise InputError(
                f"{path} is no remend run: it has no {MANIFEST} with {RECIPE}; give the directory that --out named"
            )
        return RunDirectory(path)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one JSON line."""
        with writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json_line(row))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All complete JSON lines of a file; a last line cut short by a killed process is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def note_seconds(self, stage: str, seconds: float, stream: str | None = None) -> None:
        """Into timing.jsonl, at step 0: what something before the first step took. Done again, it replaces its row."""
        row = {"step": 0, "stage": stage, **({"stream": stream} if stream else {}), "seconds": round(seconds, 4)}
        same = [r for r in self.rows(TIMING) if (r.get("stage"), r.get("stream")) != (stage, stream)]
        write_text(self.path / TIMING, "".join(map(json_line, [*same, row])))

    def step_seconds(self) -> dict[int, float]:
        """Seconds of each training step, from timing.jsonl."""
        return {row["step"]: row["seconds"] for row in self.rows(TIMING) if "stage" not in row}

    def setup_seconds(self, stage: str) -> float:
        """Seconds of a stage before the first step, 0 where there was none."""
        return float(sum(row["seconds"] for row in self.rows(TIMING) if row.get("stage") == stage))

    def rewind(self, name: str, step: int) -> None:
        """Drop rows after `step`: they will be made again."""
        if (self.path / name).is_file():
            write_text(self.path / name, "".join(json_line(r) for r in self.rows(name) if r["step"] <= step))

    def save_checkpoint(
        self,
        step: int,
        masters: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        keep: int,
        follower: Mapping[str, Tensor] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint, then remove the oldest beyond `keep`."""
        target = self.path / "checkpoints" / f"step-{step:06d}"
        with new_directory(target) as directory:
            for name, tensors in (("masters", masters), ("optimizer", optimizer), ("follower", follower or {})):
                save_file({k: t.detach().contiguous() for k, t in tensors.items()}, directory / f"{name}.safetensors")
            (directory / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old.path)
        return Checkpoint(step, target)

    def remove_leftovers(self) -> None:
        """Remove temporary files and directories that a killed process left behind."""
        for folder, names in ((self.path, ".*"), (self.path / "checkpoints", ".step-*")):
            for path in folder.glob(names):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        found = sorted((self.path / "checkpoints").glob("step-*"))
        return [Checkpoint(int(p.name.removeprefix("step-")), p) for p in found if (p / "state.json").is_file()]


def occupied(path: Path, *, inputs: bool = False) -> str | None:
    """Why something new can't be written to `path`, or None.

    `inputs`: the folder of what was made for a run may stand there already. Only what is written into the directory
    may allow that; `new_directory` replaces it whole.
    """
    if path.is_file():
        return f"out {path} is a file; name a new directory"
    if (path / MANIFEST).exists():
        return f"out {path} holds another run; name a new directory, or continue that run with --resume {path}"
    if path.is_dir() and any(not (inputs and p.name == INPUTS) for p in path.iterdir()):
        return f"out {path} is not empty; name a new directory"
    return None


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def environment() -> dict[str, Any]:
    """Versions and hardware, for the manifest."""
    import importlib.metadata
    import platform
    import sys

    import psutil

    names = ("remend", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "datasets", "gguf")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "hardware": hardware,
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _processor() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git_commit() -> str | None:
    """Commit of the source tree that runs, with '-dirty' where it differs; None for an installed package."""
    import subprocess

    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
