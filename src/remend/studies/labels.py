"""Supervised fine-tuning as a stream: a teacher that puts all probability on the label.

Forward KL from such a teacher is the cross-entropy of the labels, so SFT runs through `remend recover` like every other
method: the student's grid or mask is held, and the same held-out prompts measure it. The labels are written in the
form of a cached teacher (training/teachers/cache.py) with k = 1: log p = 0 for the label, −inf for all other tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from remend.data.examples import COMPLETION_KEYS, Example, answer_of, load_examples
from remend.data.order import Order, derive_seed
from remend.data.templates import Encoded, encode_within
from remend.errors import InputError
from remend.files.atomic import JsonObject, new_directory, write_json
from remend.files.settings import Settings
from remend.files.signed import signed
from remend.maths.topk import TopK
from remend.models.device import choose_device, choose_dtype
from remend.models.find import find_model
from remend.models.load import eos_ids, load_config, load_model, load_tokenizer
from remend.models.protocols import Tokenizer
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Draws, Rollout
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import reference_of, resolve
from remend.training.supervised import encode_pairs
from remend.training.teachers.cache import PROMPTS, RECORD, VERSION
from remend.training.write_cache import read_by, write_scored

LABEL_TOKENS = 1024
"""A row with a longer prompt than the recipe allows and so many tokens more is left out, never cut."""


class LabelSettings(Settings):
    """What labels are written, beside what the recipe says of models and prompts."""

    task: str | None = Field(description="rows of the task with their demonstrations")
    share: float = Field(description="of the labels that are the task's")
    taught: int | None = Field(description="None takes the rows' own completions; else so many prompts are answered")


def write_labels(out: Path, recipe: RecoverConfig, settings: LabelSettings) -> JsonObject:
    """Write the labels that a cell trains on, into a new directory, to be named as a stream's teacher.

    The general prompts are those of the stream `recover`: the ones with a completion, or any that the teacher answers.

    Returns:
        The record: `prompts` and `tokens` of the labels, `mean_tokens` of one, `seconds` that the reference took.

    Raises InputError where no row has a label, FileError for what can't be read or written.
    """
    began = time.perf_counter()
    (stream,), longest = resolve(recipe), recipe.max_prompt_tokens
    train, held_out = str(stream.data), str(stream.eval_data)
    source = find_model(recipe.student, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source)
    config = load_config(source).get_text_config()
    ends = eos_ids(config, tokenizer)
    examples = load_examples(train)
    limit = longest + LABEL_TOKENS
    if settings.taught is None:
        answered = [e for e in examples if any(e.row.get(key) is not None for key in COMPLETION_KEYS)]
        general = _given(tokenizer, answered, limit, ends)
    else:
        general = _taught(recipe, settings.taught, tokenizer, examples)
    tasks = _given(tokenizer, load_examples(settings.task), limit, ends) if settings.task is not None else []
    chosen = mixed(general, tasks, settings.share, recipe.seed)
    if not chosen:
        task = "the task has no rows" if settings.task is None else f"neither have those of {settings.task}"
        raise InputError(
            f"no row has an answer to train on: the rows of {train} have none of "
            f"{', '.join(COMPLETION_KEYS)}, and {task}"
        )
    apart, _ = encode_within(tokenizer, load_examples(held_out), longest)
    shared = min(config.vocab_size, 1 + max(tokenizer.get_vocab().values()))
    seconds = time.perf_counter() - began if settings.taught is not None else 0.0
    about: JsonObject = {"of": [train, settings.task], "seconds": round(seconds, 1)}
    return _write(out, tokenizer, chosen, apart, ends, shared, about)


def _given(tokenizer: Tokenizer, examples: Sequence[Example], limit: int, ends: Sequence[int]) -> list[Rollout]:
    pairs = [(e, answer_of(e.row, f'row "{e.id}"')) for e in examples]
    return encode_pairs(tokenizer, pairs, max_tokens=limit, eos=ends)[0]


def _taught(recipe: RecoverConfig, count: int, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Rollout]:
    """The reference's own answers at temperature 1 to `count` of the prompts."""
    where = choose_device(recipe.device)
    dtype = choose_dtype("auto", where) if where.type == "cuda" else torch.float32
    source = find_model(reference_of(recipe), trust_remote_code=recipe.trust_remote_code)
    model = load_model(source, dtype=dtype, device=where)
    prompts, _ = encode_within(tokenizer, examples, recipe.max_prompt_tokens)
    order = Order(prompts, derive_seed(recipe.seed, "labels"))
    chosen = [prompt for _, prompt in order.take(0, min(count, len(prompts)))]
    return answer(
        model,
        tokenizer,
        chosen,
        "the reference writes the labels",
        max_new_tokens=resolve(recipe)[0].lengths[1],
        draws=Draws(1.0, [derive_seed(recipe.seed, "label", i) for i in range(len(chosen))]),
    )


def mixed(general: Sequence[Rollout], task: Sequence[Rollout], share: float, seed: int) -> list[Rollout]:
    """As many labels as there are in the wanted proportion: all of one kind, and of the other so many as fit."""
    if not general or not task or not share:
        return list(general or (task if share else ()))
    kept = (
        min(len(general), round(len(task) * (1 - share) / share)),
        min(len(task), round(len(general) * share / (1 - share))),
    )
    parts = [
        [row for _, row in Order(rows, derive_seed(seed, "mix", name)).take(0, max(1, count))]
        for name, rows, count in zip(("general", "task"), (general, task), kept, strict=True)
    ]
    return [*parts[0], *parts[1]]


def _write(
    out: Path,
    tokenizer: Tokenizer,
    labels: Sequence[Rollout],
    held_out: Sequence[Encoded],
    ends: Sequence[int],
    shared: int,
    about: JsonObject,
) -> JsonObject:
    """In the form of a cached teacher. A held-out prompt gets one label that nothing reads: the end."""
    close = (int(ends[0]) if ends else 0,)
    answers = {
        "train": [r for r in labels if r.completion],
        "held_out": [Rollout(p.id, p.tokens, close, False) for p in held_out],
    }
    everything = [r for rollouts in answers.values() for r in rollouts]
    tokens = sum(len(r.completion) for r in answers["train"])
    with new_directory(out) as target:
        written = write_scored(target, answers, ((i, _certain(r.completion)) for i, r in enumerate(everything)))
        record = {
            "version": VERSION,
            "model": "labels: all probability is on the given token",
            "files": {PROMPTS: hashlib.sha256((target / PROMPTS).read_bytes()).hexdigest()},
            **read_by(tokenizer, shared, 1),
            "prompts": written["prompts"],
            "prompts_sha256": written["prompts_sha256"],
            "tokens": sum(shard["rows"] for shard in written["shards"]),
            "mean_tokens": tokens / len(answers["train"]),
            "shards": written["shards"],
            **about,
        }
        write_json(target / RECORD, signed(record))
    return record


def _certain(tokens: Sequence[int]) -> TopK:
    """Scores that put all probability on these tokens."""
    ids_N1, count = torch.tensor(tokens, dtype=torch.int32).unsqueeze(1), len(tokens)
    return TopK(ids_N1, torch.zeros(count, 1, dtype=torch.float16), torch.full((count,), -math.inf))
