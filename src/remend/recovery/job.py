"""Bring a degraded student back with its healthy reference as teacher: the whole job, from recipe to report."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remend.console import console, stage, warn
from remend.data.given import as_files, rows_from_python
from remend.errors import InputError
from remend.files.atomic import put_aside
from remend.files.launch import HOW, processes, rank
from remend.files.reading import read_object
from remend.files.run_directory import (
    MANIFEST,
    METRICS,
    RECIPE,
    SUMMARY,
    RunDirectory,
    manifest_of,
    measured,
    planned_steps,
)
from remend.files.settings import build, merged, require_said, takes
from remend.files.yaml_files import read_yaml
from remend.models.written import MODEL, require_as_written
from remend.plugins import keep_places, not_imported, options_of
from remend.recovery.segments import Segment, check_longer, segments_of
from remend.recovery.settings import SELF, RecoverConfig

if TYPE_CHECKING:
    from remend.recovery.plan import Checked, Plan


@dataclass(frozen=True)
class RecoverResult:
    """What a recovery gave: `summary` as in summary.json, `metrics` the training rows, and where the files are."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    out: Path
    model: Path
    report: Path

    def samples(self) -> list[dict[str, str]]:
        """What reference, degraded and recovered say to the first held-out prompts."""
        return RunDirectory(self.out).rows("samples.jsonl")


def settings(recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RecoverConfig:
    """A RecoverConfig from a YAML recipe and values that override it.

    Raises FileError for an unreadable recipe and InputError for unknown keys or values out of range.
    """
    if recipe is not None:
        _mention_imports(Path(recipe))
    origin = f"recipe {recipe}" if recipe is not None else "settings"
    base = read_yaml(recipe) if recipe is not None else {}
    require_said(base, origin, overrides or {})
    # by one name each, so that what is given over a recipe takes the place of what it has by another name
    given = merged(RecoverConfig.own_names(base, origin), RecoverConfig.own_names(overrides or {}, "settings"))
    values = _chosen(_paths_kept(given))
    folder = Path(str(values.get("out") or ".")) / "data"  # `build` says what is no path
    return build(RecoverConfig, as_files(values, lambda name: folder / f"{name}.jsonl"), origin)


def _paths_kept(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with models that Python gives as a Path named so that they are no hub's id, and no word.

    A text may be either: "base" is the student without its adapter, and Path("base") is the directory.
    """

    def kept(level: Mapping[str, Any]) -> dict[str, Any]:
        models = {key: level[key] for key in ("student", "teacher") if isinstance(level.get(key), os.PathLike)}
        return {**level, **{key: _as_path(os.fspath(value)) for key, value in models.items()}}

    values, streams = kept(values), values.get("streams")
    if isinstance(streams, Mapping):
        values["streams"] = {name: kept(s) if isinstance(s, Mapping) else s for name, s in streams.items()}
    return values


def _as_path(text: str) -> str:
    """A path that nothing takes for anything else: what has no directory in it, or is not there, starts with ./."""
    told = Path(text).is_absolute() or text.startswith(".") or (os.sep in text and Path(text).exists())
    return text if told else f".{os.sep}{text}"


def _chosen(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with what the user left to remend: a directory by date and student, and prompts of the teacher's."""
    student, teacher = values.get("student"), values.get("teacher")
    if values.get("out") is None and student is not None and processes() == 1:
        name = re.sub(r"[^\w.-]+", "-", str(student).rstrip("/").rpartition("/")[2])
        values = {**values, "out": f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-{name}"}
        console.print(f"out: {values['out']}")
    without = values.get("data") is None and not values.get("streams") and teacher is not None
    if without and not _brings_prompts(str(teacher)):
        values = {**values, "data": SELF}
        console.print("data: self (the teacher writes the prompts)")
    return values


def _brings_prompts(teacher: str) -> bool:
    from remend.training.teachers import named  # late, as all that waits for torch: settings are looked at before

    return named(teacher).brings_prompts


def _mention_imports(recipe: Path) -> None:
    """Warn where a recipe is that of a run whose command named modules which are not imported now."""
    manifest = recipe.parent / MANIFEST
    imports = read_object(manifest).get("imports") if manifest.is_file() else None
    missing = not_imported(imports) if isinstance(imports, list) else ""
    if missing:
        warn(f"{recipe} is of a run that was begun with {missing}; what these modules register is not known now")


@takes(RecoverConfig, over_recipe=True)
def check(recipe: str | Path | None = None, *, files: bool = True, **overrides: Any) -> Checked:
    """Check a recovery without training; see `preflight`. Problems are in the result, not raised."""
    with rows_from_python():
        config = settings(recipe, overrides)
        from remend.recovery.preflight import preflight

        return preflight(config, files=files)


@takes(RecoverConfig, over_recipe=True)
def recover(recipe: str | Path | None = None, *, resume: str | Path | None = None, **overrides: Any) -> RecoverResult:
    """Recover a degraded student by on-policy self-distillation (arXiv 2604.15794).

    Args:
        recipe: a YAML file with the keys of RecoverConfig.
        resume: the directory of an interrupted run; goes on exactly where its last checkpoint was. Relative paths of
            its recipe are those of the directory in which it began, whichever the present one is. With more `steps`
            than it has planned, also a finished run goes on, at the learning rate where its schedule ends.
        **overrides: keys of RecoverConfig, e.g. student=…, teacher=…, data=…, out=…, steps=20. Rows may stand in the
            place of `data` and `eval_data`, also a stream's: a list of mappings, or a split of `datasets`. They are
            written into `out`/data.

    Returns:
        The result; everything is also in the directory `out`.

    Raises:
        CheckError: problems found before training (all of them).
        InputError, FileError: bad settings, unreadable or unwritable files.
        TrainingError: loss or gradient is not finite, or processes hold different weights.
    """
    with rows_from_python():
        if resume is None:
            return run_recovery(settings(recipe, overrides))
        with _where_it_began(Path(resume)) as path:
            config, directory, steps = _reopen(path, recipe, overrides)
            _put_unreadable_aside(directory)
            if directory.complete and steps is None and not _without_model(directory):
                require_as_written(directory.path / MODEL)
                console.print(f"{directory.path} is complete; nothing is left to do")
                return result_of(directory)
            return run_recovery(config, directory=directory, steps=steps)


def _put_unreadable_aside(directory: RunDirectory) -> None:
    """Move a summary that can't be read out of the way: the run then counts as interrupted, and writes it again."""
    summary = directory.path / SUMMARY
    if rank() == 0 and summary.is_file() and not measured(directory.path):
        warn(f"it is kept as {put_aside(summary)}, and written again from the last checkpoint")


def _without_model(directory: RunDirectory) -> bool:
    """Whether a complete run's model is gone; the run then counts as interrupted, and writes it from its checkpoint."""
    if (directory.path / MODEL).is_dir() or not directory.checkpoints():
        return False
    warn(f"{directory.path / MODEL} is gone; it is written again from the last checkpoint")
    (directory.path / SUMMARY).unlink(missing_ok=True)  # another process may have been here
    return True


@contextmanager
def _where_it_began(path: Path) -> Iterator[Path]:
    """Work in the directory in which a run began, since its recipe's paths are relative to that; the run's own path.

    A project that was moved, or is seen under another name, is found from where the run lies in it now. Where neither
    has the student, or the run is older than its record, the paths are taken from the present directory. That the files
    are the same ones is checked by their hashes.
    """
    directory = RunDirectory.open(path)
    began, given = directory.began_in, read_yaml(directory.path / RECIPE)
    if began is None or began == Path.cwd():
        yield path
        return
    places = [place for place in (began, _moved(path, given.get("out"))) if place and place.is_dir()]
    student = str(given.get("student"))
    place = next((place for place in places if (place / student).exists()), next(iter(places), None))
    if place is None:
        warn(f"{path} was begun in {began}, which is not there; relative paths of its recipe start from {Path.cwd()}")
        yield path
        return
    path = path.absolute()
    where = "where the run began" if place == began else f"since the run, which began in {began}, was moved"
    console.print(f"working in {place}, {where}", soft_wrap=True)
    keep_places()
    with chdir(place):
        yield path


def _moved(path: Path, out: object) -> Path | None:
    """The directory from which a run's present path is its recipe's `out`, where that is a relative one."""
    steps = Path(str(out)).parts
    here = path.resolve()
    if not out or Path(str(out)).is_absolute() or ".." in steps or here.parts[-len(steps) :] != steps:
        return None
    return Path(*here.parts[: -len(steps)])


def run_recovery(
    config: RecoverConfig,
    *,
    directory: RunDirectory | None = None,
    began: float | None = None,
    steps: int | None = None,
) -> RecoverResult:
    """`recover` for callers that have a config.

    Args:
        config: the settings.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
        steps: more than the run to continue has planned so far: it goes on to these.
    """
    began = time.monotonic() if began is None else began
    from remend.recovery.run import carry_out

    with stage("checking the recipe"):
        plan = _plan(config, resuming=directory is not None)
        if directory:
            plan = _longer(plan, directory, steps)
    for warning in plan.warnings:
        warn(warning)
    for line in (*plan.chosen, *(segment.line() for segment in plan.segments)):
        console.print(line, soft_wrap=True)
    try:
        return result_of(carry_out(plan, directory, began))
    except KeyboardInterrupt:  # what runs the command line turns it into exit code 130, without a word
        console.print(f"\n{_how_to_go_on(Path(directory.path if directory else config.out))}", soft_wrap=True)
        raise


def _how_to_go_on(path: Path) -> str:
    """What to say of an interrupted run."""
    if not (path / MANIFEST).is_file():
        return "interrupted before anything was written; give the same command again"
    saved = RunDirectory(path).checkpoints()
    repeated = "what was done is saved" if (path / SUMMARY).is_file() else "everything so far is done again"
    if saved and not (path / SUMMARY).is_file():
        repeated = f"it is saved up to step {saved[-1].step}, and what came after that is done again"
    manifest = manifest_of(path)
    trusted = ["--trust-remote-code"] if manifest["recipe"].get("trust_remote_code") is True else []
    launcher = f"{HOW} {processes()} -m " if processes() > 1 else ""
    words = [f"{launcher}remend recover --resume {shlex.quote(str(path))}", *trusted]
    words.append(options_of(manifest.get("imports", [])))
    again = " ".join(word for word in words if word)
    return f"interrupted ({repeated}); go on with: {again}"


def _longer(plan: Plan, directory: RunDirectory, steps: int | None) -> Plan:
    """The plan with the run's segments, and a new one where the run is to have so many steps."""
    plan = replace(plan, segments=segments_of(directory))
    if steps is None:
        return plan
    rate = plan.optimization.rate_at(steps)
    return replace(plan, segments=(*plan.segments, Segment.now(plan.ends[-1], steps, rate)))


def _plan(config: RecoverConfig, *, resuming: bool) -> Plan:
    """The plan of a recipe. Raises CheckError with all problems."""
    from remend.recovery.preflight import preflight

    result = preflight(config, resuming=resuming)
    result.raise_problems()
    assert result.plan is not None
    return result.plan


def track(path: str | Path, *, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Measure the alignment of a recovery's layers: its student, the checkpoints that it kept, its saved model.

    What `diagnose_every` has measured on the way is not measured again.

    Args:
        path: a recovery's directory.
        trust_remote_code: let the models' own Python run; a run that was begun so needs it said again.

    Returns:
        The rows of track.jsonl, by step: step, stage, kl, top1_agreement, cka by layer, reference_layers, rows.

    Raises:
        CheckError, InputError, FileError: no run, its inputs have changed, a reference without layers.
    """
    from remend.recovery.tracking import track_run

    with _where_it_began(Path(path)) as place:
        directory = RunDirectory.open(place)
        _require_imports(place)
        config = build(RecoverConfig, read_yaml(directory.path / RECIPE), f"recipe {directory.path / RECIPE}")
        _require_trust(place, config, {"trust_remote_code": trust_remote_code})
        return track_run(_plan(config, resuming=True), directory)


def _reopen(
    path: Path, recipe: str | Path | None, overrides: Mapping[str, Any]
) -> tuple[RecoverConfig, RunDirectory, int | None]:
    """A run's recipe and directory, and the steps to which it is to go on beyond those that it has planned, or None.

    Raises InputError where anything but the steps became another, or these can't be had.
    """
    directory = RunDirectory.open(path)
    _require_imports(path)
    config = build(RecoverConfig, read_yaml(path / RECIPE), f"recipe {path / RECIPE}")
    manifest = manifest_of(path)["recipe"]
    recorded = build(RecoverConfig, manifest, f"recipe in {path / MANIFEST}")  # keys that are newer have their defaults
    _require_trust(path, recorded, overrides)
    given = _given_again(recorded, recipe, overrides) if recipe or overrides else config
    from remend.recovery.epochs import as_counted

    given = as_counted(given, manifest_of(path).get("epochs"))
    told = RecoverConfig.own_names(overrides, "settings").get("steps") is not None
    asked = given.steps if told or given.steps != recorded.steps else None
    given = given.model_copy(update={"steps": recorded.steps})
    if given.prompts_a_step == recorded.prompts_a_step:
        given = given.model_copy(update={"prompts_per_step": recorded.prompts_per_step})
    for values in (config, given):
        changed = [k for k in RecoverConfig.model_fields if getattr(recorded, k) != getattr(values, k)]
        if changed:
            named = ", ".join(f"{k}: {_said(recorded, k)} became {_said(values, k)}" for k in changed)
            raise InputError(
                f"the recipe of {path} changed since the run began ({named}); a resumed run keeps its recipe, but for "
                "steps, which may be raised. Undo the change, or start a new run with another out."
            )
    if "device" not in manifest_of(path) and (config.save_every or 0) % 2:
        # until version 0.2 an odd save_every cut rounds of sampling, and the run's trajectory goes on as it began
        config = config.model_copy(update={"updates_per_rollout": config.updates_per_rollout or 1})
    if asked is None or asked == planned_steps(manifest_of(path)):
        return config, directory, None
    check_longer(directory, asked)
    return config, directory, asked


def _said(config: RecoverConfig, key: str) -> str:
    """A setting as a message has it; the prompts of a step also where the recipe leaves them to others."""
    return repr(config.prompts_a_step if key == "prompts_per_step" else getattr(config, key))


def _require_trust(path: Path, recorded: RecoverConfig, said: Mapping[str, object]) -> None:
    """Raise InputError where a run was begun with leave to run a model's own Python, and that is not given again."""
    if recorded.trust_remote_code and said.get("trust_remote_code") is not True:
        raise InputError(
            f"the run in {path} was begun with --trust-remote-code, and its files alone never let code run; say it "
            "again (Python: trust_remote_code=True)"
        )


def _given_again(recorded: RecoverConfig, recipe: str | Path | None, overrides: Mapping[str, Any]) -> RecoverConfig:
    """What a resumed run is given beside its directory, over its own recipe; what remend chose for it stays chosen."""
    over, ours = RecoverConfig.own_names(overrides, "settings"), recorded.model_dump()
    base = ours if recipe is None else RecoverConfig.own_names(read_yaml(recipe), f"recipe {recipe}")
    if recipe is not None:
        require_said(base, f"recipe {recipe}", over)
    if over.get("epochs") is not None and over.get("steps") is None:
        base = {key: value for key, value in base.items() if key != "steps"}
    values = merged(base, over)
    keys = ("out",) if values.get("streams") else ("out", "data")
    values |= {key: ours[key] for key in keys if values.get(key) is None}
    return settings(None, values)


def _require_imports(path: Path) -> None:
    """Raise InputError where this command leaves out a module that a run's own named: its files never let code run."""
    missing = not_imported(manifest_of(path).get("imports", []))
    if missing:
        raise InputError(f"the run in {path} was begun with {missing}; give that again: only then is its code run")


def result_of(directory: RunDirectory) -> RecoverResult:
    """What a complete run's files say."""
    rows = [r for r in directory.rows(METRICS) if "loss" in r]
    path = directory.path
    return RecoverResult(read_object(path / SUMMARY), rows, path, path / "model", path / "report.html")
