"""A recovery under way, stage by stage: load, measure, repair, train, save, measure again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from remend.compression.recognise import RECORD, record_to_keep
from remend.console import console, stage
from remend.data.examples import example_of
from remend.data.order import derive_seed
from remend.errors import InputError
from remend.files.atomic import json_line, new_directory, read_json, write_json, write_text
from remend.files.environment import environment, peak_rss_mib
from remend.files.run_directory import MANIFEST, METRICS, RECIPE, REPAIR, SUMMARY, RunDirectory
from remend.maths.losses import of_beta
from remend.models.adapters import add_lora, is_adapted, merge
from remend.models.device import choose_dtype, mixed_precision
from remend.models.find import ModelSource, find_model, hash_files
from remend.models.load import load_model, save_model
from remend.models.scorer import Scorer, scorer
from remend.recovery.judge import HeldOut, Judge, summarize
from remend.recovery.pools import repair_answers
from remend.recovery.preflight import Preflight
from remend.recovery.prompts import keep_apart, prepare
from remend.recovery.repair import Questions, Repaired, repair
from remend.recovery.self_prompts import generate
from remend.recovery.settings import BASE, SELF, RecoverConfig
from remend.recovery.streams import SELF_PROMPTS, reference_of
from remend.recovery.tracking import Tracker, figures_of
from remend.recovery.training import Training, learning_rate
from remend.report import write_report
from remend.training.constraints import Constraint, freeze_healthy_embeddings, kind_of
from remend.training.loop import restore_masters
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import AdapterOff, Teacher, policy_of


class Recovery:
    """One recovery: holds what its stages share.

    Args:
        config: the settings.
        checked: what preflight found.
        directory: a run to continue; None starts one.
        began: time.monotonic() when the user's command began, for `seconds`.
    """

    def __init__(self, config: RecoverConfig, checked: Preflight, directory: RunDirectory | None, began: float) -> None:
        self.config, self.checked = config, checked
        self.began = began
        assert checked.student is not None
        self.student_source = checked.student
        self.dtype = choose_dtype(config.dtype, checked.device)
        self.accelerator = Accelerator(
            cpu=checked.device.type == "cpu",
            log_with=config.report_to,
            project_dir=config.out if config.report_to else None,
            # the others wait while one process measures and samples, which may take longer than the usual ten minutes
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
        # creating the Accelerator joined all processes, so none still looks whether `out` is free
        self.directory = directory or RunDirectory(Path(config.out))
        if self.accelerator.is_main_process:
            inputs = self._inputs()
            if directory is None:
                self._create(inputs)
            else:
                _same_inputs(directory, inputs)

    def _inputs(self) -> dict[str, Any]:
        main = self.checked.main.stream.teacher
        with stage("hashing the models' files"):
            hashes: dict[str, Any] = {"student": hash_files(self.student_source)}
            for name, source in self.checked.teachers.items():
                hashes["teacher" if source is self.checked.teacher else f"teacher {name}"] = hash_files(source)
            if reference_of(self.config) == BASE:
                hashes["teacher"] = hash_files(self.student_source.base or self.student_source)
            for name, cache in self.checked.caches.items():
                hashes["teacher" if name == main else f"teacher {name}"] = cache.record["files"]
        return {"models": hashes, "data": self.checked.data_hashes}

    def _create(self, inputs: Mapping[str, Any]) -> None:
        config, checked, surroundings = self.config, self.checked, environment()
        recipe = config.model_dump()
        counts = {s.stream.name: {"train": len(s.train), "held_out": len(s.held_out)} for s in checked.streams}
        manifest = {
            "kind": "recover",
            "recipe": recipe,
            "reference": reference_of(config),
            "answer_tokens": checked.main.stream.lengths[1],
            "kl_direction": self._directions(),
            "seeds": {"seed": config.seed},
            **inputs,
            "prompts": counts[checked.main.stream.name],
            "streams": counts,
            "dropped": checked.dropped,
            "shared_vocabulary": checked.shared,
            "constraint": checked.constraint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "warnings": checked.warnings,
            "notes": checked.notes,
            **surroundings,
        }
        directory = RunDirectory.create(Path(config.out))
        write_text(directory.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        write_json(directory.path / MANIFEST, manifest)

    def _directions(self) -> str:
        return "; ".join(dict.fromkeys(s.stream.loss.words for s in self.checked.streams))

    def run(self) -> RunDirectory:
        """All stages in order."""
        student = self._load(self.student_source, torch.float32)
        known = self._teachers(student)
        reference = known[reference_of(self.config)]
        self._write_prompts(reference)
        facts = self.checked.facts
        kind_of(facts).check(student, facts)
        # one process measures, writes and saves; the others only share the steps
        main = self.accelerator.is_main_process
        judge = Judge(reference, self.checked, self.config, self.directory) if main else None
        baseline = judge.baseline(student) if judge else None
        tracker = self._tracker(reference, judge)
        if baseline:
            self._note(tracker, student, 0, "degraded", figures_of(baseline.on_reference))
        self.accelerator.wait_for_everyone()
        initial = self._initial(student)
        repaired = self._repair(student, reference)
        if judge and repaired.seconds:
            self.directory.note_seconds("repair", repaired.seconds)
            after = judge.after_repair(student, repaired.seconds, repaired.answers)
        if repaired.seconds and not self._repair_helped():
            self._take_back(student)
            repaired = Repaired()
        elif judge and repaired.seconds:
            if self.config.bootstrap == "repair":
                repair_answers(self.directory, self.checked.main, self.checked.tokenizer, repaired.answers)
            self._note(tracker, student, 0, "repaired", figures_of(after))
        if not repaired.seconds:
            initial = None  # nothing has changed since: the trainable parameters are the initial ones
        constraint = self._constraint(student, reference, repaired)
        del repaired  # its masters are as large as the model, and the constraint has its own
        training = Training(
            self.config,
            self.checked,
            self.directory,
            self.accelerator,
            mixed_precision(self.dtype, self.accelerator.device),
            known=known,
            student=student,
            constraint=constraint,
            initial=initial,
            judge=judge,
            tracker=tracker,
            baseline_kl=baseline.figures()["kl"] if baseline else None,
        )
        del initial
        outcome = training.run()
        if judge and baseline:
            self._save(student, constraint)
            del student, constraint, training
            saved = self._reopened(reference)
            recovered = judge.final(saved)
            self._note(tracker, saved, outcome["selected"]["step"], "recovered", figures_of(recovered.on_reference))
            self._finish(baseline, recovered, outcome)
        self.accelerator.wait_for_everyone()
        return self.directory

    def _tracker(self, reference: Teacher | TeacherCache, judge: Judge | None) -> Tracker | None:
        if not self.config.diagnose_every or judge is None or not isinstance(reference, Scorer):
            return None
        return self._new_tracker(reference, judge)

    def _new_tracker(self, reference: Scorer, judge: Judge) -> Tracker:
        options: dict[str, Any] = {"seed": self.config.seed}
        return Tracker(reference, judge.completions, self.directory, layer_map=self.checked.layer_map, **options)

    def _note(self, tracker: Tracker | None, model: Any, step: int, name: str, figures: Mapping[str, Any]) -> None:
        if tracker and not tracker.measured(step, name):
            with stage(f"comparing the layers of the {name} model"):
                tracker.note(scorer(model, self.checked.shared), step, name, figures)

    def track(self) -> list[dict[str, Any]]:
        """Measure what track.jsonl lacks: the student as it came in, the checkpoints that are kept, the saved model.

        Raises InputError where the reference is a cache, which has no layers, or the student's own base.
        """
        student = self._load(self.student_source, torch.float32)
        reference = self._teachers(student)[reference_of(self.config)]
        if not isinstance(reference, Scorer):
            kind = "a cache, which has no layers" if isinstance(reference, TeacherCache) else "no model of its own"
            raise InputError(f"the reference of this run is {kind} to compare with")
        judge = Judge(reference, self.checked, self.config, self.directory)
        tracker = self._new_tracker(reference, judge)
        parts = scorer(student, self.checked.shared)
        self._note(tracker, student, 0, "degraded", judge.quick(parts))
        saved = [c for c in self.directory.checkpoints() if not tracker.measured(c.step, "training")]
        if saved:
            constraint = self._constraint(student, reference, Repaired())
            for checkpoint in saved:
                restore_masters(checkpoint, constraint)
                self._note(tracker, student, checkpoint.step, "training", judge.quick(parts))
        if (self.directory.path / SUMMARY).is_file():
            model = self._load_saved()
            steps = read_json(self.directory.path / SUMMARY)["selected"]["step"]
            self._note(tracker, model, steps, "recovered", judge.quick(scorer(model, self.checked.shared)))
        return tracker.sorted_rows()

    def _teachers(self, student: Any) -> dict[str, Teacher | TeacherCache]:
        # a GPU's memory is dear, so its teacher is held in bfloat16; a CPU's measures in float32
        dtype = self.dtype if self.accelerator.device.type == "cuda" else torch.float32
        known: dict[str, Teacher | TeacherCache] = dict(self.checked.caches)
        if reference_of(self.config) == BASE:
            known[BASE] = AdapterOff(scorer(student, self.checked.shared))
        for name, source in self.checked.teachers.items():
            known[name] = scorer(self._load(source, dtype).requires_grad_(False), self.checked.shared)
        return known

    def _load(self, source: ModelSource, dtype: torch.dtype) -> Any:
        with stage(f"loading {source.spec}"):
            return load_model(
                source, dtype=dtype, device=self.accelerator.device, trust_remote_code=self.config.trust_remote_code
            )

    def _load_saved(self) -> Any:
        return self._load(find_model(str(self.directory.path / "model")), torch.float32)

    def _reopened(self, reference: Teacher | TeacherCache) -> Any:
        """The saved model; a reference that is its base moves over to it, so that the trained student can go."""
        if not isinstance(reference, AdapterOff):
            return self._load_saved()
        reference.student = replace(reference.student, model=None)  # type: ignore[arg-type]
        saved = self._load_saved()
        # what was merged has no base any more
        based = saved if is_adapted(saved) else self._load(self.student_source, torch.float32)
        reference.student = scorer(based, self.checked.shared)
        return saved

    def _write_prompts(self, reference: Teacher | TeacherCache) -> None:
        """Let the reference write the prompts of the streams that have none (data: self), once a run."""
        waiting = [s for s in self.checked.streams if s.unwritten]
        if not waiting:
            return
        path = self.directory.path / "prompts.jsonl"
        if self.accelerator.is_main_process and not path.is_file():
            assert not isinstance(reference, TeacherCache)
            model, worn = policy_of(reference)
            config, rows = self.config, self.config.batch_size * self.config.gradient_accumulation
            began, n = time.perf_counter(), config.self_prompts or min(SELF_PROMPTS, max(2, config.steps * rows))
            with worn, stage(f"the reference writes {n} prompts", n) as advance:
                tokenizer, shared = self.checked.tokenizer, self.checked.shared
                texts, _ = generate(
                    model, tokenizer, n=n, seed=config.seed, shared=shared, on_kept=lambda c: advance(c)
                )
            write_text(path, "".join(json_line({"prompt": text}) for text in texts))
            self.directory.note_seconds("prompts", time.perf_counter() - began)
        self.accelerator.wait_for_everyone()
        written = [example_of(row, str(path)) for row in self.directory.rows(path.name)]
        for data in waiting:
            prepare(data, self.config, self.checked.tokenizer, written, list(data.examples.values()))
            self.checked.dropped.update(data.dropped)
        wrong, said = keep_apart(self.checked.streams)  # two streams may have split the same prompts otherwise
        wrong = [problem for data in waiting for problem in data.problems] + wrong
        if wrong:
            raise InputError("\n".join(wrong))
        for warning in [warning for data in waiting for warning in data.warnings] + said:
            if warning not in self.checked.warnings:
                console.print(f"[yellow]warning[/]: {warning}", soft_wrap=True)
                self.checked.warnings.append(warning)
        if self.accelerator.is_main_process:
            self._note_prompts()

    def _note_prompts(self) -> None:
        """Into the manifest: how many prompts there are now, and their hashes."""
        path = self.directory.path / MANIFEST
        counts = {s.stream.name: {"train": len(s.train), "held_out": len(s.held_out)} for s in self.checked.streams}
        noted = {"prompts": counts[self.checked.main.stream.name], "streams": counts}
        written = {s.stream.name: dict(s.hashes) for s in self.checked.streams if s.stream.data == SELF}
        write_json(path, {**read_json(path), **noted, "self_prompts": written})

    def _initial(self, student: Any) -> dict[str, torch.Tensor] | None:
        """The weights as the student came in, where repair may change what a stream's teacher needs."""
        if self.config.lora is not None or not any(s.stream.teacher == "initial" for s in self.checked.streams):
            return None
        return {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}

    def _constraint(self, student: Any, reference: Teacher | TeacherCache, repaired: Repaired) -> Constraint:
        if self.config.lora is not None:
            settings = self.config.lora.model_dump()
            add_lora(student, **settings, seed=derive_seed(self.config.seed, "lora"), base=self.config.student)
        origin = reference.model if isinstance(reference, Scorer) else None
        facts = self.checked.facts
        if facts.compressed and not self.config.train_embeddings:
            freeze_healthy_embeddings(student, origin)
        rate = learning_rate(self.config, self.checked)
        return kind_of(facts).hold(student, facts, origin=origin, start=repaired.start, rate=rate)

    def _repair(self, student: Any, reference: Teacher | TeacherCache) -> Repaired:
        # a checkpoint holds what came of repair, so a resumed run need not do it again
        done = bool(self.directory.checkpoints()) or isinstance(reference, TeacherCache)
        if done or not self.config.repair or self.config.lora is not None or is_adapted(student):
            return Repaired()
        assert isinstance(reference, Scorer)
        checked, config = self.checked, self.config
        questions = Questions(checked.tokenizer, checked.main.train, config.repair_samples, config.seed, checked.shared)
        precision = mixed_precision(self.dtype, self.accelerator.device)
        return repair(student, reference.model, checked.facts, questions, precision)

    def _repair_helped(self) -> bool:
        """What the main process found on the held-out prompts; all processes follow it."""
        decided = [False]
        if self.accelerator.is_main_process:
            found = read_json(self.directory.path / REPAIR)
            decided = [found["kept"]]
            if not found["kept"]:
                console.print(
                    f"repair is undone: with it the held-out KL is {found['kl']:.3f}, above the student's own"
                )
        if self.accelerator.num_processes > 1:
            broadcast_object_list(decided)
        return decided[0]

    @torch.no_grad()
    def _take_back(self, student: Any) -> None:
        """The weights that the student came in with, in place: teachers may be views of it."""
        before = dict(self._load(self.student_source, torch.float32).named_parameters())
        for name, parameter in student.named_parameters():
            parameter.copy_(before[name])

    def _save(self, student: Any, constraint: Constraint) -> None:
        with stage("saving the model"), new_directory(self.directory.path / "model") as target:
            if self.config.merge:
                merge(student)
            save_model(student, self.checked.tokenizer, target)
            constraint.save(target)
            record = record_to_keep(self.student_source, self.checked.facts.recognised)
            if record and not is_adapted(student):
                write_json(target / RECORD, record)

    def _finish(self, baseline: HeldOut, recovered: HeldOut, outcome: Mapping[str, Any]) -> None:
        tokens = sum(row["tokens"] for row in self.directory.rows(METRICS) if "loss" in row)
        summary = {
            **summarize(baseline, recovered, self.config.seed),
            "kl_direction": of_beta(0.0).words,
            "training_loss": self._directions(),
            "constraint": self.checked.constraint,
            "repair": read_json(path) if (path := self.directory.path / REPAIR).is_file() else None,
            **outcome,
            "tokens_trained": tokens,
            "seconds": round(time.monotonic() - self.began, 1),
            "training_seconds": round(sum(self.directory.step_seconds().values()), 1),
            "peak_rss_mib": round(peak_rss_mib()),
            "held_out_prompts": len(self.checked.main.held_out),
            "warnings": self.checked.warnings,
            "notes": self.checked.notes,
        }
        write_report(self.directory.path, summary)
        write_json(self.directory.path / SUMMARY, summary)  # last: its presence says that the run is complete


def _same_inputs(directory: RunDirectory, inputs: Mapping[str, Any]) -> None:
    recorded = read_json(directory.path / MANIFEST)
    names = {**inputs["models"], "data": inputs["data"]}
    before = {**recorded["models"], "data": recorded["data"]}
    changed = [name for name, hashes in names.items() if before.get(name) != hashes]
    if changed:
        raise InputError(
            f"the files of {' and '.join(changed)} changed since the run in {directory.path} began, so it can't be "
            "continued as it was. Put them back, or start a new run with another out."
        )
