"""The run directory: everything a run writes, each file to a temporary name first and then renamed.

recipe.yaml      the resolved settings
manifest.json    versions, seeds, git commit, hashes of models and data, command line, hardware, warnings
metrics.jsonl    one row a training step (`step`, `loss`, `tokens`, …), evaluation rows between; the same on every rerun
timing.jsonl     seconds and memory of each step, apart from the metrics since they differ on every rerun; at step 0,
                 with `stage`, those of what came before: prompts, repair, gate, pool; with `phase`, those of a whole
                 phase, written at the end of a run that was not interrupted
baseline.json    the degraded student's measurement;  reference.jsonl the reference's held-out completions
repair.json      KL after one-shot repair, on fitted text too, and whether kept;  held_out_repaired.jsonl by prompt
track.jsonl      with diagnose_every: KL, agreement and each layer's CKA at the start, on the way and at the end
checkpoints/     step-000050/ with masters, optimizer tensors and counters
model/           the recovered model, as measured
samples.jsonl    what reference, degraded and recovered say to the same prompts
worst.jsonl      the held-out prompts with the highest KL: each token of the reference's and of the model's own answer
summary.json     what was measured;  report.html, report.md, report.json  the same to look at, as Markdown, as data
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError

from remend.console import warn
from remend.errors import FileError, InputError
from remend.files.atomic import (
    TEMPORARY,
    JsonObject,
    JsonRow,
    flush,
    json_line,
    new_directory,
    put_aside,
    remove_directory,
    remove_temporary,
    visible,
    write_text,
    writing,
)
from remend.files.hashes import damaged, hash_directory
from remend.files.logged import REFERENCE, changed, logged, understandable
from remend.files.own import open_own
from remend.files.reading import object_of, read_object, read_objects
from remend.files.signed import SIGNATURE, as_signed, signed

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
"""A folder of another name beside the checkpoints is the user's own."""

INPUTS = "inputs"
"""A run's directory may hold this folder before the run begins: what a flow made for it."""


AUTO, AUTO_STEPS = "auto", 40
"""A recipe's `steps` that leave it to remend, and how many these are at most."""


MANIFEST, RECIPE, METRICS, SUMMARY = "manifest.json", "recipe.yaml", "metrics.jsonl", "summary.json"


REPAIR = "repair.json"


TRACK = "track.jsonl"


TIMING = "timing.jsonl"


BEGINNING = f"{TEMPORARY}beginning"
"""A file that stands in a run's directory until its manifest is written."""

DATA = "data"
"""In a run: rows that Python gave, as files."""


NEXT = f"{TEMPORARY}next"
"""Where a run that goes on for more steps keeps its new results until they are whole."""


WORST = "worst.jsonl"


STEPPED = (METRICS, TRACK, "gate.jsonl")
"""Files whose rows each tell the step at which they were written."""


STATE = "state.json"
"""In a checkpoint, written last: its step, how many processes shared how many prompts a step, and SHA-256 of its other
files, of what was logged, and of itself."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of training after `step` steps."""

    step: int
    path: Path

    def damage(self) -> str | None:
        """What is wrong with its files, or None. Those of versions without hashes are only known to be there."""
        try:
            state = read_object(self.path / STATE)
        except FileError:
            return f"{STATE} can't be read"
        if state.get("step") != self.step:
            return f"{STATE} is of another step"
        if ("logged" in state and SIGNATURE not in state) or not as_signed(state):
            return f"{STATE} changed since it was written"
        files = state.get("files", {})
        if not isinstance(files, dict):
            return f"{STATE} holds no hashes"
        if not understandable(state.get("logged", {})):
            return f"{STATE} names what no run logs"
        wrong = damaged(self.path, files)
        return f"{' and '.join(wrong)} changed or can't be read since it was written" if wrong else None

    def logged_changed(self, directory: Path) -> Sequence[str]:
        """Names of the run's files whose rows from before this checkpoint are not what they were."""
        return changed(directory, read_object(self.path / STATE).get("logged", {}))

    @property
    def hashed(self) -> bool:
        """Whether damage would be found."""
        return "files" in read_object(self.path / STATE)

    def masters(self) -> dict[str, Tensor]:
        """Masters by parameter name."""
        return _tensors(self.path / "masters.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """'<name>.exp_avg' and '<name>.exp_avg_sq'."""
        return _tensors(self.path / "optimizer.safetensors")

    def follower(self) -> dict[str, Tensor]:
        """What follows the weights: a teacher that is their moving average."""
        return _tensors(self.path / "follower.safetensors")

    def kept(self) -> dict[str, Tensor]:
        """What neither the masters nor the student's files hold; empty where all is trained."""
        path = self.path / "kept.safetensors"
        return _tensors(path) if path.is_file() else {}


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # it brings torch, and settings only need the names of files

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"checkpoint file {path} can't be read: {error}; remove {path.parent} to go on from the one before"
        ) from None
    return tensors


def _drop_torn_line(stream: BinaryIO) -> None:
    """Cut a file that is open for appending where its last whole line ends."""
    size = stream.seek(0, os.SEEK_END)
    if not size:
        return
    stream.seek(size - 1)
    if stream.read(1) != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


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

    @property
    def began_in(self) -> Path | None:
        """The working directory of the command that began the run; None where the manifest has none."""
        place = manifest_of(self.path).get("directory")
        return Path(place) if place else None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: the summary is there, of all segments that the manifest names."""
        summary = self.path / SUMMARY
        if not summary.is_file():
            return False
        segments: object = manifest_of(self.path).get("segments", [])
        return measured(self.path) and bool(read_object(summary).get("segments", []) == segments)

    def append(self, name: str, row: JsonRow) -> None:
        """Add one JSON line; one that was cut short by a killed process is dropped."""
        with writing(self.path / name), os.fdopen(open_own(self.path / name, os.O_APPEND), "ab+") as stream:
            _drop_torn_line(stream)
            stream.write(json_line(row).encode("utf-8"))

    def flush(self) -> None:
        """Have the rows that were added so far written to the disk, before anything says that they are there."""
        for place in (self.path, self.path / NEXT):
            for path in place.glob("*.jsonl"):
                with writing(path):
                    flush(path)
        flush(self.path)

    def rows(self, name: str) -> list[JsonObject]:
        """All complete JSON lines of a file; a last line cut short by a killed process is left out.

        timing.jsonl decides nothing, so a damaged line of it is left out with a warning. Raises FileError, with file
        and line, for one of another file.
        """
        path = self.path / name
        if not path.is_file():
            return []
        if name == TIMING:
            return _timings(path)
        rows = read_objects(path, DAMAGED)
        for number, row in enumerate(rows, start=1):
            if name == TRACK and not as_signed(row):
                raise FileError(
                    f"{path}, row {number}, changed since it was written; remove that line, or put back a copy of the "
                    f"file: remend track {self.path} measures what is lacking of the checkpoints that are kept"
                )
            if name in STEPPED and not isinstance(row.get("step"), int):
                raise FileError(f"{path}, row {number}, has no step; {DAMAGED}")
            if name == METRICS and "loss" in row and not isinstance(row.get("tokens"), int):
                raise FileError(f"{path}, row {number}, has a loss and no tokens; {DAMAGED}")
        return rows

    def note_seconds(self, stage: str, seconds: float, stream: str | None = None) -> None:
        """Into timing.jsonl, at step 0: what something before the first step took. Done again, it replaces its row."""
        row = {"step": 0, "stage": stage, **({"stream": stream} if stream else {}), "seconds": round(seconds, 4)}
        same = [r for r in self.rows(TIMING) if (r.get("stage"), r.get("stream")) != (stage, stream)]
        write_text(self.path / TIMING, "".join(map(json_line, [*same, row])))

    def note_phases(self, seconds: Mapping[str, float]) -> None:
        """Into timing.jsonl, at step 0: what each phase of the run took."""
        for phase, spent in seconds.items():
            self.append(TIMING, {"step": 0, "phase": phase, "seconds": round(spent, 4)})

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase, from timing.jsonl, in order; empty for a run that was interrupted, or is older."""
        return {row["phase"]: row["seconds"] for row in self.rows(TIMING) if "phase" in row}

    def step_seconds(self) -> dict[int, float]:
        """Seconds of each training step, from timing.jsonl."""
        return {row["step"]: row["seconds"] for row in self.rows(TIMING) if row["step"]}

    def setup_seconds(self, stage: str) -> float:
        """Seconds of a stage before the first step, 0 where there was none."""
        return float(sum(row["seconds"] for row in self.rows(TIMING) if row.get("stage") == stage))

    def rewind(self, name: str, step: int) -> None:
        """Drop rows after `step`: they will be made again."""
        if not (self.path / name).is_file():
            return
        if kept := [row for row in self.rows(name) if row["step"] <= step]:
            write_text(self.path / name, "".join(map(json_line, kept)))
        else:
            (self.path / name).unlink()  # as it was at that step

    def save_checkpoint(
        self,
        step: int,
        masters: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        keep: int,
        follower: Mapping[str, Tensor] | None = None,
        about: Mapping[str, int] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint, then remove the oldest beyond `keep`.

        Args:
            step: after which it is written.
            masters, optimizer, follower, kept: see Checkpoint.
            keep: how many stay.
            about: what its state says beside the step.
        """
        from safetensors.torch import save_file

        self.flush()
        target = self.path / "checkpoints" / f"step-{step:06d}"
        with new_directory(target) as directory:
            parts = {"masters": masters, "optimizer": optimizer, "follower": follower or {}}
            for name, tensors in (parts | ({"kept": kept} if kept else {})).items():
                save_file({k: t.detach().contiguous() for k, t in tensors.items()}, directory / f"{name}.safetensors")
            state = {"step": step, **(about or {}), "files": hash_directory(directory), "logged": logged(self.path)}
            (directory / STATE).write_text(json.dumps(signed(state)), encoding="utf-8")
        self.keep_newest(self.checkpoints(), keep)
        return Checkpoint(step, target)

    @staticmethod
    def keep_newest(saved: Sequence[Checkpoint], keep: int) -> None:
        """Remove all but the last ones of these checkpoints."""
        for old in saved[:-keep]:
            remove_directory(old.path)

    def require_logged(self, checkpoint: Checkpoint) -> None:
        """What was logged before a checkpoint must be what it was; the reference's answers are made again otherwise.

        Raises:
            FileError: another file changed; the figures of the earlier steps would be others.
        """
        names = list(checkpoint.logged_changed(self.path))
        if REFERENCE in names:
            names.remove(REFERENCE)
            if (self.path / REFERENCE).exists():
                warn(f"{put_aside(self.path / REFERENCE)} is damaged and left aside; the reference answers again")
        if names:
            paths = " and ".join(str(self.path / name) for name in names)
            raise FileError(
                f"{paths} changed or can't be read since the checkpoint of step {checkpoint.step} was "
                f"written: {DAMAGED}. "
                f'If you changed it yourself and mean it, remove "logged" and "sha256" from {checkpoint.path / STATE}'
            )

    def remove_leftovers(self) -> None:
        """Remove temporary files and directories that a killed process left behind; only what has a name of theirs."""
        for folder in (self.path, self.path / "checkpoints"):
            remove_temporary(folder)

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that were written to their end, oldest first; their content is not looked at."""
        matches = (CHECKPOINT_NAME.fullmatch(path.name) for path in (self.path / "checkpoints").glob("step-*"))
        named = (Checkpoint(int(match[1]), self.path / "checkpoints" / match[0]) for match in matches if match)
        return sorted((c for c in named if (c.path / STATE).is_file()), key=lambda checkpoint: checkpoint.step)

    def whole_checkpoints(self) -> list[Checkpoint]:
        """Those whose files are as they were written, oldest first; a warning names each other one."""
        whole = []
        for checkpoint in self.checkpoints():
            damage = checkpoint.damage()
            if damage is None:
                whole.append(checkpoint)
            else:
                warn(f"the checkpoint {checkpoint.path} is damaged and left aside: {damage}")
        return whole


def measured(directory: Path) -> bool:
    """Whether a run's summary.json can be read, holds a measurement, and says what it said when it was written. If not,
    a warning says that it counts as interrupted."""
    path = directory / SUMMARY
    try:
        summary = summary_of(directory)
    except FileError as error:
        warn(f"{error}; the run counts as interrupted")
        return False
    if not isinstance(summary.get("degraded"), dict) or not isinstance(summary.get("recovered"), dict):
        warn(f"{path} lacks what was measured; the run counts as interrupted")
        return False
    return True


def summary_of(directory: Path) -> JsonObject:
    """What a run measured. Raises FileError where it can't be read, or changed since it was written."""
    path = directory / SUMMARY
    summary = read_object(path, DAMAGED_SUMMARY.format(directory))
    if not as_signed(summary):
        raise FileError(
            f"{path} changed since remend wrote it: {DAMAGED_SUMMARY.format(directory)}. If you changed it yourself "
            f'and mean it, remove "{SIGNATURE}" from it'
        )
    return summary


DAMAGED_SUMMARY = "remend recover --resume {} writes it again from the last checkpoint"
"""What to do about a summary; with the run's directory."""


def manifest_of(directory: Path) -> JsonObject:
    """A run's manifest. Raises FileError where it can't be read, or its parts are none that a run writes."""
    path = directory / MANIFEST
    manifest = read_object(path, DAMAGED)
    kinds: dict[str, type] = {"recipe": dict, "models": dict, "segments": list, "imports": list, "directory": str}
    kinds |= {"prompts": dict, "streams": dict, "seeds": dict, "hardware": dict, "versions": dict}
    kinds |= {"warnings": list, "notes": list, "constraint": str, "dtype": str, "reference": str, "rows_at_once": int}
    wrong = [key for key, kind in kinds.items() if key in manifest and not isinstance(manifest[key], kind)]
    if "recipe" not in manifest or wrong:
        raise FileError(f"{path} has no {' or '.join(wrong or ['recipe'])} as a run writes it; {DAMAGED}")
    return manifest


DAMAGED = "put back a copy of it, or start a new run with another out"
"""What to do about a file that a run can't go on without."""


def _timings(path: Path) -> list[JsonObject]:
    """The rows of timing.jsonl that can be read and hold what they should."""
    rows, skipped = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = object_of(line.decode())
            figures = (row["seconds"], row.get("rss_mib", 0), row.get("gpu_mib", 0))
            whole = isinstance(row["step"], int) and all(map(math.isfinite, figures))
        except (ValueError, KeyError, TypeError):
            whole = not line
        if not whole:
            skipped += 1
        elif line:
            rows.append(row)
    if skipped:
        warn(f"{skipped} damaged lines of {path} are left out; nothing but the times that are told depends on them")
    return rows


def recipe_steps(recipe: JsonRow) -> int:
    """How many steps a recipe plans, at most where it leaves that to remend."""
    return AUTO_STEPS if recipe["steps"] == AUTO else int(recipe["steps"])


def planned_steps(manifest: JsonRow) -> int:
    """How many steps a run is to have: the recipe's, or those of the last segment that was added."""
    segments = manifest.get("segments", [])
    return int(segments[-1]["steps"]) if segments else recipe_steps(manifest["recipe"])


def updates_a_round(recipe: JsonRow) -> int:
    """Steps that one round of sampling feeds: `updates_per_rollout`, or without it 2 where no round would be cut.

    Rounds end where bootstrap ends, so an odd number of steps to there means 1.
    """
    odd = (recipe.get("bootstrap_steps") or 0) % 2
    given: int | None = recipe.get("updates_per_rollout")
    return given or (1 if odd or recipe_steps(recipe) < 2 else 2)


def steps_a_checkpoint(recipe: JsonRow) -> int:
    """`save_every`, or without it a quarter of the steps, at most 50, in whole rounds of sampling; 0 for none."""
    given: int | None = recipe.get("save_every")
    if given is not None:
        return given
    updates, quarter = updates_a_round(recipe), recipe_steps(recipe) // 4
    return max(1, min(50, quarter) // updates) * updates


def occupied(path: Path, *, inputs: bool = False) -> str | None:
    """Why something new can't be written to `path`, or None.

    `inputs`: the folder of what was made for a run may stand there already, and what a process left that was killed
    while it began one. Only what is written into the directory may allow that; `new_directory` replaces it whole.
    """
    try:
        path.exists()
    except OSError as error:  # a name that is too long, say
        return f"out {str(path)[:200]} can't be written: {error.strerror}; name another directory"
    if path.is_file():
        return f"out {path} is a file; name a new directory"
    if path.is_symlink() and not path.exists():
        return f"out {path} is a link to nothing; remove it, or name a new directory"
    if (path / MANIFEST).exists():
        return f"out {path} holds another run; name a new directory, or continue that run with --resume {path}"
    own = {INPUTS} if inputs else set()
    own |= {RECIPE, DATA} if inputs and (path / BEGINNING).is_file() else set()
    if path.is_dir() and any(p.name not in own for p in visible(path)):
        return f"out {path} is not empty; name a new directory"
    return None
