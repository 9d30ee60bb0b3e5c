"""Supervised fine-tuning as a step function: cross-entropy of given completions, and of nothing else.

A prompt's tokens are read and not trained on; the token that ends the answer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.state import is_initialized

from remend.console import stage
from remend.data.answers import with_answer
from remend.data.examples import Answer, Example
from remend.data.order import Order
from remend.data.templates import Refused, require_readable
from remend.errors import InputError
from remend.files.launch import refusals
from remend.files.run_directory import RunDirectory
from remend.maths.losses import chunked_cross_entropy_sum
from remend.models.device import chunk_rows
from remend.models.protocols import Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack
from remend.training.constraints import Constraint
from remend.training.loop import Optimization, Prepared, Saving, StepOutput, Watch, train

STREAM = "supervised"


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[Example, Answer]],
    *,
    max_tokens: int,
    eos: Sequence[int],
    rows: int | None = None,
) -> tuple[list[Rollout], list[str]]:
    """Tokenize prompts with their completions: (those that fit, ids of the ones that don't). None is cut.

    Args:
        tokenizer: the model's own.
        pairs: examples with their completions.
        max_tokens: of prompt and completion together.
        eos: ids at which sampling ends; the closing token belongs to the completion. See `with_answer`.
        rows: of the model's embedding, where they are known.

    Raises InputError that names every row that can't be trained on as the chat template shows it.
    """
    kept, dropped, refused = [], [], Refused()
    for example, answer in pairs:
        with refused.collecting(example.id):
            prompt, completion = with_answer(tokenizer, example, answer, eos)
            require_readable(tokenizer, prompt, rows)
            require_readable(tokenizer, completion, rows)
            if len(prompt) + len(completion) > max_tokens:
                dropped.append(example.id)
            else:
                kept.append(Rollout(example.id, prompt, completion, clipped=False))
    refused.raise_all()
    return kept, dropped


@dataclass
class Supervised:
    """The step function; see the module docstring.

    Args:
        student: model as body and head.
        order: which pairs come when; a Rollout here is a prompt with its given completion.
        batch_size, accumulation: pairs a micro-batch, micro-batches a step (and process).
        precision: context of the forward passes (mixed precision over float32 weights); entered many times.
        process, processes: this process's turn when several share a step.
    """

    student: Scorer
    order: Order[Rollout]
    batch_size: int
    accumulation: int
    precision: AbstractContextManager[object]
    process: int = 0
    processes: int = 1
    weights: Mapping[str, float] = field(default_factory=lambda: {STREAM: 1.0})

    def prepare(self, step: int) -> Prepared[Sequence[Rollout]]:
        """This step's pairs, cut into micro-batches."""
        size = self.batch_size * self.accumulation * self.processes
        mine = [pair for _, pair in self.order.take((step - 1) * size, size)][self.process :: self.processes]
        cut = [mine[at : at + self.batch_size] for at in range(0, len(mine), self.batch_size)]
        return Prepared(cut, {STREAM: sum(len(p.completion) for p in mine)}, [p.id for p in mine])

    def __call__(self, micro_batch: Sequence[Rollout]) -> StepOutput:
        """Sum of the cross-entropy at the micro-batch's completion tokens."""
        pairs = [(p.prompt, p.completion) for p in micro_batch]
        batch = pack(pairs, device=self.student.device)
        with self.precision:
            states_ND = self.student.states(batch)
            rows = chunk_rows(self.student.shared, self.student.device)
            total = chunked_cross_entropy_sum(states_ND, self.student.head, batch.targets_N, rows=rows)
        return StepOutput({STREAM: (total, len(batch.targets_N))})


def fit(
    objective: Supervised, constraint: Constraint, directory: RunDirectory, optimization: Optimization, title: str
) -> None:
    """Train from start to end in one process; `directory` gets the steps' rows, and no checkpoint.

    Raises TrainingError where loss or gradient is not finite, InputError for a configuration of accelerate's that is
    refused.
    """
    if problems := list(refusals()):
        raise InputError("\n".join(problems))
    # the first Accelerator of a process settles the device of all; this one only counts processes, so it may differ
    accelerator = Accelerator(cpu=objective.student.device.type == "cpu" and not is_initialized())
    with stage(title, optimization.steps) as advance:
        watch = Watch(on_step=lambda row: advance(1, f"loss {row['loss']:.3f}"))
        train(objective, constraint, accelerator, optimization, Saving(directory, every=0, keep=1), watch=watch)
