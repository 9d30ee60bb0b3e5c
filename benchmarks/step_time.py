"""One training step of remend against one of TRL's DistillationTrainer 1.16: seconds and peak memory.

    pip install -e '.[bench]'
    python benchmarks/step_time.py [--rounds 3] [--steps 4] [--prompts 8] [--trl-checkpointing]

Both sides distil the same float32 SmolLM2-135M-Instruct into a copy of itself on the same prompts: sample from the
student at temperature 1, exactly `new-tokens` tokens a prompt (no early end, so that lengths are equal), forward KL
over the full vocabulary at the completion tokens, clip, AdamW. Each side runs in its own process; the sides alternate.
The first step of a process is left out: it pays for allocation. Peak memory is the process's largest resident set.

remend recomputes layers in the backward pass (gradient_checkpointing: true), which costs it time and saves memory; TRL
runs without, which is faster for it, or with --trl-checkpointing as its default is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEARNING_RATE = 1e-4


def prompts() -> list[str]:
    """The bundled training prompts."""
    path = Path(__file__).parent.parent / "src" / "remend" / "data" / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["prompt"] for row in rows if row["split"] == "train"]


def side_remend(model_dir: str, options: argparse.Namespace, work: str) -> list[float]:
    """Seconds of each step."""
    import torch
    from accelerate import Accelerator

    from remend.data.examples import Example
    from remend.data.order import Order
    from remend.data.templates import encode
    from remend.files.run_directory import RunDirectory
    from remend.files.settings import build
    from remend.models.device import mixed_precision
    from remend.models.find import find_model
    from remend.models.load import load_model, load_tokenizer
    from remend.models.sampling.transformers_engine import TransformersSampler
    from remend.models.scorer import scorer
    from remend.recovery.distillation import Distillation
    from remend.recovery.rounds import Rounds, Source
    from remend.recovery.settings import RecoverConfig
    from remend.recovery.streams import resolve
    from remend.training.constraints import Free
    from remend.training.loop import Optimization, Saving, Watch, train
    from remend.training.teachers.frozen import Frozen

    files, cpu = find_model(model_dir), torch.device("cpu")
    tokenizer = load_tokenizer(files)
    student = load_model(files, dtype=torch.float32, device=cpu)
    teacher = load_model(files, dtype=torch.float32, device=cpu).requires_grad_(False)
    encoded = [encode(tokenizer, Example(str(i), p, {})) for i, p in enumerate(prompts())]
    accelerator = Accelerator(cpu=True)
    parts = scorer(student, checkpointing=not options.no_checkpointing)
    recipe = {"student": "s", "teacher": "t", "data": "d", "out": "o", "max_new_tokens": options.new_tokens}
    (stream,) = resolve(build(RecoverConfig, recipe, "benchmark"))
    precision = mixed_precision(torch.float32, cpu)
    source = Source(stream, Frozen(scorer(teacher)), Order(encoded, 0), rows=options.prompts)
    sampler = TransformersSampler(student, parts.shared, ())  # no end: every rollout is full length
    rounds = Rounds([source], sampler, options.steps + 1, seed=0, precision=precision)
    objective = Distillation(parts, rounds, options.prompts, precision)
    seconds: list[float] = []
    saving = Saving(RunDirectory.create(Path(work) / "run"), 0, 1)
    optimization = Optimization(options.steps + 1, LEARNING_RATE, 0)
    watch = Watch(on_step=lambda row: seconds.append(row["seconds"]))
    train(objective, Free(student), accelerator, optimization, saving, watch=watch)
    return seconds


def side_trl(model_dir: str, options: argparse.Namespace, work: str) -> list[float]:
    """Seconds of each step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            self.marks.append(time.perf_counter())

        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.marks.append(time.perf_counter())

    settings = DistillationConfig(
        output_dir=f"{work}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=options.trl_checkpointing,
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.prompts,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        max_completion_length=options.new_tokens,
        generation_kwargs={"min_new_tokens": options.new_tokens},
        temperature=1.0,
        beta=0.0,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        seed=0,
    )
    clock = Clock()
    load = {"dtype": "float32"}
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, **load),
        teacher_model=AutoModelForCausalLM.from_pretrained(model_dir, **load),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts()]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[clock],
    )
    trainer.train()
    return [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]


def child(side: str, model_dir: str, options: argparse.Namespace) -> None:
    """Run one side and print its figures as the last line."""
    from remend.files.environment import peak_rss_mib

    with tempfile.TemporaryDirectory() as work:
        run = side_remend if side == "remend" else side_trl
        seconds = run(model_dir, options, work)
    print(json.dumps({"seconds": seconds[1:], "peak_mib": peak_rss_mib()}))


def save_model(directory: str) -> None:
    """The embedded model as a directory that both sides load."""
    import torch

    from remend.models.find import find_model
    from remend.models.load import load_model, load_tokenizer, save_model

    source = find_model("smollm2")
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    save_model(model, load_tokenizer(source), Path(directory))


def main() -> None:
    """Alternate the sides and print both, with their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--no-checkpointing", action="store_true", help="remend without gradient checkpointing")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL with its default, gradient checkpointing")
    parser.add_argument("--side", choices=["remend", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help="a saved model (default: the embedded one)")
    options = parser.parse_args()
    if options.side:
        child(options.side, options.model_dir, options)
        return
    with tempfile.TemporaryDirectory() as directory:
        model_dir = options.model_dir or directory
        if not options.model_dir:
            save_model(directory)
        results: dict[str, list[dict[str, object]]] = {"remend": [], "trl": []}
        for number in range(options.rounds):
            for side in ("remend", "trl") if number % 2 == 0 else ("trl", "remend"):
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--model-dir", model_dir]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
                )
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
                results[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(f"round {number + 1} {side:>6}: {results[side][-1]}", flush=True)
    report(results)


def report(results: dict[str, list[dict[str, object]]]) -> None:
    """Medians and ratios."""
    seconds = {s: statistics.median(t for r in rows for t in r["seconds"]) for s, rows in results.items()}  # type: ignore[attr-defined]
    memory = {s: max(float(r["peak_mib"]) for r in rows) for s, rows in results.items()}  # type: ignore[arg-type]
    for side in ("remend", "trl"):
        print(f"{side:>6}: {seconds[side]:.2f} s a step (median), {memory[side]:.0f} MiB peak")
    time_ratio, memory_ratio = (figures["remend"] / figures["trl"] for figures in (seconds, memory))
    print(f" ratio: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")


if __name__ == "__main__":
    main()
