"""What the one loop is given to train a student: the step function, and who looks on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from remend.console import stage
from remend.data.order import derive_seed
from remend.files.atomic import JsonObject
from remend.models.device import free_bytes
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import Scorer, scorer
from remend.recovery.alignment import aligned
from remend.recovery.begin import Run
from remend.recovery.bootstrap import Gate
from remend.recovery.distillation import Distillation
from remend.recovery.estimate import Train
from remend.recovery.judge import Judge, SideJudge
from remend.recovery.memory import must_recompute
from remend.recovery.rounds import Rounds, Source
from remend.recovery.selection import SCORE, Selection, score
from remend.recovery.tracking import Observer, Tracker
from remend.training.constraints import Constraint
from remend.training.loop import Hook, Saving, Watch, train


def trained_parts(run: Run, student: CausalLM) -> Scorer:
    """The student as it is trained: layers are recomputed in the backward pass where the memory asks for it, and an
    adapter's dropout is on."""
    config, process = run.plan.config, run.accelerator.process_index
    drops = config.lora is not None and config.lora.dropout > 0
    dropout = derive_seed(config.seed, "dropout", process) if drops else None
    return scorer(student, run.plan.shared, checkpointing=_recomputes(run, student), dropout=dropout)


def step_function(run: Run, student: Scorer, sources: Sequence[Source], gate: Gate) -> Distillation:
    """The distillation of the streams, with the completions that each step takes."""
    config = run.plan.config
    precision = run.precision()
    rounds = Rounds(
        sources,
        TransformersSampler(
            student.model, run.plan.shared, eos_ids(student.model, run.plan.tokenizer), run.rows_at_once
        ),
        steps=config.steps,
        seed=config.seed,
        precision=precision,
        updates=config.updates_a_round,
        ends=run.plan.ends,
        process=run.accelerator.process_index,
        processes=run.accelerator.num_processes,
    )
    return Distillation(student, rounds, config.batch_size, precision, gate)


def hooks_of(
    run: Run,
    student: Scorer,
    observer: Observer,
    side: SideJudge,
    before: Mapping[str, Mapping[str, float]],
    selection: Selection,
) -> list[Hook]:
    """What looks at the student between steps. `before` are the figures of the side streams before training."""
    hooks: list[Hook] = []
    if run.plan.config.eval_every:
        goals = {run.prompts.main.stream.name: observer.degraded.figures()["kl"]}
        goals |= {name: side.goal(name, figures) for name, figures in before.items()}
        hooks.append(_evaluation_hook(run, student, observer.judge, side, selection, goals))
    if observer.tracker:
        hooks.append(_tracking_hook(run, student, observer.judge, observer.tracker))
    return hooks


def _recomputes(run: Run, student: CausalLM) -> bool:
    """The recipe's gradient_checkpointing, or what the free memory asks for. The step's result is the same."""
    config = run.plan.config
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    streams = run.prompts.streams
    prompts = [len(p.tokens) for s in streams for p in s.train] or [config.max_prompt_tokens]
    tokens = max(prompts) + max(max(s.stream.lengths) for s in streams)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    copies = sum({s.stream.teacher.name: s.stream.teacher.copies for s in streams}.values())
    text = student.config.get_text_config()
    free, itemsize = free_bytes(run.device), run.plan.dtype.itemsize
    train: Train = "adapter" if run.plan.facts.adapted else config.train
    return must_recompute(text, config.batch_size, tokens, trained, free, copies, itemsize, train)


def _evaluation_hook(
    run: Run, student: Scorer, judge: Judge, side: SideJudge, selection: Selection, before: Mapping[str, float]
) -> Hook:
    """Held-out measures of all streams every `eval_every` steps, and the score that selection goes by.

    `before` is what the score compares each stream with.
    """
    config, main = run.plan.config, run.prompts.main.stream.name
    weights = {name: source.stream.weight for name, source in side.sources.items()}

    def evaluate(step: int) -> Mapping[str, float] | None:
        last = config.selects == "best" and step in run.plan.ends
        if step % config.eval_every and not last:
            return None
        row = {f"eval/{key}": value for key, value in judge.quick(student).items()}
        now = {main: row["eval/kl"]}
        for name, figures in side.measure().items():
            row |= {f"eval/{name}/{key}": value for key, value in figures.items()}
            now[name] = side.goal(name, figures)
        if config.selects == "best" or config.patience or config.streams:
            row[SCORE] = score(before, now, {name: weights[name] for name in now})
            selection.seen(step, row[SCORE])
        return row

    return evaluate


def _tracking_hook(run: Run, student: Scorer, judge: Judge, tracker: Tracker) -> Hook:
    """Alignment of the layers every `diagnose_every` steps; the last step is measured as saved."""
    config = run.plan.config

    def diagnose(step: int) -> Mapping[str, float] | None:
        if step % config.diagnose_every or step == run.plan.ends[-1]:
            return None
        values = tracker.note(student, step, "training", judge.quick(student))
        known = [value for value in values if not math.isnan(value)]
        return {"eval/cka": sum(known) / len(known)} if known else None

    return diagnose


def train_student(
    run: Run,
    distillation: Distillation,
    constraint: Constraint,
    hooks: Sequence[Hook],
    stop: Callable[[], bool],
    repair: JsonObject | None,
) -> int:
    """The one loop over the step function; the number of steps done.

    `stop` is asked before the first step and after each; `repair` is what was said of one, which is saved.
    """
    config, plan = run.plan.config, run.plan
    objective = aligned(distillation, config, plan.facts.layer_map)
    if config.report_to:
        run.accelerator.init_trackers("remend", config=config.model_dump())
    with stage("training", plan.ends[-1], run.step) as advance:
        held_out = ""

        def on_step(row: Mapping[str, float]) -> None:
            advance(1, f"{held_out}loss {row['loss']:.3f}  {row['tokens'] / row['seconds']:.0f} tokens/s")

        def shown(hook: Hook) -> Hook:
            def look(step: int) -> Mapping[str, float] | None:
                nonlocal held_out
                row = hook(step)
                if row and "eval/kl" in row:
                    held_out = f"held-out KL {row['eval/kl']:.3f}  "
                return row

            return look

        steps = train(
            objective,
            constraint,
            run.accelerator,
            plan.optimization,
            Saving(
                run.directory,
                config.steps_a_checkpoint,
                config.keep_checkpoints,
                run.resumed,
                config.updates_a_round,
                first=bool(repair and repair["kept"] and config.steps_a_checkpoint),
                about=run.shared,
            ),
            watch=Watch([shown(hook) for hook in hooks], on_step, stop),
            follower=objective,
        )
    if config.report_to:
        run.accelerator.end_training()
    return steps
