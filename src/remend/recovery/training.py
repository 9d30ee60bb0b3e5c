"""The training part of a recovery: teachers, their completions, gate, evaluation and selection over the one loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator

from remend.console import console, stage
from remend.files.run_directory import METRICS, TIMING, TRACK, RunDirectory
from remend.models.device import free_bytes
from remend.models.layers import infer_layer_map
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import Scorer, scorer
from remend.models.tokens import eos_ids
from remend.recovery.alignment import Alignment, pairs_of
from remend.recovery.bootstrap import GATE, Gate, Verdict, judge_rollouts
from remend.recovery.distillation import Distillation, Lane
from remend.recovery.judge import Judge
from remend.recovery.memory import must_recompute
from remend.recovery.pools import build_lanes, repair_answers, with_pools
from remend.recovery.preflight import Preflight
from remend.recovery.selection import SCORE, Selection, score
from remend.recovery.settings import RecoverConfig
from remend.recovery.side_streams import SideStreams
from remend.recovery.streams import bootstrap_budget, repair_budget, reuses_repair
from remend.recovery.tracking import Tracker
from remend.training.constraints import Constraint, kind_of
from remend.training.loop import Hook, Optimization, Saving, Watch, train
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import Teacher

GATE_PROMPTS = 16
"""Held-out prompts that the gate lets the student answer."""


def learning_rate(config: RecoverConfig, checked: Preflight) -> float:
    """The recipe's learning rate, or the one for what is trained."""
    if config.learning_rate is not None:
        return config.learning_rate
    return kind_of(checked.facts).learning_rate(checked.facts, repaired=checked.repairs)


class Training:
    """From a repaired student to a trained one. See remend.recovery.stages for the whole.

    Args:
        config, checked, directory, accelerator: of the run.
        precision: context of the forward passes.
        known: frozen teachers and caches by name.
        student, constraint: the model and what it is held to.
        initial: trainable parameters as the student came in, where repair has changed them.
        judge, baseline_kl: measure the main stream, in the main process; else None.
        tracker: measures the layers, where the recipe asks for it.
    """

    def __init__(
        self,
        config: RecoverConfig,
        checked: Preflight,
        directory: RunDirectory,
        accelerator: Accelerator,
        precision: AbstractContextManager[Any],
        *,
        known: Mapping[str, Teacher | TeacherCache],
        student: Any,
        constraint: Constraint,
        initial: Mapping[str, Any] | None,
        judge: Judge | None,
        tracker: Tracker | None,
        baseline_kl: float | None,
    ) -> None:
        self.config, self.checked, self.directory, self.accelerator = config, checked, directory, accelerator
        self.precision, self.student, self.constraint = precision, student, constraint
        self.judge, self.tracker, self.baseline_kl = judge, tracker, baseline_kl
        self.rate = learning_rate(config, checked)
        self.recompute = self._recompute()
        self.parts = scorer(student, checked.shared, checkpointing=self.recompute)
        self.lanes = build_lanes(
            checked.streams, config, self.parts, known, initial=initial, processes=accelerator.num_processes
        )
        saved = directory.checkpoints()
        self.resume = saved[-1] if saved else None
        self.done = self.resume.step if self.resume else 0
        if accelerator.is_main_process:
            for name in (METRICS, TIMING, GATE, TRACK):
                directory.rewind(name, self.done)
        accelerator.wait_for_everyone()  # what is read from these files is read as rewound
        self.side = SideStreams(self.lanes, checked, config, self.parts, directory) if judge else None
        self.selection = Selection(directory, constraint, config.selects == "best", config.patience)

    def _recompute(self) -> bool:
        """The recipe's gradient_checkpointing, or what the free memory asks for. The step's result is the same."""
        if self.config.gradient_checkpointing is not None:
            return self.config.gradient_checkpointing
        streams = [s.stream for s in self.checked.streams]
        prompts = [len(p.tokens) for s in self.checked.streams for p in s.train] or [self.config.max_prompt_tokens]
        tokens = max(prompts) + max(max(stream.lengths) for stream in streams)
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        free = free_bytes(self.accelerator.device)
        copies = len({stream.teacher for stream in streams} & {"ema", "initial"})
        text = self.student.config.get_text_config()
        return must_recompute(text, self.config.batch_size, tokens, trained, free, copies)

    def run(self) -> dict[str, Any]:
        """Train, and put the selected weights in place; what the summary says of it."""
        config = self.config
        before = self.side.baseline() if self.side else {}
        answers = self._answers()
        gate = self._gate(len(answers))
        if config.steps and not self.resume:  # a resumed run has decided, and its weights are not in place yet
            self._ask(gate)
        budget = gate.budget if gate.mode != "off" and gate.shut_once else 0
        if config.bootstrap == "repair":
            said = f"steps 1 to {budget} train on the {len(answers)} answers that repair was fitted to"
            console.print(said if budget else "no repair was kept, so every step is on-policy")
        with self.accelerator.main_process_first():  # it samples the pools, the others read them
            lanes = with_pools(
                self.lanes,
                self.checked.streams,
                config,
                self.parts,
                self.directory,
                tokenizer=self.checked.tokenizer,
                bootstrapping=budget,
                answers=answers,
            )
        steps = self._train(lanes, gate)
        chosen = self.selection.restore() if self.judge else None
        after = self.side.measure() if self.side else {}
        return {
            "steps": steps,
            "learning_rate": self.rate,
            "gradient_checkpointing": self.recompute,
            "selected": chosen or {"step": steps},
            "streams": {name: {"before": before[name], "after": after[name]} for name in before},
        }

    def _ask(self, gate: Gate) -> None:
        """Before the first step, on the clock; what it measures later is part of its step's time."""
        began, measured = time.perf_counter(), gate.measured
        gate(1)
        if gate.measured != measured and self.accelerator.is_main_process:
            self.directory.note_seconds("gate", time.perf_counter() - began)

    def _answers(self) -> list[Rollout]:
        """What repair was fitted to, where training begins with it."""
        reused = reuses_repair(self.config, [s.stream for s in self.checked.streams])
        return repair_answers(self.directory, self.checked.main, self.checked.tokenizer) if reused else []

    def _gate(self, answers: int) -> Gate:
        mode, budget, measure = self.config.bootstrap, bootstrap_budget(self.config), self._examine
        if mode == "repair":
            budget = repair_budget(self.config, answers, self.accelerator.num_processes)
            mode = "on" if budget else "off"
        return Gate(mode, budget, measure if self.judge else None, self.directory, self.accelerator)

    def _examine(self) -> Verdict:
        assert self.judge is not None
        assert self.side is not None
        own, sums = self.judge.own_answers(self.student, GATE_PROMPTS, "the gate lets the student answer")
        found = judge_rollouts(own, sums, self.judge.completions[:GATE_PROMPTS]) if sums else Verdict([])
        for verdict in self.side.demonstration_gains():
            found = Verdict([*found.reasons, *verdict.reasons], {**found.figures, **verdict.figures})
        return found

    def _objective(self, lanes: Sequence[Lane], gate: Gate) -> Distillation:
        config, checked = self.config, self.checked
        ends = eos_ids(self.student, checked.tokenizer)
        return Distillation(
            student=self.parts,
            lanes=lanes,
            sampler=TransformersSampler(self.student, checked.shared, ends),
            steps=config.steps,
            micro_rows=config.batch_size,
            seed=config.seed,
            precision=self.precision,
            updates_per_rollout=config.updates_a_round,
            on_policy=gate,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            alignment=self._alignment(lanes),
        )

    def _alignment(self, lanes: Sequence[Lane]) -> Alignment | None:
        wanted, teacher = self.config.alignment, lanes[0].teacher
        if wanted is None or not isinstance(teacher, Scorer):  # preflight has refused other teachers
            return None
        placed = self.checked.layer_map or infer_layer_map(self.student, teacher.model)
        pairs = pairs_of(wanted.layers, placed)
        return Alignment(wanted.measure, wanted.weight, pairs, self.student, teacher.model)

    def _train(self, lanes: Sequence[Lane], gate: Gate) -> int:
        config, accelerator = self.config, self.accelerator
        objective = self._objective(lanes, gate)
        if config.report_to:
            accelerator.init_trackers("remend", config=config.model_dump())
        title = "; ".join(dict.fromkeys(lane.stream.loss.words for lane in lanes))
        with stage(f"recovering ({title})", config.steps, self.done) as advance:

            def on_step(row: Mapping[str, float]) -> None:
                advance(1, f"loss {row['loss']:.3f}  {row['tokens'] / row['seconds']:.0f} tokens/s")

            steps = train(
                objective,
                self.constraint,
                accelerator,
                Optimization(
                    config.steps,
                    self.rate,
                    config.warmup_steps,
                    config.final_learning_rate,
                    config.weight_decay,
                    config.max_grad_norm,
                ),
                Saving(self.directory, config.save_every, config.keep_checkpoints, self.resume),
                watch=Watch(self._hooks(), on_step, self.selection.stop),
                follower=objective,
            )
        if config.report_to:
            accelerator.end_training()
        return steps

    def _hooks(self) -> list[Hook]:
        found: list[Hook] = [self._evaluate] if self.judge and self.config.eval_every else []
        return [*found, self._diagnose] if self.tracker else found

    def _diagnose(self, step: int) -> Mapping[str, float] | None:
        """The hook: alignment of the layers on the way; the last step is measured as saved."""
        if step % self.config.diagnose_every or step == self.config.steps:
            return None
        assert self.judge is not None
        assert self.tracker is not None
        values = self.tracker.note(self.parts, step, "training", self.judge.quick(self.parts))
        known = [value for value in values if not math.isnan(value)]
        return {"eval/cka": sum(known) / len(known)} if known else None

    def _evaluate(self, step: int) -> Mapping[str, float] | None:
        """The hook: held-out measures of all streams, and the score that selection goes by."""
        last = self.config.selects == "best" and step == self.config.steps
        if step % self.config.eval_every and not last:
            return None
        assert self.judge is not None
        assert self.side is not None
        main = self.checked.main.stream
        found = {f"eval/{key}": value for key, value in self.judge.quick(self.parts).items()}
        before, now = {main.name: self.baseline_kl or 0.0}, {main.name: found["eval/kl"]}
        for name, figures in self.side.measure().items():
            found |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            before[name], now[name] = self.side.goal(name, self.side.baseline()[name]), self.side.goal(name, figures)
        if self.config.selects == "best" or self.config.patience or self.config.streams:
            found[SCORE] = score(before, now, {s: self._weight(s) for s in now})
            self.selection.seen(step, found[SCORE])
        return found

    def _weight(self, name: str) -> float:
        return next(lane.stream.weight for lane in self.lanes if lane.stream.name == name)
