"""TRL's DistillationTrainer 1.16 on a degraded student, measured as remend's runs are. Called by time_to_recover.py.

Leaves timing.jsonl, metrics.jsonl (held-out KL) and summary.json in --out, in the form of a remend run. The clock of a
step runs from the end of the one before to its own end, sampling included; measuring is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch

from remend.compression.grids import decode, encode
from remend.compression.stored_grid import StoredGrid
from remend.data.examples import load_examples
from remend.data.order import derive_seed
from remend.data.templates import encode as encode_prompt
from remend.files.atomic import write_json
from remend.files.run_directory import METRICS, SUMMARY, RunDirectory
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.answers import answer, answered_once
from remend.models.sampling.rollout import Draws, Rollout
from remend.models.scorer import scorer
from remend.training.measure import compare, pool
from remend.training.teachers.frozen import Frozen


class Held:
    """Measures on the same held-out prompts, reference answers and seeds as remend's runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, source = options, find_model(options.reference)
        self.device = torch.device(options.device)
        self.tokenizer = load_tokenizer(source)
        self.teacher = self.load(options.reference)
        self.prompts = [encode_prompt(self.tokenizer, e) for e in load_examples(options.held_out)]
        place = RunDirectory(Path(options.answers))
        self.answers = answered_once(
            place, "reference.jsonl", self.prompts, self.tokenizer, lambda: self._said(self.teacher, 0)
        )

    def load(self, model: str) -> Any:
        """A model in float32, frozen."""
        loaded = load_model(find_model(model), dtype=torch.float32, device=self.device)
        return loaded.requires_grad_(False)

    def _said(self, model: Any, temperature: float) -> list[Rollout]:
        seeds = [derive_seed(self.options.seed, "held-out", i) for i in range(len(self.prompts))]
        how = Draws(temperature, seeds)
        return answer(
            model, self.tokenizer, self.prompts, "held-out prompts", max_new_tokens=self.options.tokens, draws=how
        )

    def kl(self, model: Any) -> float:
        """On the reference's answers, in float32 also where accelerate has wrapped the forward pass in autocast."""
        wrapped = vars(model).pop("forward", None)
        try:
            return float(pool(compare(scorer(model), Frozen(scorer(self.teacher)), self.answers))["kl"])
        finally:
            if wrapped is not None:
                model.forward = wrapped

    def both(self, model: Any) -> dict[str, float]:
        """On the reference's answers and on the model's own samples."""
        own = compare(scorer(model), Frozen(scorer(self.teacher)), self._said(model, 1.0))
        return {"kl": self.kl(model), "kl_on_policy": float(pool(own)["kl"])}


def watch(held: Held, model: Any, files: RunDirectory, every: int) -> Any:
    """A callback that times the steps and measures every few of them."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        mark = 0.0

        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.mark = time.perf_counter()

        def on_step_end(self, arguments: object, state: Any, *args: object, **kwargs: object) -> None:
            spent, step = time.perf_counter() - self.mark, state.global_step
            files.append("timing.jsonl", {"step": step, "seconds": round(spent, 4)})
            if step % every == 0:
                files.append(METRICS, {"step": step, "eval/kl": held.kl(model)})
            self.mark = time.perf_counter()

    return Watch()


def train(options: argparse.Namespace) -> None:
    """Train, and measure before, on the way and after."""
    from datasets import Dataset
    from trl import DistillationTrainer

    held, files = Held(options), RunDirectory.create(Path(options.out))
    model = held.load(options.student).requires_grad_(True)
    degraded = held.both(model)
    rows = [e.prompt for e in load_examples(options.data)]
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in rows]
    trainer = DistillationTrainer(
        model=model,
        teacher_model=held.load(options.reference),  # its own: the trainer wraps it, and measuring wants it as it is
        args=settings(options),
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
        processing_class=held.tokenizer,
        callbacks=[watch(held, model, files, options.every)],
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # measured in float32, as remend's are
    model.eval()
    summary: dict[str, Any] = {"steps": options.steps, "degraded": degraded, "recovered": held.both(model)}
    summary["versions"] = {"trl": importlib.metadata.version("trl")}
    if round_again(model, Path(options.student)):
        summary["rounded"] = held.both(model)
    write_json(files.path / SUMMARY, summary)


def settings(options: argparse.Namespace) -> Any:
    """TRL's configuration."""
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=f"{options.out}/trl",
        use_cpu=options.device == "cpu",
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        max_steps=options.steps,
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=options.warmup,
        max_completion_length=options.tokens,
        temperature=1.0,
        beta=0.0,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        seed=options.seed,
    )


@torch.no_grad()
def round_again(model: Any, student: Path) -> bool:
    """Put every matrix of the student's grid back onto it, where it has one."""
    grid, weights = StoredGrid.read(student), dict(model.named_parameters())
    if grid is None:
        return False
    for name, (_, scales) in grid.matrices.items():
        weights[name].copy_(decode(encode(weights[name].float().cpu(), scales, grid.format), scales, grid.format))
    return True


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "reference", "data", "held-out", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--answers", required=True, help="a directory whose reference.jsonl is used, or made")
    for name in ("steps", "every", "rows", "tokens", "warmup", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
