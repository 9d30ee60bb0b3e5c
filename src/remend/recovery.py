"""Bring a degraded student back with its healthy reference as teacher: the whole job, from recipe to report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from remend import models, run
from remend.adapters import add_lora, is_adapted
from remend.config import RecoverConfig, build, merged, read_yaml
from remend.constraints import Constraint, constraint_of
from remend.errors import InputError
from remend.held_out import HeldOut, Judge, summarize
from remend.losses import direction
from remend.objective import OnPolicy
from remend.preflight import Preflight, preflight
from remend.progress import console, stage
from remend.repair import Repaired, repair
from remend.report import write_report
from remend.rollout import Order, TransformersSampler, derive_seed
from remend.run import RunDirectory
from remend.scoring import scorer
from remend.teacher import Frozen
from remend.train import Hook, Saving, Schedule, train


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
    values = merged(read_yaml(recipe) if recipe is not None else {}, overrides or {})
    return build(RecoverConfig, values, f"recipe {recipe}" if recipe is not None else "settings")


def check(recipe: str | Path | None = None, **overrides: Any) -> Preflight:
    """Check a recovery without training; see `preflight`. Problems are in the result, not raised."""
    return preflight(settings(recipe, overrides))


def recover(recipe: str | Path | None = None, *, resume: str | Path | None = None, **overrides: Any) -> RecoverResult:
    """Recover a degraded student by on-policy self-distillation (arXiv 2604.15794).

    Args:
        recipe: a YAML file with the keys of RecoverConfig.
        resume: the directory of an interrupted run; goes on exactly where its last checkpoint was.
        **overrides: keys of RecoverConfig, e.g. student=…, teacher=…, data=…, out=…, steps=20.

    Returns:
        The result; everything is also in the directory `out`.

    Raises:
        CheckError: problems found before training (all of them).
        InputError, FileError: bad settings, unreadable or unwritable files.
        TrainingError: loss or gradient is not finite.
    """
    if resume is None:
        return run_recovery(settings(recipe, overrides))
    config, directory = _reopen(Path(resume), recipe, overrides)
    directory.remove_leftovers()
    if (directory.path / run.SUMMARY).is_file():
        console.print(f"{directory.path} is complete; nothing is left to do")
        return _result(directory)
    return run_recovery(config, directory=directory)


def run_recovery(
    config: RecoverConfig, *, directory: RunDirectory | None = None, began: float | None = None
) -> RecoverResult:
    """`recover` for callers that have a config.

    Args:
        config: the settings.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
    """
    began = time.monotonic() if began is None else began
    with stage("checking the recipe"):
        checked = preflight(config, resuming=directory is not None)
    checked.raise_problems()
    for warning in checked.warnings:
        console.print(f"[yellow]warning[/]: {warning}", soft_wrap=True)
    return _Recovery(config, checked, directory, began).run()


def _reopen(path: Path, recipe: str | Path | None, overrides: Mapping[str, Any]) -> tuple[RecoverConfig, RunDirectory]:
    directory = RunDirectory.open(path)
    config = build(RecoverConfig, read_yaml(path / run.RECIPE), f"recipe {path / run.RECIPE}")
    recorded = run.read_json(path / run.MANIFEST)["recipe"]
    given = settings(recipe, merged({} if recipe else recorded, overrides)) if recipe or overrides else config
    for values in (config, given):
        changed = [k for k, v in values.model_dump().items() if recorded.get(k) != v]
        if changed:
            named = ", ".join(f"{k}: {recorded.get(k)!r} became {getattr(values, k)!r}" for k in changed)
            raise InputError(
                f"the recipe of {path} changed since the run began ({named}); a resumed run keeps its recipe. "
                "Undo the change, or start a new run with another out."
            )
    return config, directory


def _same_inputs(directory: RunDirectory, inputs: Mapping[str, Any]) -> None:
    recorded = run.read_json(directory.path / run.MANIFEST)
    names = {"student": inputs["models"]["student"], "teacher": inputs["models"]["teacher"], "data": inputs["data"]}
    before = {**recorded["models"], "data": recorded["data"]}
    changed = [name for name, hashes in names.items() if before[name] != hashes]
    if changed:
        raise InputError(
            f"the files of {' and '.join(changed)} changed since the run in {directory.path} began, so it can't be "
            "continued as it was. Put them back, or start a new run with another out."
        )


def _result(directory: RunDirectory) -> RecoverResult:
    rows = [r for r in directory.rows(run.METRICS) if "loss" in r]
    path = directory.path
    return RecoverResult(run.read_json(path / run.SUMMARY), rows, path, path / "model", path / "report.html")


class _Recovery:
    """One recovery under way: holds what its stages share."""

    def __init__(self, config: RecoverConfig, checked: Preflight, directory: RunDirectory | None, began: float) -> None:
        self.config, self.checked = config, checked
        self.began = began
        assert checked.student is not None
        assert checked.teacher is not None
        self.dtype = models.choose_dtype(config.dtype, checked.device)
        self.accelerator = Accelerator(
            cpu=checked.device.type == "cpu",
            log_with=config.report_to,
            project_dir=config.out if config.report_to else None,
        )
        self.student_source, self.teacher_source = checked.student, checked.teacher
        # creating the Accelerator joined all processes, so none still looks whether `out` is free
        self.directory = directory or RunDirectory(Path(config.out))
        if self.accelerator.is_main_process:
            inputs = self._inputs()
            if directory is None:
                self._create(inputs)
            else:
                _same_inputs(directory, inputs)

    def _inputs(self) -> dict[str, Any]:
        sources = {"student": self.student_source, "teacher": self.teacher_source}
        with stage("hashing the models' files"):
            return {"models": {n: models.hash_files(s) for n, s in sources.items()}, "data": self.checked.data_hashes}

    def _create(self, inputs: Mapping[str, Any]) -> None:
        config, environment = self.config, run.environment()
        recipe = config.model_dump()
        manifest = {
            "kind": "recover",
            "recipe": recipe,
            "kl_direction": direction(config.beta),
            "seeds": {"seed": config.seed},
            **inputs,
            "prompts": {"train": len(self.checked.train), "held_out": len(self.checked.held_out)},
            "dropped": self.checked.dropped,
            "shared_vocabulary": self.checked.shared,
            "constraint": self.checked.constraint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "warnings": self.checked.warnings,
            "notes": self.checked.notes,
            **environment,
        }
        directory = RunDirectory.create(Path(config.out))
        run.write_text(directory.path / run.RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        run.write_json(directory.path / run.MANIFEST, manifest)

    def run(self) -> RecoverResult:
        """All stages in order."""
        self.pad_id = models.pad_id(self.checked.tokenizer)
        teacher, student = self._load_teacher(), self._load(self.student_source, torch.float32)
        reference = scorer(teacher, self.checked.shared)
        # one process measures, writes and saves; the others only share the steps
        main = self.accelerator.is_main_process
        judge = Judge(reference, self.checked, self.config, self.directory, self.pad_id) if main else None
        baseline = judge.baseline(student) if judge else None
        self.accelerator.wait_for_everyone()
        repaired = self._repair(student, teacher)
        if judge and repaired.seconds:
            judge.after_repair(student, repaired.seconds)
        constraint = self._constraint(student, teacher, repaired)
        del repaired  # its masters are as large as the model, and the constraint has its own
        hooks = [judge.hook(student, self.config.eval_every)] if judge and self.config.eval_every else []
        self._train(student, reference, constraint, hooks)
        if judge and baseline:
            with stage("saving the model"), run.new_directory(self.directory.path / "model") as target:
                models.save_model(student, self.checked.tokenizer, target)
                constraint.save(target)
            del student, constraint, hooks
            self._finish(baseline, judge.final(self._load_saved()))
        self.accelerator.wait_for_everyone()
        return _result(self.directory)

    def _load_teacher(self) -> Any:
        # a GPU's memory is dear, so its teacher is held in bfloat16; a CPU's measures in float32
        dtype = self.dtype if self.accelerator.device.type == "cuda" else torch.float32
        return self._load(self.teacher_source, dtype).requires_grad_(False)

    def _load(self, source: models.Source, dtype: torch.dtype) -> Any:
        with stage(f"loading {source.spec}"):
            return models.load_model(
                source, dtype=dtype, device=self.accelerator.device, trust_remote_code=self.config.trust_remote_code
            )

    def _load_saved(self) -> Any:
        return self._load(models.resolve(str(self.directory.path / "model")), torch.float32)

    def _constraint(self, student: Any, teacher: Any, repaired: Repaired) -> Constraint:
        if self.config.lora is not None:
            if repaired.stored:
                repaired.stored.check(student)
            settings = self.config.lora.model_dump()
            add_lora(student, **settings, seed=derive_seed(self.config.seed, "lora"), base=self.config.student)
        return constraint_of(
            student,
            repaired.stored,
            masked=self.checked.recognised.mask,
            origin=teacher,
            masters=repaired.masters,
            scales=self.config.scales,
        )

    def _repair(self, student: Any, teacher: Any) -> Repaired:
        held = self.checked.recognised
        # a checkpoint holds what came of repair, so a resumed run need not do it again
        done = bool(self.directory.checkpoints())
        if done or not self.config.repair or self.config.lora is not None or is_adapted(student):
            return Repaired(held.stored)
        return repair(
            student,
            teacher,
            self.checked.tokenizer,
            self.checked.train,
            stored=held.stored,
            masked=held.mask,
            layer_map=self.checked.layer_map,
            seed=self.config.seed,
        )

    def _train(self, student: Any, reference: Any, constraint: Constraint, hooks: Sequence[Hook]) -> None:
        config, accelerator = self.config, self.accelerator
        objective = OnPolicy(
            student=scorer(student, self.checked.shared, checkpointing=config.gradient_checkpointing),
            teacher=Frozen(reference, self.pad_id),
            sampler=TransformersSampler(
                student, self.checked.shared, models.eos_ids(student, self.checked.tokenizer), self.pad_id
            ),
            order=Order(self.checked.train, config.seed),
            pad_id=self.pad_id,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            beta=config.beta,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            precision=models.precision(self.dtype, accelerator.device),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        schedule = Schedule(config.steps, config.learning_rate, config.warmup_steps, config.final_learning_rate)
        saving = Saving(self.directory, config.save_every, config.keep_checkpoints)
        saved = self.directory.checkpoints()
        resume = saved[-1] if saved else None
        done = resume.step if resume else 0
        if accelerator.is_main_process:
            for name in (run.METRICS, "timing.jsonl"):
                self.directory.rewind(name, done)
        if config.report_to:
            accelerator.init_trackers("remend", config=config.model_dump())
        with stage(f"recovering ({direction(config.beta)})", config.steps, done) as advance:

            def on_step(row: Mapping[str, float]) -> None:
                advance(1, f"loss {row['loss']:.3f}  {row['tokens'] / row['seconds']:.0f} tokens/s")

            train(
                objective,
                constraint,
                accelerator,
                schedule,
                saving,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                resume=resume,
                hooks=hooks,
                on_step=on_step,
            )
        if config.report_to:
            accelerator.end_training()

    def _finish(self, baseline: HeldOut, recovered: HeldOut) -> None:
        timing = self.directory.rows("timing.jsonl")
        tokens = sum(row["tokens"] for row in self.directory.rows(run.METRICS) if "loss" in row)
        summary = {
            **summarize(baseline, recovered, self.config.seed),
            "kl_direction": direction(0.0),
            "training_loss": direction(self.config.beta),
            "constraint": self.checked.constraint,
            "repair": run.read_json(path) if (path := self.directory.path / run.REPAIR).is_file() else None,
            "steps": self.config.steps,
            "tokens_trained": tokens,
            "seconds": round(time.monotonic() - self.began, 1),
            "training_seconds": round(sum(r["seconds"] for r in timing), 1),
            "peak_rss_mib": round(run.peak_rss_mib()),
            "held_out_prompts": len(self.checked.held_out),
            "warnings": self.checked.warnings,
            "notes": self.checked.notes,
        }
        write_report(self.directory.path, summary)
        run.write_json(self.directory.path / run.SUMMARY, summary)  # last: its presence says that the run is complete
