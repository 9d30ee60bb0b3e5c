"""Let a model answer prompts under a progress bar, and keep the answers in a run's directory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from remend.console import stage, warn
from remend.data.templates import Encoded
from remend.errors import FileError, shortened
from remend.files.atomic import json_line, write_text
from remend.files.reading import understood
from remend.files.run_directory import DAMAGED, RunDirectory
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.rollout import Draws, Rollout
from remend.models.sampling.transformers_engine import ROWS, TransformersSampler


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    title: str,
    *,
    max_new_tokens: int,
    shared: int | None = None,
    draws: Draws | None = None,
    shown: bool = False,
    rows: int = ROWS,
) -> list[Rollout]:
    """A model's completions of prompts, in order.

    Args:
        shared: only ids below it are sampled; None is the model's whole vocabulary.
        draws: None is greedy.
        shown: answer the teacher's prompts, where there are any.
        rows: that are sampled at once.
    """
    ids = model.get_output_embeddings().weight.shape[0] if shared is None else shared
    with stage(title, len(prompts)) as advance:
        sampler = TransformersSampler(model, ids, eos_ids(model, tokenizer), rows, on_rows=advance, shown=shown)
        draws = draws or Draws(0.0, [0] * len(prompts))
        return sampler(prompts, max_new_tokens=max_new_tokens, temperature=draws.temperature, seeds=draws.seeds)


def answered_once(
    directory: RunDirectory,
    name: str,
    prompts: Sequence[Encoded],
    tokenizer: Tokenizer,
    write: Callable[[], list[Rollout]],
) -> list[Rollout]:
    """Completions of `prompts` from the run's file `name`, or what `write` gives, put there for a resumed run.

    `write` is called only when the file lacks some, or is damaged, which is told.
    """
    path = directory.path / name
    try:
        if path.is_file() and [row.get("id") for row in directory.rows(name)] == [p.id for p in prompts]:
            return read_answers(directory, name, prompts)
    except FileError as error:
        warn(f"{error}; the answers are written again")
    write_answers(directory, name, tokenizer, write())
    return read_answers(directory, name, prompts)


def write_answers(directory: RunDirectory, name: str, tokenizer: Tokenizer, rollouts: Sequence[Rollout]) -> None:
    """Into JSON lines: id, completion (token ids), clipped, and the text to read."""
    rows = [
        {"id": r.id, "completion": list(r.completion), "clipped": r.clipped, "text": as_text(tokenizer, r)}
        for r in rollouts
    ]
    write_text(directory.path / name, "".join(map(json_line, rows)))


def read_answers(directory: RunDirectory, name: str, prompts: Sequence[Encoded]) -> list[Rollout]:
    """What `write_answers` put there, to these prompts in their order. Raises FileError for a damaged file."""
    with understood(directory.path / name, DAMAGED):
        pairs = zip(prompts, directory.rows(name), strict=True)
        return [
            Rollout(p.id, p.tokens, token_ids(row["completion"]), bool(row["clipped"]), p.shown) for p, row in pairs
        ]


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids as JSON gives them. Raises TypeError for anything else."""
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise TypeError(f"{shortened(value, 40)} is no list of token ids")
    return tuple(value)


def as_text(tokenizer: Tokenizer, rollout: Rollout) -> str:
    """A completion as text; … marks one that met the length limit."""
    text = tokenizer.decode(rollout.completion, skip_special_tokens=True)
    return text + (" …" if rollout.clipped else "")


def pieces(tokenizer: Tokenizer, completion: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens stands with its last one."""
    texts = [tokenizer.decode(completion[:end]).rstrip("\ufffd") for end in range(len(completion) + 1)]
    return [text[len(before) :] for before, text in itertools.pairwise(texts)]
