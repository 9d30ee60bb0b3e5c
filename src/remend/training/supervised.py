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
from remend.data.examples import Example
from remend.data.order import Order
from remend.data.templates import encode
from remend.files.run_directory import RunDirectory
from remend.maths.losses import chunked_cross_entropy_sum
from remend.models.device import chunk_rows
from remend.models.protocols import Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack
from remend.training.constraints import Constraint
from remend.training.loop import Optimization, Prepared, Saving, StepOutput, Watch, train

STREAM = "supervised"


def ending(tokenizer: Tokenizer, eos: Sequence[int]) -> tuple[int, ...]:
    """The token that closes an answer: what the chat template writes after one, else the tokenizer's own.

    Args:
        tokenizer: with or without a chat template.
        eos: the ids at which sampling ends; a template's ending counts only if it is one of them.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qq"}]
        _, _, rest = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("qq")
        closing = next((t for t in tokenizer.encode(rest, add_special_tokens=False) if t in eos), None)
        if closing is not None:
            return (int(closing),)
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Iterable[tuple[Example, str]], *, max_tokens: int, eos: Sequence[int]
) -> tuple[list[Rollout], list[str]]:
    """Tokenize prompts with their completions: (those that fit, ids of the ones that don't). None is cut.

    Args:
        tokenizer: the model's own.
        pairs: examples with the text of their completions.
        max_tokens: of prompt and completion together.
        eos: see `ending`; the closing token belongs to the completion.
    """
    close, plain = ending(tokenizer, eos), not tokenizer.chat_template
    kept, dropped = [], []
    for example, text in pairs:
        prompt = encode(tokenizer, example).tokens
        # where no template parts question from answer, a space does, unless either brings its own
        joint = " " if plain and not (str(example.prompt)[-1:].isspace() or text[:1].isspace()) else ""
        completion = (*tokenizer.encode(joint + text, add_special_tokens=False), *close)
        if len(prompt) + len(completion) > max_tokens:
            dropped.append(example.id)
        else:
            kept.append(Rollout(example.id, prompt, completion, clipped=False))
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

    Raises TrainingError where loss or gradient is not finite.
    """
    # the first Accelerator of a process settles the device of all; this one only counts processes, so it may differ
    accelerator = Accelerator(cpu=objective.student.device.type == "cpu" and not is_initialized())
    with stage(title, optimization.steps) as advance:
        watch = Watch(on_step=lambda row: advance(1, f"loss {row['loss']:.3f}"))
        train(objective, constraint, accelerator, optimization, Saving(directory, every=0, keep=1), watch=watch)
