"""A run that goes on for more steps than its recipe says: `remend recover --resume RUN steps=80`.

The first segment is the recipe's, with its schedule. Each further one goes on at the rate where that ends, so that no
step of those before would have been another. The manifest lists them; recipe.yaml stays what the run began with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow, flush, json_line, write_json, write_text
from remend.files.reading import read_object, understood
from remend.files.run_directory import (
    DAMAGED,
    MANIFEST,
    NEXT,
    SUMMARY,
    TRACK,
    RunDirectory,
    manifest_of,
    planned_steps,
    recipe_steps,
)
from remend.files.signed import signed


@dataclass(frozen=True)
class Segment:
    """Steps that were added to a run.

    after: the steps that were planned before.
    steps: of the whole run with these.
    learning_rate: of all steps of the segment.
    date: when they were asked for.
    """

    after: int
    steps: int
    learning_rate: float
    date: str

    @staticmethod
    def now(after: int, steps: int, learning_rate: float) -> Segment:
        """One that is asked for now."""
        return Segment(after, steps, learning_rate, datetime.now(UTC).isoformat(timespec="seconds"))

    def record(self) -> JsonObject:
        """As the manifest and the summary have it."""
        return {"from": self.after, "steps": self.steps, "learning_rate": self.learning_rate, "date": self.date}

    def line(self) -> str:
        """What is printed of it."""
        more = self.steps - self.after
        return f"{more} more steps, to {self.steps}, at learning rate {self.learning_rate:.3g}, where the schedule ends"


def segments_of(directory: RunDirectory) -> tuple[Segment, ...]:
    """The segments that were added to a run."""
    rows: Sequence[JsonRow] = manifest_of(directory.path).get("segments", [])
    with understood(directory.path / MANIFEST, DAMAGED):
        return tuple(Segment(row["from"], row["steps"], row["learning_rate"], row["date"]) for row in rows)


def check_longer(directory: RunDirectory, steps: int) -> None:
    """Raise InputError where a run can't go on to so many steps, which are more than it plans, or can't be fewer."""
    path, manifest = directory.path, manifest_of(directory.path)
    planned, first = planned_steps(manifest), recipe_steps(manifest["recipe"])
    if steps < planned:
        raise InputError(
            f"{path} has {planned} steps, and steps={steps} would be fewer; steps can be raised on a resumed run, not "
            "lowered. Leave steps out to go on as planned, or start a new run with another out"
        )
    if not first:
        raise InputError(
            f"{path} was begun with steps: 0, so it has no schedule to go on from; start a new run with steps: {steps} "
            "and another out"
        )
    if not manifest["recipe"]["final_learning_rate"]:
        raise InputError(
            f"the schedule of {path} ends at learning rate 0 (final_learning_rate), at which more steps would change "
            f"nothing. Start a new run from its model: --student {path / 'model'}"
        )
    if not directory.complete:
        return
    summary, saved = read_object(path / SUMMARY), directory.checkpoints()
    done = summary["steps"]
    if done < planned:
        patience = manifest["recipe"]["patience"]
        why = "steps: auto saw nothing to win" if summary.get("ended") else f"patience ({patience}) saw nothing better"
        raise InputError(
            f"{path} stopped at step {done} of {planned}, since {why}; it would stop there again. Start a new run from "
            f"its model: --student {path / 'model'}"
        )
    if not saved or saved[-1].step < done:
        why = "save_every: 0 wrote none" if manifest["recipe"].get("save_every") == 0 else "it was removed"
        raise InputError(
            f"{path} can't go on from its step {done}: the checkpoint {path / 'checkpoints' / f'step-{done:06d}'} is "
            f"not there ({why}). Start a new run from its model: --student {path / 'model'}"
        )


def note_segments(directory: RunDirectory, segments: Sequence[Segment]) -> None:
    """Write a run's segments into its manifest, where one is new; what was measured of its saved model in track.jsonl
    becomes a measurement on the way."""
    path = directory.path / MANIFEST
    manifest, records = read_object(path), [segment.record() for segment in segments]
    if manifest.get("segments", []) == records:
        return
    if directory.complete:
        _reopen_track(directory, manifest)
    write_json(path, {**manifest, "segments": records})


def _reopen_track(directory: RunDirectory, manifest: JsonRow) -> None:
    rows, last = directory.rows(TRACK), planned_steps(manifest)
    kept = [
        signed({**row, "stage": "training"}) if row["stage"] == "recovered" else row
        for row in rows
        if row["stage"] != "recovered" or row["step"] == last
    ]
    if rows:
        write_text(directory.path / TRACK, "".join(map(json_line, kept)))


def take_place(directory: RunDirectory) -> None:
    """Put the results of a longer run, which were measured beside the earlier ones, into their place.

    From here to the new summary the run counts as interrupted, and resuming it makes the results again.
    """
    new, path = directory.path / NEXT, directory.path
    (path / SUMMARY).unlink()
    flush(path)  # a power cut may not leave the old summary beside the new model
    for made in new.iterdir():
        target = path / made.name
        if target.is_symlink():  # what it leads to is the user's
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        made.replace(target)
    new.rmdir()
    flush(path)
