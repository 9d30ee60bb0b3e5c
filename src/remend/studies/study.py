"""`remend study STUDY.yaml`: degradations × methods × tasks × seeds as a grid of recoveries, compared on one page.

remend study small --out runs/small --dry-run
remend study small --out runs/small

OUT/study.json       which study this is
OUT/data, tiny       prompts, task rows, the model that the study trains itself
OUT/students/NAME    the degraded students, made once
OUT/reference/MODEL  grades of the healthy models; OUT/reference-students/NAME  of students that others stand on
OUT/cells/GROUP/METHOD/SEED   a recovery each, with its grades (see cell.py)
OUT/records/  each finished cell in one small file, without its weights; see records.py
OUT/results.json, results.csv, report.html, report.md, report.json, correlation.json
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from remend.console import console
from remend.errors import InputError
from remend.files.atomic import JsonObject, JsonRow, visible, write_json, write_text
from remend.files.lock import only_writer
from remend.files.reading import read_object
from remend.files.settings import require_said
from remend.plugins import asked_for, not_imported
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import resolve
from remend.report.study import study_page
from remend.report.writing import write_page
from remend.studies import tiny_model
from remend.studies.cell import OUTCOME, CellSettings, Grading, state_of, ungraded
from remend.studies.cost import estimate
from remend.studies.grid import Cell, Group, Study, chosen
from remend.studies.labels import LabelSettings
from remend.studies.made import (
    Made,
    cell_inputs,
    graded,
    grading_inputs,
    is_made,
    make,
    reference_grades,
    student_arguments,
    student_inputs,
)
from remend.studies.plan import read_study, require_benchmarks, shipped_studies
from remend.studies.records import is_taken_over, take_over, write_record
from remend.studies.results import gather
from remend.studies.spec import TINY
from remend.studies.table import lines, table_of
from remend.studies.work import Job, failure_of, run_jobs

__all__ = ["lines", "shipped_studies", "study"]

STUDY, RESULTS, TABLE = "study.json", "results.json", "results.csv"

FINISHED = ("done", "ungraded")
"""States of cells that are not run again."""


def study(
    path: str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    dry_run: bool = False,
    only: str | Sequence[str] | None = None,
    records: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> JsonObject:
    """Run a study, or go on with it: cells whose settings, models and data did not change are not run again.

    Args:
        path: a YAML file, or the name of a study that ships with remend.
        out: the study's directory; a new one, or the one that it was begun in.
        jobs: processes at once.
        dry_run: only tell what cells there are and what they cost; nothing is written.
        only: names of cells or patterns, e.g. 'int3-g64', 'int3-g64/sft/0', '*/*/0'; the degraded student is measured
            along.
        records: a folder of records (records/ of a study, here or elsewhere). A cell that has one of the same settings
            and data counts as done, without its weights.
        trust_remote_code, allow_code: let code run where the study says so; without them such a study is refused.

    Returns:
        The content of results.json with the paths `out`, `report`, `csv`, `json`; `failures` has the message of each
        cell that failed, now or when it was last tried; `failed_now` names those of them that were asked for. A dry
        run: see remend.studies.cost.estimate. `lines` makes either readable.

    Raises:
        InputError, FileError: an unusable study, an `out` that is another study's, a pattern that names no cell, a
            benchmark that lm-evaluation-harness does not know, or that package missing.
        What goes wrong in a cell is not raised.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; allowed is 1 or more processes")
    out = Path(out)
    imports = _imports(out)
    plan = read_study(path)
    said = {"trust_remote_code": trust_remote_code, "allow_code": allow_code or dry_run}  # which grades nothing
    require_said(plan.spec.model_dump(), f"study {plan.path}", said)
    cells = chosen(plan, only)
    _require_own(plan, out)
    if records is not None and not Path(records).is_dir():
        raise InputError(f"records {records} is no folder; name one that holds records of finished cells")
    if dry_run:
        return estimate(plan, out, cells, _finished(plan, out, cells))
    require_benchmarks(plan)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out, "study"):
        write_json(out / STUDY, {**_identity(plan), **({"imports": imports} if imports else {})})
        return _carried_out(plan, out, jobs, cells, Path(records) if records else None)


def _carried_out(plan: Study, out: Path, jobs: int, cells: Sequence[Cell], records: Path | None) -> JsonObject:
    work = _Work(plan, out, jobs, make(plan, out))
    try:
        left = work.not_taken_over(cells, records)
        work.students(left)
        work.references(left)
        work.cells([c for c in left if not c.method.trained])
        # seed by seed, so that a study that is stopped has whole seeds
        trained = [c for c in left if c.method.trained]
        work.cells(sorted(trained, key=lambda c: plan.spec.seeds.index(c.seed)))
    finally:
        results = work.finish()
    asked = {cell.name for cell in cells}
    others = {cell.name for cell in plan.cells} - asked
    return results | {"failed_now": [name for name in results["failures"] if name not in others]}


def _imports(out: Path) -> list[str]:
    """The modules that the commands of a study named. Raises InputError where this one leaves one of them out."""
    earlier = read_object(out / STUDY).get("imports", []) if (out / STUDY).is_file() else []
    missing = not_imported(earlier)
    if missing:
        raise InputError(f"the study in {out} was begun with {missing}; give that again: only then is its code run")
    return list(dict.fromkeys([*earlier, *asked_for]))


def _identity(plan: Study) -> JsonObject:
    return {"study": plan.name, "models": {name: spec.path for name, spec in plan.models.items()}}


def _require_own(plan: Study, out: Path) -> None:
    """Raises InputError where `out` holds something else."""
    if out.is_file():
        raise InputError(f"out {out} is a file; name a directory")
    if (out / STUDY).is_file():
        there, mine = read_object(out / STUDY), _identity(plan)
        if any(there.get(key) != mine[key] for key in mine):
            raise InputError(
                f'out {out} holds the study "{there.get("study")}" of {_named(there)}, and this is "{plan.name}" of '
                f"{_named(mine)}; name another out"
            )
    elif out.is_dir() and visible(out):  # a study that was killed at its start leaves names of remend's own
        raise InputError(f"out {out} is not empty and holds no study; name a new directory")


def _named(identity: JsonRow) -> str:
    return ", ".join(identity.get("models", {}).values())


def _state(plan: Study, made: Made, cell: Cell) -> str:
    """As cell.state_of; a cell whose degraded student is not there, or is another by now, is stale or new."""
    place = made.out / "cells" / cell.name
    try:
        if is_made(made.student(cell.group), student_inputs(plan, made, cell.group)):
            return state_of(place, cell_inputs(plan, made, cell))
    except (InputError, OSError):  # a model or file that is gone
        pass
    return "stale" if place.exists() else "new"


def _finished(plan: Study, out: Path, cells: Sequence[Cell]) -> set[str]:
    """Names of the cells that a run would leave as they are. Nothing is written into `out`, and nothing trained."""
    if not any((out / "cells" / cell.name / OUTCOME).is_file() for cell in cells):
        return set()
    if any(spec.path == TINY for spec in plan.models.values()) and not tiny_model.is_made(out / "tiny"):
        return set()
    with TemporaryDirectory() as folder:
        try:
            made = make(plan, out, Path(folder))
        except (InputError, OSError):
            return set()
        return {cell.name for cell in cells if _state(plan, made, cell) in FINISHED}


@dataclass
class _Work:
    """A study under way. failed: messages by the name of a student or cell."""

    plan: Study
    out: Path
    jobs: int
    made: Made
    failed: dict[str, str] = field(default_factory=dict)

    def _run(self, jobs: Sequence[Job], what: str) -> None:
        shared = self.plan.spec.one_process and self.jobs == 1
        for number, (job, message) in enumerate(run_jobs(self.out, jobs, processes=self.jobs, shared=shared), 1):
            said = "failed" if message else "done"
            console.print(f"{what} {number} of {len(jobs)}: {job.name}: {said}", soft_wrap=True)
            if message:
                self.failed[job.name.removeprefix("students/")] = message

    def not_taken_over(self, cells: Sequence[Cell], records: Path | None) -> list[Cell]:
        """The cells that are still to be run: of a group, all or those without a record.

        A group whose trained cells are not all there runs its degraded student too, by which their steps are planned.
        """
        if records is None:
            return [cell for cell in cells if not is_taken_over(self.plan, self.made, cell)]
        taken = {cell.name for cell in cells if cell.method.trained and take_over(self.plan, self.made, cell, records)}
        short = {cell.group for cell in cells if cell.method.trained and cell.name not in taken}
        idle = [cell for cell in cells if not cell.method.trained and cell.group not in short]
        taken |= {cell.name for cell in idle if take_over(self.plan, self.made, cell, records)}
        if taken:
            console.print(f"{len(taken)} cells are counted as done by their records in {records}")
        return [cell for cell in cells if cell.name not in taken]

    def students(self, cells: Sequence[Cell]) -> None:
        """Make the degraded students that are not there, those first that others stand on."""
        chains = [list(self._chain(group)) for group in {cell.group.student: cell.group for cell in cells}.values()]
        for depth in range(max(map(len, chains), default=0)):
            level = [chain[depth] for chain in chains if depth < len(chain)]
            self._students({group.student: group for group in level})

    def _chain(self, group: Group) -> Iterator[Group]:
        """A group and all that its student stands on, from the first."""
        parent = self.plan.parent(group)
        if parent is not None:
            yield from self._chain(parent)
        yield group

    def _students(self, groups: Mapping[str, Group]) -> None:
        wanted = []
        for name, group in groups.items():
            parent = self.plan.parent(group)
            try:
                if parent is not None and parent.student in self.failed:
                    raise InputError(f"{parent.student}, which it stands on, was not made")
                if not is_made(self.made.student(group), student_inputs(self.plan, self.made, group)):
                    wanted.append(Job(f"students/{name}", "degrade", student_arguments(self.plan, self.made, group)))
            except (InputError, OSError) as error:
                self.failed[name] = str(error)
        self._run(wanted, "student")

    def references(self, cells: Sequence[Cell]) -> None:
        """Grade the healthy models, and the students that others stand on."""
        places = {reference_grades(self.plan, self.out, cell.group): cell.group for cell in cells}
        wanted = []
        for place, one in places.items():
            ordered = [c.group for c in self.plan.cells if reference_grades(self.plan, self.out, c.group) == place]
            tasks = {name: None for group in ordered for name in graded(self.plan, group)}
            rows = {
                name: entry for group in ordered for name, entry in grading_inputs(self.plan, self.made, group).items()
            }
            healthy = self.made.healthy(self.plan, one)
            try:
                inputs = {"model": self.made.hash_of(healthy), "grading": rows}
            except (InputError, OSError):  # it was not made, and its cells say why
                continue
            record = place / "graded.json"
            if not record.is_file() or read_object(record) != inputs:
                grading = [self._grading(name).model_dump() for name in tasks]
                arguments = {"model": healthy, "folder": str(place), "grading": grading}
                wanted.append(Job(f"{place.parent.name}/{place.name}", "grade", {**arguments, "inputs": inputs}))
        self._run(wanted, "reference")

    def _grading(self, task: str) -> Grading:
        spec, rows = {**self.plan.tasks, **self.plan.benchmarks}[task], self.made.tasks[task].held_out
        options = {"device": str(self.plan.spec.recipe.get("device", "auto")), **spec.options}
        return Grading(task=task, data=None if rows is None else str(rows), options=options)

    def cells(self, cells: Sequence[Cell]) -> None:
        """Run the cells that are not done."""
        wanted = []
        for cell in cells:
            why = self.failed.get(cell.group.student)
            idle = Cell(cell.group, self.plan.none, self.plan.spec.seeds[0])
            if why:
                self.failed[cell.name] = f"its degraded student was not made: {why}"
            elif cell.method.trained and idle.name in self.failed:
                self.failed[cell.name] = f"the degraded student was not measured: {self.failed[idle.name]}"
            elif _state(self.plan, self.made, cell) not in FINISHED:
                wanted.append(Job(cell.name, "cell", self._settings(cell, idle).model_dump()))
        self._run(wanted, "cell")

    def _place(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.name

    def _settings(self, cell: Cell, idle: Cell) -> CellSettings:
        plan, made, tasked = self.plan, self.made, self.plan.tasked(cell)
        files, student = made.tasks[cell.group.task], str(made.student(cell.group))
        reference, place = made.healthy(plan, cell.group), self._place(cell)
        forgot = plan.degradations[cell.group.degradation].settings.learns
        policy = {} if cell.method.base == "on-policy" or not cell.method.steps else {"policy": "off"}
        other = {"base": made.models[cell.group.model], "initial": "initial"}.get(cell.method.teacher)
        share = {"share": 1 - plan.spec.task_share} if tasked else {}
        streams: JsonObject = {
            "recover": {"data": str(made.train), "eval_data": str(made.held_out)}
            | ({"teacher": other} if other else {})
            | share,
            "task": {
                "data": str(files.train),
                "eval_data": str(files.few),
                # a student that learned the task is held to what it can, a compressed one learns what it could
                "teacher": "initial" if forgot else other or reference,
                "share": plan.spec.task_share,
            },
        }
        streams = {name: {**own, **policy} for name, own in streams.items() if name == "recover" or tasked}
        recipe = plan.config(cell, student=student, teacher=reference, out=str(place), steps=1, streams=streams)
        return CellSettings(
            place=str(place),
            recipe=recipe.model_dump(),
            tokens=plan.budget.tokens if cell.method.steps else 0,
            measurements=plan.spec.measurements,
            checkpoints=not plan.spec.one_process,
            labels=self._labels(cell, recipe) if cell.method.labelled else None,
            idle=str(self._place(idle)) if cell.method.trained else None,
            task_rows=str(files.train) if tasked and not cell.method.labelled else None,
            grading=[self._grading(name) for name in graded(plan, cell.group)],
            inputs=cell_inputs(plan, made, cell),
            keep_model=plan.spec.keep_models,
        )

    def _labels(self, cell: Cell, recipe: RecoverConfig) -> LabelSettings:
        plan = self.plan
        general = plan.budget.tokens * (1 - plan.spec.task_share) / recipe.off_policy_passes
        return LabelSettings(
            task=str(self.made.tasks[cell.group.task].train) if plan.tasked(cell) else None,
            share=plan.spec.task_share,
            taught=max(1, round(general / resolve(recipe)[0].lengths[1]))
            if cell.method.base == "sft-teacher"
            else None,
        )

    def finish(self) -> JsonObject:
        """Gather what there is, and write it."""
        states = {cell.name: self._known(cell) for cell in self.plan.cells}
        for cell in self.plan.cells:
            if states[cell.name] == "done" and not is_taken_over(self.plan, self.made, cell):
                write_record(self.plan, self.made, cell)
        results = gather(self.plan, self.out, states, self._ungraded(states))
        failures = {
            n: m for n, m in self.failed.items() if n.startswith(("reference/", "reference-students/"))
        } | results["failures"]
        results["failures"] = failures
        write_json(self.out / RESULTS, results)
        write_text(self.out / TABLE, table_of(results))
        report = write_page(self.out, study_page(results))
        paths = {"out": self.out, "report": report, "csv": self.out / TABLE, "json": self.out / RESULTS}
        return results | {key: str(path) for key, path in paths.items()}

    def _known(self, cell: Cell) -> str:
        """done, not run, or why it failed."""
        if cell.name in self.failed:
            return self.failed[cell.name]
        if is_taken_over(self.plan, self.made, cell):
            return "done"
        reached = _state(self.plan, self.made, cell)
        return "done" if reached in FINISHED else failure_of(self.out, cell.name) or "not run"

    def _ungraded(self, states: Mapping[str, str]) -> dict[str, list[str]]:
        """Of finished cells, the tasks that they were not graded on."""
        done = [cell for cell in self.plan.cells if states[cell.name] == "done"]
        theirs = {cell.name: list[str]() for cell in done if is_taken_over(self.plan, self.made, cell)}
        done = [cell for cell in done if cell.name not in theirs]
        return theirs | {c.name: ungraded(self._place(c), cell_inputs(self.plan, self.made, c)) for c in done}
