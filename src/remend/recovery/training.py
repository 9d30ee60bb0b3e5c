"""From a repaired student to a trained one: sources, gate, evaluation and selection over the one loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from remend.console import console, stage
from remend.files.run_directory import METRICS, TIMING, TRACK
from remend.models.device import free_bytes
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import Scorer, scorer
from remend.recovery.alignment import aligned
from remend.recovery.begin import Run
from remend.recovery.bootstrap import GATE, Gate, bootstrap_budget, repair_budget, reuses_repair
from remend.recovery.distillation import Distillation
from remend.recovery.judge import Judge, SideJudge, gate_verdict, side_judge_of
from remend.recovery.memory import must_recompute
from remend.recovery.pools import build_sources, repair_answers, with_pools
from remend.recovery.rounds import Rounds, Source
from remend.recovery.selection import SCORE, Selection, score
from remend.recovery.tracking import Tracker
from remend.training.constraints import Constraint
from remend.training.loop import Hook, Optimization, Saving, Watch, train
from remend.training.teachers import Teacher


def train_student(
    run: Run,
    student: CausalLM,
    constraint: Constraint,
    teachers: Mapping[str, Teacher],
    initial: Mapping[str, Tensor] | None,
    judge: Judge | None,
    tracker: Tracker | None,
    kl_before: float | None,
) -> dict[str, Any]:
    """Train, and put the selected weights in place; what the summary says of it.

    Args:
        teachers: those that are loaded; views of the student are made here.
        initial: trainable parameters as the student came in, where repair has changed them.
        judge, kl_before: measure the main stream, in the main process; else None.
        tracker: measures the layers, where the recipe asks for it.
    """
    config = run.plan.config
    recompute = _recomputes(run, student)
    parts = scorer(student, run.plan.shared, checkpointing=recompute)
    sources = build_sources(run, parts, teachers, initial)
    _rewind(run)
    side = side_judge_of(run, sources, parts) if judge else None
    selection = Selection(run.directory, constraint, config.selects == "best", config.patience)

    before = side.baseline() if side else {}
    answers = repair_answers(run) if reuses_repair(config, [s.stream for s in run.plan.streams]) else []
    gate = _gate(run, student, judge, side, len(answers))
    bootstrapping = gate.budget if gate.mode != "off" and gate.shut_once else 0
    if config.bootstrap == "repair":
        said = f"steps 1 to {bootstrapping} train on the {len(answers)} answers that repair was fitted to"
        console.print(said if bootstrapping else "no repair was kept, so every step is on-policy")
    with run.accelerator.main_process_first():  # it samples the pools, the others read them
        sources = with_pools(run, sources, parts.shared, bootstrapping=bootstrapping, answers=answers)

    hooks: list[Hook] = []
    if judge and side and config.eval_every:
        hooks.append(_evaluation_hook(run, parts, judge, side, selection, kl_before or 0.0))
    if judge and tracker:
        hooks.append(_tracking_hook(run, parts, judge, tracker))
    objective = _objective(run, student, parts, sources, gate)
    steps = _loop(run, objective, constraint, hooks, selection)
    chosen = selection.restore() if judge else None
    after = side.measure() if side else {}
    return {
        "steps": steps,
        "learning_rate": run.plan.learning_rate,
        "gradient_checkpointing": recompute,
        "selected": chosen or {"step": steps},
        "streams": {name: {"before": before[name], "after": after[name]} for name in before},
    }


def _recomputes(run: Run, student: CausalLM) -> bool:
    """The recipe's gradient_checkpointing, or what the free memory asks for. The step's result is the same."""
    config = run.plan.config
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    streams = run.plan.streams
    prompts = [len(p.tokens) for s in streams for p in s.train] or [config.max_prompt_tokens]
    tokens = max(prompts) + max(max(s.stream.lengths) for s in streams)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    copies = sum({s.stream.teacher.name: s.stream.teacher.copies for s in streams}.values())
    text = student.config.get_text_config()
    return must_recompute(text, config.batch_size, tokens, trained, free_bytes(run.device), copies)


def _rewind(run: Run) -> None:
    """Drop what an interrupted run wrote after its last checkpoint: it will be made again."""
    if run.main:
        for name in (METRICS, TIMING, GATE, TRACK):
            run.directory.rewind(name, run.step)
    run.wait()  # what is read from these files is read as rewound


def _gate(run: Run, student: CausalLM, judge: Judge | None, side: SideJudge | None, answers: int) -> Gate:
    """The gate, asked once before the first step."""
    config = run.plan.config
    mode, budget = config.bootstrap, bootstrap_budget(config)
    if mode == "repair":
        budget = repair_budget(config, answers, run.accelerator.num_processes)
        mode = "on" if budget else "off"
    measure = (lambda: gate_verdict(student, judge, side)) if judge and side else None
    gate = Gate(mode, budget, measure, run.directory, run.accelerator)
    if config.steps and not run.resumed:  # a resumed run has decided, and its weights are not in place yet
        began, measured = time.perf_counter(), gate.measured
        gate(1)  # on the clock; what it measures later is part of its step's time
        if gate.measured != measured and run.main:
            run.directory.note_seconds("gate", time.perf_counter() - began)
    return gate


def _evaluation_hook(
    run: Run, student: Scorer, judge: Judge, side: SideJudge, selection: Selection, kl_before: float
) -> Hook:
    """Held-out measures of all streams every `eval_every` steps, and the score that selection goes by."""
    config, main = run.plan.config, run.plan.main.stream.name
    weights = {name: source.stream.weight for name, source in side.sources.items()}

    def evaluate(step: int) -> Mapping[str, float] | None:
        last = config.selects == "best" and step == config.steps
        if step % config.eval_every and not last:
            return None
        row = {f"eval/{key}": value for key, value in judge.quick(student).items()}
        before, now = {main: kl_before}, {main: row["eval/kl"]}
        for name, figures in side.measure().items():
            row |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            before[name], now[name] = side.goal(name, side.baseline()[name]), side.goal(name, figures)
        if config.selects == "best" or config.patience or config.streams:
            row[SCORE] = score(before, now, {name: weights[name] for name in now})
            selection.seen(step, row[SCORE])
        return row

    return evaluate


def _tracking_hook(run: Run, student: Scorer, judge: Judge, tracker: Tracker) -> Hook:
    """Alignment of the layers every `diagnose_every` steps; the last step is measured as saved."""
    config = run.plan.config

    def diagnose(step: int) -> Mapping[str, float] | None:
        if step % config.diagnose_every or step == config.steps:
            return None
        values = tracker.note(student, step, "training", judge.quick(student))
        known = [value for value in values if not math.isnan(value)]
        return {"eval/cka": sum(known) / len(known)} if known else None

    return diagnose


def _objective(run: Run, student: CausalLM, parts: Scorer, sources: Sequence[Source], gate: Gate) -> Distillation:
    config = run.plan.config
    precision = run.precision()
    rounds = Rounds(
        sources,
        TransformersSampler(student, run.plan.shared, eos_ids(student, run.plan.tokenizer)),
        steps=config.steps,
        seed=config.seed,
        precision=precision,
        updates=config.updates_a_round,
        process=run.accelerator.process_index,
        processes=run.accelerator.num_processes,
    )
    return Distillation(parts, rounds, config.batch_size, precision, gate)


def _loop(
    run: Run, distillation: Distillation, constraint: Constraint, hooks: Sequence[Hook], selection: Selection
) -> int:
    """The one loop over the step function; the number of steps done."""
    config, plan = run.plan.config, run.plan
    objective = aligned(distillation, config, plan.facts.layer_map)
    if config.report_to:
        run.accelerator.init_trackers("remend", config=config.model_dump())
    with stage(f"recovering ({plan.directions})", config.steps, run.step) as advance:

        def on_step(row: Mapping[str, float]) -> None:
            advance(1, f"loss {row['loss']:.3f}  {row['tokens'] / row['seconds']:.0f} tokens/s")

        steps = train(
            objective,
            constraint,
            run.accelerator,
            Optimization(
                config.steps,
                plan.learning_rate,
                config.warmup_steps,
                config.final_learning_rate,
                config.weight_decay,
                config.max_grad_norm,
            ),
            Saving(run.directory, config.save_every, config.keep_checkpoints, run.resumed),
            watch=Watch(hooks, on_step, selection.stop),
            follower=objective,
        )
    if config.report_to:
        run.accelerator.end_training()
    return steps
