"""One cell: an ordinary recovery in its own directory, graded, with what it cost.

inputs/cell.json   what settles the cell (settings, hashes of models and data);  inputs/labels/  where it is SFT
grades/TASK.json   what remend eval gave
cell.json          written last: figures, cost, and the course of KL over tokens and seconds
Everything else is as `remend recover` writes it.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from remend.console import warn
from remend.data.answers import ending
from remend.data.examples import demonstration_of, load_examples
from remend.errors import InputError
from remend.evaluation.job import evaluate
from remend.files.atomic import JsonObject, JsonRow, put_aside, visible, write_json
from remend.files.reading import read_object, understood
from remend.files.run_directory import INPUTS, MANIFEST, METRICS, SUMMARY, RunDirectory, manifest_of, summary_of
from remend.files.settings import Settings, build, merged
from remend.models.find import find_model
from remend.models.load import load_tokenizer
from remend.recovery.job import recover
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import resolve, rows_of
from remend.studies.labels import LabelSettings, write_labels
from remend.training.teachers.cache import RECORD as LABELS_RECORD

OUTCOME = "cell.json"
GRADES = "grades"
CHECKPOINTS = 3
"""In a cell, so that an interrupted one goes on. Cells of a study that runs in one process start again instead."""


def inputs_file(place: Path) -> Path:
    """Where a cell keeps what settles it."""
    return place / INPUTS / OUTCOME


def state_of(place: Path, inputs: JsonRow) -> str:
    """How far a cell is.

    done; graded otherwise: trained as wanted, and its model can be graded anew; ungraded: trained as wanted, but graded
    on other rows or tasks and the model is not kept, so that it stays as it is; started; stale, of other inputs; new.
    """
    if not inputs_file(place).is_file():
        return "stale" if _holds_anything(place) else "new"
    with understood(inputs_file(place), f"move {place} away to have the cell made anew"):
        before = read_object(inputs_file(place))
        if _as_today(before.get("training")) != _as_today(inputs["training"]):
            return "stale"
        if not (place / OUTCOME).is_file():
            return "started"
        if not ungraded(place, inputs):
            return "done"
    return "graded otherwise" if (place / "model").is_dir() else "ungraded"


def _holds_anything(place: Path) -> bool:
    """Whether more lies there than what a process leaves that was killed before it wrote what settles the cell."""
    if not place.is_dir() or place.is_symlink():
        return place.exists()
    inputs = place / INPUTS
    return any(path != inputs or not inputs.is_dir() or visible(inputs) for path in visible(place))


def _as_today(training: JsonRow | None) -> JsonRow | None:
    """What settles a training, its recipe as this version writes it: keys that are newer have their defaults."""
    if training is None:
        return None
    try:
        recipe = build(RecoverConfig, {**training["recipe"], "out": "-"}, "recipe")
    except InputError:  # of a version that knew other keys
        return training
    return {**training, "recipe": recipe.model_dump(mode="json")}


def ungraded(place: Path, inputs: JsonRow) -> list[str]:
    """The wanted tasks that a finished cell was not graded on, or on other rows or with other options."""
    before = read_object(inputs_file(place)).get("grading", {})
    return [name for name, wanted in inputs["grading"].items() if before.get(name) != wanted]


def grades_file(folder: Path, task: str) -> Path:
    """Where a task's grades are in a cell's grades/."""
    return folder / (re.sub(r"[^\w.+-]", "-", task) + ".json")


class Grading(Settings):
    """A task that a model is graded on."""

    task: str = Field(description="a task's name, or lm-eval:NAME")
    data: str | None = Field(description="the rows, None where the task brings its own")
    options: JsonObject = Field(description="further settings of remend eval")


def grade(model: str, folder: Path, grading: Grading) -> None:
    """Grade a model on one task, anew; `folder` gets TASK.json. Raises RemendError as evaluate does."""
    target = grades_file(folder, grading.task)
    target.unlink(missing_ok=True)
    evaluate(model, [grading.task], str(target), data=grading.data, **grading.options)


def grade_reference(model: str, folder: str, grading: list[JsonObject], inputs: JsonRow) -> None:
    """Grade a healthy model anew; `inputs` are kept beside the grades. Raises RemendError as evaluate does."""
    place = Path(folder)
    record = place / "graded.json"
    record.unlink(missing_ok=True)
    for entry in grading:
        grade(model, place, Grading(**entry))
    write_json(record, dict(inputs))


class CellSettings(Settings):
    """A cell to be run to its end, from where it is."""

    place: str = Field(description="the cell's directory; one of other inputs is moved aside")
    recipe: JsonObject = Field(
        description="of the recovery, but for steps, out and the labels' teacher, which are worked out here"
    )
    tokens: int = Field(description="to plan the steps for; 0 trains nothing")
    measurements: int = Field(description="of KL and CKA on the way")
    checkpoints: bool = Field(description="whether an interrupted training shall be able to go on")
    labels: LabelSettings | None = Field(description="where the method is supervised")
    idle: str | None = Field(
        description="directory of the group's untrained cell, whose answers tell how long completions are"
    )
    task_rows: str | None = Field(description="rows of the task, whose demonstrations tell the same of it")
    grading: list[Grading] = Field(description="what the recovered model is graded on")
    inputs: JsonObject = Field(description="what settles the cell")
    keep_model: bool = Field(description="keep the recovered weights once they are graded")


def run_cell(**settings: Any) -> None:
    """Run a cell to its end, from where it is.

    Args:
        **settings: fields of CellSettings.

    Raises RemendError as recover and evaluate do.
    """
    cell = CellSettings(**settings)
    path, began = Path(cell.place), time.monotonic()
    state = state_of(path, cell.inputs)
    if state == "stale":
        warn(f"{path} was made of other inputs and is moved to {put_aside(path)}; remove that when you need it no more")
    (path / OUTCOME).unlink(missing_ok=True)
    write_json(inputs_file(path), cell.inputs)
    if not (path / SUMMARY).is_file():
        _train(path, cell)
    trained = time.monotonic() - began
    for grading in cell.grading:
        grade(str(path / "model"), path / GRADES, grading)
    outcome = _outcome(path)
    outcome["seconds"] = {"recovery": round(trained, 1), "grading": round(time.monotonic() - began - trained, 1)}
    write_json(path / OUTCOME, outcome)  # before anything is removed that it was made of
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    if not cell.keep_model:
        shutil.rmtree(path / "model", ignore_errors=True)


def _train(path: Path, cell: CellSettings) -> None:
    """Start the recovery, or go on with it."""
    if (path / MANIFEST).is_file():
        said: JsonObject = (
            {"trust_remote_code": True} if cell.recipe.get("trust_remote_code") else {}
        )  # the study asked for it
        recover(resume=path, **said)
        return
    given: JsonObject = {"out": str(path), "select": "last", "keep_checkpoints": 1}
    config = build(RecoverConfig, merged(cell.recipe, given), str(path))
    mean = {}
    if cell.labels is not None:
        place = path / INPUTS / "labels"
        record = read_object(place / LABELS_RECORD) if place.is_dir() else write_labels(place, config, cell.labels)
        taught = {"teacher": str(place), "policy": "off", "data": None, "eval_data": None}
        config = build(RecoverConfig, merged(config.model_dump(), {"streams": {"recover": taught}}), str(path))
        mean = {"recover": record["mean_tokens"]}
    elif cell.tokens:
        mean = completion_tokens(cell.recipe, Path(cell.idle) if cell.idle else None, cell.task_rows)
    steps = steps_for(config, cell.tokens, mean)
    every = max(1, steps // cell.measurements)
    planned = {"steps": steps, "eval_every": every if steps else 0, "diagnose_every": every if steps else 0}
    planned["save_every"] = -(-steps // CHECKPOINTS) if cell.checkpoints else 0
    recover(**merged(config.model_dump(), planned))


def steps_for(config: RecoverConfig, tokens: int, mean: Mapping[str, float]) -> int:
    """Optimizer steps that train on about so many tokens, given each stream's mean completion."""
    if not tokens:
        return 0
    rows = rows_of(resolve(config), config.prompts_a_step)
    return max(1, round(tokens / sum(count * mean.get(name, longest(config)) for name, count in rows.items())))


def longest(config: RecoverConfig) -> float:
    """Tokens of a completion that meets the limit, averaged over the run where that grows."""
    length = config.max_new_tokens
    return float(length) if isinstance(length, int) else sum(length) / 2


def completion_tokens(recipe: JsonRow, idle: Path | None, task_rows: str | None) -> dict[str, float]:
    """Mean tokens of a completion by stream.

    General prompts: the mean of the reference's own answers and the degraded student's, between which a student moves
    as it recovers. The task: its demonstrations, up to the length limit.
    """
    mean: dict[str, float] = {}
    if idle is not None:
        ours = [row["tokens"] for row in read_object(idle / "baseline.json")["on_policy"]]
        theirs = [len(row["completion"]) for row in RunDirectory(idle).rows("reference.jsonl")]
        mean["recover"] = (sum(ours) / len(ours) + sum(theirs) / len(theirs)) / 2
    if task_rows is not None:
        trusted = bool(recipe.get("trust_remote_code"))
        tokenizer = load_tokenizer(find_model(recipe["student"], trust_remote_code=trusted))
        limit = longest(build(RecoverConfig, merged(recipe, {"out": "-"}), "recipe"))
        close = len(ending(tokenizer, [end for end in (tokenizer.eos_token_id,) if end is not None]))
        texts = [demonstration_of(e.row, f'row "{e.id}"') for e in load_examples(task_rows)]
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + close for text in texts]
        mean["task"] = sum(min(limit, length) for length in lengths) / len(lengths)
    return mean


def _outcome(path: Path) -> JsonObject:
    """What the run's files say."""
    summary, manifest = summary_of(path), manifest_of(path)
    repair = (summary["repair"] or {}).get("seconds", 0.0)
    answers = RunDirectory(path).setup_seconds("pool")
    labels = path / INPUTS / "labels" / LABELS_RECORD
    if labels.is_file():
        answers += read_object(labels)["seconds"]
    cost = {"repair": repair, "answers": round(answers, 1), "steps": summary["training_seconds"]}
    return {
        "kl": {"degraded": summary["degraded"]["kl"], "recovered": summary["recovered"]["kl"]},
        "agreement": {when: summary[when]["top1_agreement"] for when in ("degraded", "recovered")},
        "gap_closed": (summary["gap_closed"] or {}).get("kl"),
        "gap_closed_95": summary["gap_closed_kl_95"],
        "steps": summary["steps"],
        "tokens_trained": summary["tokens_trained"],
        "training_seconds": round(sum(cost.values()), 1),
        "training_seconds_of": cost,
        "peak_rss_mib": summary["peak_rss_mib"],
        "constraint": summary["constraint"],
        "learning_rate": summary["learning_rate"],
        "curve": _curve(path, summary, repair, answers),
        "hardware": manifest["hardware"],
        "dtype": manifest["dtype"],
        "versions": manifest["versions"],
        "git_commit": manifest["git_commit"],
        "warnings": summary["warnings"],
        "notes": summary["notes"],
    }


def _curve(path: Path, summary: JsonRow, repair: float, answers: float) -> list[JsonObject]:
    """Held-out KL over trained tokens and over seconds, repair and the reference's answers included."""
    files = RunDirectory(path)
    tokens, seconds = 0, repair + answers
    points = [{"step": 0, "tokens": 0, "seconds": 0.0, "kl": summary["degraded"]["kl"]}]
    if summary["repair"] and summary["repair"].get("kept", True):
        points.append({"step": 0, "tokens": 0, "seconds": repair, "kl": summary["repair"]["kl"]})
    points.append({**points[-1], "seconds": seconds})  # until the reference has answered, nothing moves
    spent = files.step_seconds()
    for row in files.rows(METRICS):
        if "loss" in row:
            tokens, seconds = tokens + row["tokens"], seconds + spent.get(row["step"], 0.0)
        elif "eval/kl" in row and row["step"] < summary["steps"]:
            points.append({"step": row["step"], "tokens": tokens, "seconds": round(seconds, 2), "kl": row["eval/kl"]})
    if summary["steps"]:
        end = {"step": summary["steps"], "tokens": tokens, "seconds": round(seconds, 2)}
        points.append({**end, "kl": summary["recovered"]["kl"]})
    return points
