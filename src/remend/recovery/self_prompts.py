"""Prompts that a model writes itself, where no prompt file is at hand (Magpie, arXiv 2406.08464).

A chat model has learned what users write, so it can be let continue right after the header of the user's turn: the
chat template rendered with a probe as the user's text, cut where the probe begins. The template's default system
prompt stays as it is rendered (Magpie's own prefixes have none), since prompts are later rendered with it as well. A
model without a chat template samples a text from its start, and the text's beginning is the prompt.

Tries are numbered and each has its own seed; the filters see them in that order and the first n that pass are kept.
So a seed settles the prompts, whatever the number of rows that are decoded at once.

    remend prompts smollm2 --n 512 --out prompts.jsonl
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from remend.console import stage
from remend.data.examples import Example, data_hash, prompt_id
from remend.data.order import derive_seed
from remend.data.templates import Encoded, conversation, turns
from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject, json_line, write_json, write_text
from remend.files.reading import read_object
from remend.files.settings import MOST_TOKENS
from remend.models.device import choose_device, choose_dtype
from remend.models.find import find_model, hash_files
from remend.models.load import eos_ids, load_model, load_tokenizer
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.room import room_of
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.recovery.self_prompt_filters import Counts, Sieve, words_of

PROBE = "remendprobe"

BEGINNING_WORDS = 8
"""A text's beginning ends with the first sentence that reaches this many words."""

ROWS, FEWEST_ROWS = 64, 16
"""Tries decoded at once; fewer near the end, where a row too many is wasted."""


@dataclass(frozen=True)
class UserTurn:
    """Where a model begins to write, and what ends its turn.

    text, tokens: what stands before the user's words.
    ends: ids that end the turn.
    closing: text that ends the turn where the template closes it with no token of its own; else empty.
    marks: special tokens as text; none may stand in a prompt.
    chat: False for a model without chat template, whose text's beginning is the prompt.
    """

    text: str
    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    closing: str = ""
    marks: tuple[str, ...] = ()
    chat: bool = True


def user_turn(tokenizer: Tokenizer, eos: Iterable[int]) -> UserTurn:
    """Find from the chat template alone where the user's turn begins and what ends it.

    Args:
        tokenizer: the model's own.
        eos: ids that end the model's answers; they end the user's turn as well.

    Raises:
        InputError: the template does not show the user's text, or there is no token to start a text from.
    """
    eos, added = set(eos), tokenizer.added_tokens_decoder
    special = {t.content for t in added.values() if t.special} | set(tokenizer.all_special_tokens)
    marks = tuple(sorted(m for m in special if len(m.strip()) > 2))
    if not tokenizer.chat_template:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError(
                "the tokenizer has no chat template and neither a BOS nor an EOS token to start a text from, so the "
                "model can't write prompts; give a file of prompts"
            )
        return UserTurn("", (start,), tuple(sorted(eos)), marks=marks, chat=False)
    shown = conversation(tokenizer, turns(PROBE), {}, prompting=True)
    before, probe, after = shown.partition(PROBE)
    if not probe:
        raise InputError(
            "the chat template does not show the user's text as it is, so the start of the user's turn can't be found; "
            "give a file of prompts"
        )
    # a space at the end is part of the first word's token in most vocabularies: the model writes it itself
    before, closing = before.rstrip(" "), after.strip()
    tokens = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise InputError("the chat template writes nothing before the user's text; give a file of prompts")
    next_ids = tokenizer(closing, add_special_tokens=False)["input_ids"] if closing else []
    if next_ids and (next_ids[0] in added or next_ids[0] in tokenizer.all_special_ids):
        eos, closing = eos | {next_ids[0]}, ""
    return UserTurn(before, tokens, tuple(sorted(eos)), closing, marks)


def written(tokenizer: Tokenizer, turn: UserTurn, rollout: Rollout) -> str | None:
    """The text that was written: the user's whole turn, or a text's beginning. None where it did not end."""
    tokens = rollout.completion if rollout.clipped else rollout.completion[:-1]
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not turn.chat:
        return beginning(text)
    if turn.closing and turn.closing in text:
        return text.partition(turn.closing)[0].strip()
    return None if rollout.clipped else text.strip()


_SENTENCE_END = re.compile(r"(?:[.!?][\"'”’)\]]*(?=\s)|[。！？][”’」』）]*)(?=\s*\S)")


def beginning(text: str) -> str | None:
    """A text up to the end of the sentence that reaches BEGINNING_WORDS words; None where nothing follows one."""
    for end in _SENTENCE_END.finditer(text):
        start = text[: end.end()].strip()
        if len(words_of(start)) >= BEGINNING_WORDS:
            return start
    return None


def collect(
    sample: Callable[..., list[Rollout]],
    tokenizer: Tokenizer,
    turn: UserTurn,
    *,
    n: int,
    seed: int,
    rows: int = ROWS,
    on_kept: Callable[[int], object] = lambda count: None,
) -> tuple[list[str], Counts]:
    """`generate` with a turn and a sampler of (prompts, seeds) that are there already; at most `rows` tries at once."""
    sieve, start = Sieve(n, turn.marks), 0
    while not sieve.full:
        rate = (len(sieve.kept) + 1) / (start + 2)
        size = min(rows, max(FEWEST_ROWS, math.ceil((n - len(sieve.kept)) / rate)))
        tries, before = range(start, start + size), len(sieve.kept)
        prompts = [Encoded(str(i), turn.tokens, turn.text) for i in tries]
        rollouts = sample(prompts, seeds=[derive_seed(seed, "prompt", i) for i in tries])
        for rollout in rollouts:
            sieve.offer(written(tokenizer, turn, rollout))
            if sieve.full:  # what else was sampled is not counted: it depends on `rows`
                break
            sieve.require_yield()
        on_kept(len(sieve.kept) - before)
        start += size
    return sieve.kept, sieve.counts


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    n: int,
    seed: int,
    shared: int,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    on_kept: Callable[[int], object] = lambda count: None,
) -> tuple[list[str], Counts]:
    """Prompts that a model writes itself (Magpie, arXiv 2406.08464).

    Args:
        model, tokenizer: the model in evaluation mode, and its own tokenizer.
        n: how many prompts.
        seed: settles every try's draws, and with them the prompts.
        shared: only ids below it are sampled.
        temperature: above 0.
        max_new_tokens: a turn that has not ended within as many tokens is dropped, never cut.
        on_kept: called with how many more prompts were kept.

    Returns:
        n different prompts in the order of their tries, and what became of the tries.

    Raises:
        InputError: a setting that can't be; a template without a place for the user's text; too few usable prompts.
    """
    _require(n, temperature, max_new_tokens)
    turn = user_turn(tokenizer, eos_ids(model, tokenizer))
    limit, why = room_of(model, model.config).prompt_limit(len(turn.tokens), max_new_tokens)
    if limit < len(turn.tokens):
        raise InputError(f"a turn begins with {len(turn.tokens)} tokens, and may have {why}: lower max_new_tokens")
    sampler = TransformersSampler(model, shared, turn.ends, max_rows=ROWS)
    sample = partial(sampler, temperature=temperature, max_new_tokens=max_new_tokens)
    return collect(sample, tokenizer, turn, n=n, seed=seed, on_kept=on_kept)


def _require(n: int, temperature: float, max_new_tokens: int) -> None:
    if n < 1:
        raise InputError(f"n is {n}; allowed is 1 or more prompts")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; allowed is above 0 (at 0 all prompts would be the same)")
    if not 1 <= max_new_tokens <= MOST_TOKENS:
        raise InputError(f"max_new_tokens is {max_new_tokens}; allowed is 1 to {MOST_TOKENS}")


def stats_path(out: Path) -> Path:
    """Where the record of `out` lies: prompts.jsonl has prompts.stats.json beside it."""
    return out.with_name(f"{out.stem}.stats.json")


def write_self_prompts(
    model: str | Path,
    out: str | Path,
    *,
    n: int = 512,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> JsonObject:
    """Let `model` write prompts into a new JSON lines file ({id, prompt}), with a record beside it (`stats_path`).

    Args:
        model: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new file.
        n, seed, temperature, max_new_tokens: see `generate`.
        device: auto, cpu, cuda, cuda:N, mps.
        trust_remote_code: let a model directory run its own Python.

    Returns:
        The record: model with its files' hashes, settings, counts, the prompts' hash and seconds.

    Raises:
        InputError: as `generate`; or one of the two files exists.
        FileError: an unreadable model, or a place that can't be written to.
    """
    model, out = os.fspath(model), Path(out)
    _require(n, temperature, max_new_tokens)
    for path in (out, stats_path(out)):
        if path.exists() and (path == out or not _left_over(path)):
            raise InputError(f"out {path} exists, and nothing is overwritten; name a new file")
    source, where = find_model(model, trust_remote_code=trust_remote_code), choose_device(device)
    _writable(out)
    # on a CPU float32, as for calibration text: only in it does the sampler multiply thin batches weight first
    dtype = choose_dtype("auto", where) if where.type == "cuda" else torch.float32
    with stage(f"loading {model}"):
        tokenizer = load_tokenizer(source)
        loaded = load_model(source, dtype=dtype, device=where)
        hashes = hash_files(source)
    shared = min(loaded.get_output_embeddings().weight.shape[0], len(tokenizer))
    began = time.perf_counter()
    with stage(f"{model} writes prompts", n) as advance:
        prompts, counts = generate(
            loaded,
            tokenizer,
            n=n,
            seed=seed,
            shared=shared,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            on_kept=advance,
        )
    rows = [{"id": prompt_id(prompt), "prompt": prompt} for prompt in prompts]
    record = {
        "model": {"model": model, "files": hashes},
        "n": n,
        "seed": seed,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "prefix": user_turn(tokenizer, ()).text,
        "device": where.type,
        "dtype": str(dtype).removeprefix("torch."),
        "counts": asdict(counts),
        "hash": data_hash(Example(row["id"], row["prompt"], row) for row in rows),
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_json(stats_path(out), record)
    write_text(out, "".join(json_line(row) for row in rows))  # last: where it lies, all is done
    return record


def _left_over(path: Path) -> bool:
    """Whether it is the record of prompts that were never written, since the process was killed in between."""
    try:
        record = read_object(path)
    except FileError:
        return False
    return {"model", "counts", "hash", "prefix"} <= record.keys()


def _writable(out: Path) -> None:
    """Find out before minutes of sampling that a file can't be written; nothing is created."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "no permission to write in it" if parent.is_dir() else "it is no directory"
        raise FileError(f"out {out} can't be written to {parent}: {why}")
