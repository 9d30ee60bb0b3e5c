"""How a run begins: its processes, its directory and manifest, its models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from remend.compression.packed_linear import pack_layers
from remend.console import console, stage, warn
from remend.data.given import write_rows
from remend.errors import InputError
from remend.files.atomic import write_json, write_text
from remend.files.environment import changes, environment
from remend.files.launch import HOW, SIZE, processes
from remend.files.lock import only_writer
from remend.files.run_directory import BEGINNING, MANIFEST, NEXT, RECIPE, SUMMARY, Checkpoint, RunDirectory, manifest_of
from remend.models.blocks.placement import Placed
from remend.models.device import mixed_precision
from remend.models.find import ModelSource, hash_files
from remend.models.load import load_model
from remend.models.protocols import CausalLM
from remend.models.sampling.transformers_engine import ROWS
from remend.models.scorer import Scorer, scorer
from remend.recovery.base import Base, is_base
from remend.recovery.plan import Plan
from remend.recovery.prompts import Prompts
from remend.recovery.segments import note_segments
from remend.training.teachers import Teacher, at_work
from remend.training.teachers.teacher import Workplace

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS_AT_ONCE = "rows_at_once"
"""In the manifest; runs of earlier versions have none, and sampled ROWS."""


@dataclass(frozen=True)
class Run:
    """A plan being carried out.

    plan: the run's.
    directory: where everything is written.
    accelerator: the processes that share a step.
    resumed: the checkpoint that the run goes on from, or None.
    prompts: the plan's, and those that the reference wrote since.
    held: what is let go when the run ends: its lock.
    longer: whether a run that was complete goes on; its results stand until the new ones take their place.
    base: what is frozen under an adapter.
    """

    plan: Plan
    directory: RunDirectory
    accelerator: Accelerator
    resumed: Checkpoint | None
    prompts: Prompts
    held: ExitStack = field(default_factory=ExitStack)
    longer: bool = False
    base: Base = field(default_factory=Base)

    @property
    def main(self) -> bool:
        """Whether this process measures, writes and saves; the others only share the steps."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Where the models are: on the plan's device, or of several processes each on the GPU of its number."""
        device: torch.device = self.accelerator.device
        return device if self.accelerator.num_processes > 1 else self.plan.device

    @property
    def shared(self) -> dict[str, int]:
        """How many processes share how many prompts a step, for the manifest and each checkpoint."""
        return {"processes": self.accelerator.num_processes, "prompts_per_step": self.plan.rows}

    @property
    def rows_at_once(self) -> int:
        """Rows that are sampled together: as the manifest says, so that a resumed run samples as it began."""
        path = self.directory.path
        said = manifest_of(path).get(ROWS_AT_ONCE, ROWS) if (path / MANIFEST).is_file() else ROWS
        return max(1, int(said))

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.resumed.step if self.resumed else 0

    @property
    def results(self) -> Path:
        """Where model and final measurements go: into the directory, or beside those of a run that goes on."""
        place = self.directory.path
        return place / NEXT if self.longer else place

    def precision(self) -> torch.autocast:
        """The context of forward passes over float32 weights."""
        return mixed_precision(self.plan.dtype, self.device)

    def read(self, source: ModelSource, dtype: torch.dtype = torch.float32, placed: Placed | None = None) -> CausalLM:
        """Load a model onto the device, or to where it is placed.

        Of a base that is frozen under an adapter there is one copy of the weights.
        """
        with stage(f"loading {source.spec}"):
            under, base = source.base or source, None
            if is_base(self.plan, source):
                base = self.base.model(dtype, lambda: self._frozen(under))
            if base and under is source:
                return base
            attention = self.plan.config.attn_implementation
            if base:
                return load_model(source, dtype=dtype, device=self.device, attention=attention, base=base)
            return (placed or Placed()).load(source, dtype=dtype, device=self.device, attention=attention)

    def _frozen(self, source: ModelSource) -> CausalLM:
        """The base under an adapter: its linear layers by their codes where it lies on a grid, else in their dtype.

        It comes to the device when it is small.
        """
        stored, attention = self.plan.facts.recognised.stored, self.plan.config.attn_implementation
        host = torch.device("cpu")
        model = load_model(source, dtype=torch.float32, device=host, attention=attention, frozen=True)
        if stored:
            pack_layers(model, stored)
        return model.to(self.device)

    def read_student(self, source: ModelSource) -> CausalLM:
        """Load the student, or what became of it, to where students are placed."""
        return self.read(source, placed=self.plan.placed.student)

    def _read_teacher(self, source: ModelSource, dtype: torch.dtype) -> CausalLM:
        return self.read(source, dtype, self.plan.placed.teacher)

    def parts(self, model: CausalLM) -> Scorer:
        """A model as body and head over the shared ids."""
        return scorer(model, self.plan.shared)

    def workplace(self, student: Scorer, initial: Mapping[str, torch.Tensor] | None = None) -> Workplace:
        """What the teachers are loaded into."""
        # a GPU's memory is dear, so its teacher is held in bfloat16; a CPU's measures in float32
        dtype = self.plan.dtype if self.device.type == "cuda" else torch.float32
        return Workplace(student, initial, dtype, self.plan.config.model_dump(), self._read_teacher)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()


def begin(plan: Plan, directory: RunDirectory | None, held: ExitStack) -> Run:
    """Start the processes; of a run to continue, lock it, and take its newest whole checkpoint.

    Of a new run nothing is written before `create`.

    Args:
        plan: the run's.
        directory: a run to continue; None starts one.
        held: what ends with the run.

    Raises:
        InputError: the run's inputs have changed since it began, or another process is at work in it; the steps would
            be others with these processes, or accelerate counts them otherwise than the launcher.
        FileError: what it has logged changed on the disk.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    config = plan.config
    if directory:
        _require_same_steps(directory, plan)
    if plan.device.type == "cuda" and plan.device.index is not None:
        torch.cuda.set_device(plan.device)  # kernels and libraries that name no device take this one
    accelerator = Accelerator(
        cpu=plan.device.type == "cpu",
        log_with=config.report_to,
        project_dir=config.out if config.report_to else None,
        # the others wait while one process measures and samples, which may take longer than the usual ten minutes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    _require_joined(accelerator, plan)
    if accelerator.is_main_process and directory:
        _lock(directory, held)
        directory.remove_leftovers()
        _require_same_inputs(directory, _inputs(plan))
        recorded = manifest_of(directory.path).get("tokens_sha256")
        require_same_tokens(recorded, plan.prompts.token_hash, directory)
        if plan.segments:
            note_segments(directory, plan.segments)
        _warn_of_changes(manifest_of(directory.path), plan, accelerator.num_processes)
    resumed = _newest(directory, accelerator, config.keep_checkpoints) if directory else None
    if accelerator.is_main_process and directory and resumed:
        directory.require_logged(resumed)
    directory = directory or RunDirectory(Path(config.out))
    longer = bool(plan.segments) and (directory.path / SUMMARY).is_file()
    return Run(plan, directory, accelerator, resumed, plan.prompts, held, longer)


def _lock(directory: RunDirectory, held: ExitStack) -> None:
    if not held.enter_context(only_writer(directory.path, "run")):
        warn(f"the file system of {directory.path} knows no locks; see to it that one process alone works there")


def _require_joined(accelerator: Accelerator, plan: Plan) -> None:
    """What was checked is what accelerate has made of the launcher's environment."""
    count, device = accelerator.num_processes, accelerator.device
    if count != processes() or (count > 1 and device.type != plan.device.type):
        raise InputError(
            f"the environment tells of {processes()} processes on {plan.device.type}, and accelerate has joined "
            f"{count} on {device.type}; launch by {HOW} N -m remend recover …, or run the command by itself, without "
            f"the variables {', '.join(SIZE[:2])} and ACCELERATE_USE_CPU"
        )


def _require_same_steps(directory: RunDirectory, plan: Plan) -> None:
    """A step takes as many prompts as before, and the processes that share it now come to the same one."""
    recorded, count, path = manifest_of(directory.path), processes(), directory.path
    began = recorded.get("processes")
    if began is None and count > 1:
        raise InputError(
            f"the run in {path} was begun by a version that multiplied the prompts of a step by the processes, and "
            "recorded neither; one process can go on with a run that one process began. Otherwise start a new run with "
            "another out"
        )
    if recorded.get("prompts_per_step", plan.rows) != plan.rows:
        raise InputError(
            f"a step of the run in {path} took {recorded['prompts_per_step']} prompts, and would take {plan.rows} now; "
            f"set prompts_per_step to {recorded['prompts_per_step']}, or start a new run with another out"
        )
    drops = plan.config.lora is not None and plan.config.lora.dropout > 0
    if drops and began is not None and began != count:
        raise InputError(
            f"the run in {path} was begun with {began} processes, and {count} go on: each draws its own dropout, so "
            f"the steps would be others. Launch {began} again ({HOW} {began} -m remend recover --resume {path}), or "
            "start a new run with another out"
        )


def _warn_of_changes(manifest: Mapping[str, Any], plan: Plan, count: int) -> None:
    """Say what may move a resumed run's figures: other versions, another machine, dtype, device or number of processes.

    Another number of processes adds the same gradients in another order.
    """
    now = {**environment(), **_arithmetic(plan), "processes": count}
    changed = changes(manifest, now)
    if changed:
        warn(
            f"since the run began, {'; '.join(changed)} changed: its further steps may differ in the last digits "
            "from those of a run that was not interrupted"
        )


def _arithmetic(plan: Plan) -> dict[str, str]:
    return {"dtype": str(plan.dtype).removeprefix("torch."), "device": plan.device.type}


def _newest(directory: RunDirectory, accelerator: Accelerator, keep: int) -> Checkpoint | None:
    """The newest checkpoint whose files are whole: the main process looks, and all take that one.

    Where the process before was killed ahead of removing older ones than the newest `keep`, they are removed now.
    """
    chosen: list[int | None] = [None]
    saved = directory.checkpoints()
    if accelerator.is_main_process and saved:
        whole = directory.whole_checkpoints()
        chosen = [whole[-1].step if whole else None]
        directory.keep_newest(whole, keep)
        if whole and not whole[-1].hashed:
            warn(f"{whole[-1].path} is of a version without hashes: damage to it would not be seen")
        if not whole:
            warn(f"no checkpoint of {directory.path} is whole; the run begins again at step 0")
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(chosen)
    return next((checkpoint for checkpoint in saved if checkpoint.step == chosen[0]), None)


def create(run: Run, rows: int) -> None:
    """Make a new run's directory, once its models are loaded and known to fit. Raises InputError where it is taken.

    `rows` will be sampled at once. Creating the Accelerator has joined all processes, so none still looks whether `out`
    is free.
    """
    if run.main:
        directory = RunDirectory.create(run.directory.path)
        _lock(directory, run.held)
        _create(run, _inputs(run.plan), directory, rows)
    run.wait()


def load(run: Run) -> tuple[CausalLM, dict[str, Teacher]]:
    """The student, and the teachers that do not follow it, by name; the reference is among them."""
    plan = run.plan
    student = run.read_student(plan.student)
    workplace = run.workplace(run.parts(student))
    early = (name for name, teacher in plan.teachers.items() if not teacher.moving or name == plan.reference)
    teachers = {name: at_work(plan.teachers[name], workplace) for name in early}
    if run.main and (line := run.base.line(plan)):
        console.print(line, soft_wrap=True)
    return student, teachers


def _inputs(plan: Plan) -> dict[str, Any]:
    """Hashes of models and data."""
    main = plan.prompts.main.stream.teacher.name
    with stage("hashing the models' files"):
        hashes: dict[str, Any] = {"student": hash_files(plan.student)}
        if plan.teachers[plan.reference].moving:
            hashes["teacher"] = hash_files(plan.student.base or plan.student)
        for name, teacher in plan.teachers.items():
            files = teacher.hashes()
            first = name == (plan.reference if teacher.source else main)
            if files is not None:
                hashes["teacher" if first else f"teacher {name}"] = files
    text = {"repair_text": plan.repair_text.hash} if plan.repair_text else {}
    return {"models": hashes, "data": plan.prompts.hashes, **text}


def _create(run: Run, inputs: Mapping[str, Any], directory: RunDirectory, rows: int) -> None:
    plan = run.plan
    recipe, counts = plan.config.model_dump(), plan.prompts.counts()
    manifest = {
        "kind": "recover",
        "recipe": recipe,
        "directory": str(Path.cwd()),
        "reference": plan.reference,
        "answer_tokens": plan.prompts.main.stream.lengths[1],
        "repair_answers": plan.repair_answers if plan.repairs else 0,
        "kl_direction": plan.directions,
        "seeds": {"seed": plan.config.seed},
        **({"epochs": plan.epochs.record()} if plan.epochs else {}),
        **inputs,
        "prompts": counts[plan.prompts.main.stream.name],
        "streams": counts,
        "tokens_sha256": plan.prompts.token_hash,
        "dropped": plan.prompts.dropped,
        "shared_vocabulary": plan.shared,
        "constraint": plan.constraint,
        **run.base.record(plan),
        ROWS_AT_ONCE: rows,
        **run.shared,
        **_arithmetic(plan),
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        **environment(),
    }
    write_text(directory.path / BEGINNING, "")
    write_rows(directory.path)
    write_text(directory.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    write_json(directory.path / MANIFEST, manifest)
    (directory.path / BEGINNING).unlink(missing_ok=True)


def _require_same_inputs(directory: RunDirectory, inputs: Mapping[str, Any]) -> None:
    recorded = manifest_of(directory.path)
    rest = [name for name in inputs if name != "models"]
    names = {**inputs["models"], **{name: inputs[name] for name in rest}}
    before = {**recorded.get("models", {}), **{name: recorded.get(name) for name in rest}}
    changed = [name for name, hashes in names.items() if before.get(name) != hashes]
    if changed:
        raise InputError(
            f"the files of {' and '.join(changed)} changed since the run in {directory.path} began, so it can't be "
            "continued as it was. Put them back, or start a new run with another out."
        )


def require_same_tokens(recorded: str | None, rendered: str, directory: RunDirectory) -> None:
    """Raise InputError where prompts are rendered otherwise than when the run began; older runs have recorded nothing.

    Args:
        recorded, rendered: SHA-256 of the prompts' tokens then and now.
    """
    if recorded not in (None, rendered):
        raise InputError(
            f"the prompts are other tokens than when the run in {directory.path} began, though the rows are the same: "
            "the chat template writes something that changes, such as the date. What was measured would not be "
            "comparable; start a new run with another out, or resume under the date of then"
        )
