"""Write a cached teacher: its own completions, and its top-k log-probabilities with tail mass at each of their tokens.

remend cache-teacher smollm2 --data prompts.jsonl --out teacher

The teacher is then needed no more: a laptop can recover a student whose teacher does not fit beside it. What the cut
costs is measured on the way (see `_Errors`), as is the rounding of what is stored.

Legend: N completion tokens, V shared vocabulary, K kept tokens, E width of the teacher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from remend.console import Advance, stage, warn
from remend.data.examples import Example, data_hash, load_examples, split_held_out, without
from remend.data.given import as_files, rows_from_python, write_rows
from remend.data.order import batches_by_length, derive_seed
from remend.data.templates import Encoded, dropped_text, encode_within, token_hash
from remend.errors import InputError
from remend.files.atomic import JsonObject, json_line, new_directory, write_json, write_text
from remend.files.hashes import hash_file
from remend.files.run_directory import occupied
from remend.files.settings import build, takes
from remend.files.signed import signed
from remend.maths.losses import divergence
from remend.maths.topk import TopK, entropy_lost, top_k
from remend.models.device import choose_device, choose_dtype, chunk_rows
from remend.models.find import find_model, hash_files, origin_note
from remend.models.load import eos_ids, load_config, load_model, load_tokenizer, skeleton
from remend.models.protocols import Tokenizer
from remend.models.room import Room, room_of
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import Scorer, pack, scorer
from remend.models.vocabulary import ending_problem
from remend.training.cache_settings import CacheSettings
from remend.training.teachers import TEACHERS, named
from remend.training.teachers.cache import PROMPTS, RECORD, SPLITS, VERSION, template_hash, vocabulary_hash

SHARD_BYTES = 32 * 2**20
"""Of the scores in one file, and so of those held in memory while writing."""

ROWS = 8
"""Completions a forward pass, as recovery takes them."""


@takes(CacheSettings)
def cache_teacher(model: str | Path, out: str | Path, **overrides: object) -> JsonObject:
    """Let a teacher answer prompts and store how it scores its own answers.

    Args:
        model: the teacher: directory, GGUF file, hub id[@revision] or smollm2.
        out: a new directory; see remend.training.teachers.cache for what it holds.
        **overrides: fields of CacheSettings; `data` is needed, also as rows. Each of its prompts gets one completion.

    Returns:
        The content of teacher-cache.json.

    Raises:
        InputError, FileError: unknown settings or ones out of range, an occupied directory, no prompt left, unreadable
            data or model.
    """
    model, out = os.fspath(model), Path(out)
    with rows_from_python():
        taken = as_files(overrides, lambda name: out / "data" / f"{name}.jsonl")
        return _cached(model, out, build(CacheSettings, taken, "cache-teacher"))


def _cached(model: str, out: Path, plan: CacheSettings) -> JsonObject:
    claimed = type(named(model))
    kind = next(word for word, entry in TEACHERS.entries.items() if entry is claimed)
    if kind != "frozen":
        raise InputError(
            f'"{model}" is the teacher "{kind}" in a recipe, and no model whose answers can be stored; name a model: '
            "a directory (as ./NAME), GGUF file, hub id[@revision] or smollm2"
        )
    _check(plan, out)
    k, where = plan.k, choose_device(plan.device)
    source = find_model(model, trust_remote_code=plan.trust_remote_code)
    tokenizer = load_tokenizer(source)
    config = load_config(source)
    room = room_of(skeleton(source, config), config)
    rows = room.rows
    # rows above the tokenizer's ids are padding, and a student of the same family may have more or fewer of them
    shared = min(rows, 1 + max(tokenizer.get_vocab().values()))
    if not 1 <= k <= shared:
        raise InputError(f"k is {k}; allowed is 1 to the {shared} tokens of {model}")
    own = tokenizer.eos_token_id
    if problem := ending_problem(tokenizer, [] if own is None else [own], shared, rows):
        raise InputError(problem)
    sides = _sides(plan)
    prompts, dropped = {}, {}
    refused = []
    for split, examples in sides.items():
        try:
            prompts[split], dropped[split] = _encoded(tokenizer, SPLITS[split], examples, plan, room)
        except InputError as error:
            refused.append(str(error))
    if refused:
        raise InputError("\n".join(refused))
    dtype = choose_dtype("auto", where) if where.type == "cuda" else torch.float32
    with stage(f"loading {model}"):
        teacher = load_model(source, dtype=dtype, device=where)
        teacher.requires_grad_(False)
        files, note = hash_files(source), origin_note(source)
    record = {
        "version": VERSION,
        "model": model,
        "files": files,
        **({"note": note} if note else {}),
        "data": {split: data_hash(examples) for split, examples in sides.items()},
        "tokens_sha256": token_hash([*prompts["train"], *prompts["held_out"]]),
        **read_by(tokenizer, shared, k),
        "temperature": plan.temperature,
        "max_new_tokens": plan.max_new_tokens,
        "max_prompt_tokens": plan.max_prompt_tokens,
        "seed": plan.seed,
        "dropped": dropped,
    }
    sampler = TransformersSampler(teacher, shared, eos_ids(teacher, tokenizer))
    rollouts = {split: _answers(plan, sampler, encoded, split) for split, encoded in prompts.items()}
    return _write(out, record, rollouts, scorer(teacher, shared), k)


def _check(plan: CacheSettings, out: Path) -> None:
    if problem := occupied(out):
        raise InputError(problem)
    for name in ("max_new_tokens", "held_out", "max_prompt_tokens"):
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; allowed is 1 or more")
    if not 0 < plan.temperature <= 5:
        raise InputError(
            f"temperature is {plan.temperature}; allowed is above 0, up to 5 (held-out answers are greedy)"
        )


def _sides(plan: CacheSettings) -> dict[str, list[Example]]:
    """Split as `remend recover` does it: the same data, seed and held_out give the same sides."""
    examples = load_examples(plan.data, columns=plan.columns)
    if not plan.eval_data:
        return dict(zip(SPLITS, split_held_out(examples, plan.held_out, plan.seed), strict=True))
    if plan.held_out is not None:
        warn("held_out has no effect, since eval_data is given")
    held_out = load_examples(plan.eval_data, columns=plan.columns)
    train = without(examples, held_out)
    if not train:
        raise InputError(f"no prompt is left to train on: all of {plan.data} are in eval_data {plan.eval_data}")
    if count := len(examples) - len(train):
        warn(f"{count} training prompts are also in eval_data and are left out")
    return dict(zip(SPLITS, (train, held_out), strict=True))


def _encoded(
    tokenizer: Tokenizer, what: str, examples: Sequence[Example], plan: CacheSettings, room: Room
) -> tuple[list[Encoded], list[str]]:
    limit, why = room.prompt_limit(plan.max_prompt_tokens, plan.max_new_tokens)
    kept, dropped = encode_within(tokenizer, examples, limit, rows=room.rows)
    if not dropped:
        return kept, dropped
    text = dropped_text(dropped, len(examples), f"{what} prompts", why or f"max_prompt_tokens = {limit}")
    if not kept:
        way = "Lower max_new_tokens" if why else "Raise max_prompt_tokens"
        raise InputError(f"{text}; none is left. {way} or shorten the prompts.")
    warn(text)
    return kept, dropped


def _answers(
    plan: CacheSettings, sampler: TransformersSampler, prompts: Sequence[Encoded], split: str
) -> list[Rollout]:
    """Sampled for training, greedy for held-out prompts."""
    seeds = [derive_seed(plan.seed, "cache", i) for i in range(len(prompts))]
    temperature = plan.temperature if split == "train" else 0.0
    with stage(f"the teacher answers the {SPLITS[split]} prompts", len(prompts)) as advance:
        sampler.on_rows = advance
        return sampler(prompts, max_new_tokens=plan.max_new_tokens, temperature=temperature, seeds=seeds)


def _write(out: Path, record: JsonObject, rollouts: dict[str, list[Rollout]], parts: Scorer, k: int) -> JsonObject:
    errors, everything = _Errors(), [r for answers in rollouts.values() for r in answers]
    with new_directory(out) as directory:
        write_rows(out, directory)
        with stage(f"scoring: the {k} most likely tokens and the rest", len(everything)) as advance:
            written = write_scored(directory, rollouts, _scored(parts, everything, k, errors, advance))
        record = {
            **record,
            "prompts": written["prompts"],
            "prompts_sha256": written["prompts_sha256"],
            "clipped_share": {
                split: sum(r.clipped for r in answers) / len(answers) for split, answers in rollouts.items()
            },
            "tokens": errors.tokens,
            "bytes_per_token": 6 * k + 4,  # an int32 and a float16 for each of k, and the tail's float32
            "bytes": sum(s["bytes"] for s in written["shards"]),
            "errors": errors.figures(),
            "shards": written["shards"],
        }
        write_json(directory / RECORD, signed(record))
    return record


def read_by(tokenizer: Tokenizer, shared: int, k: int) -> JsonObject:
    """The part of teacher-cache.json that says which students can read the scores."""
    return {
        "vocabulary": {"shared": shared, "sha256": vocabulary_hash(tokenizer.get_vocab(), shared)},
        "eos_token": tokenizer.eos_token,
        "chat_template_sha256": template_hash(tokenizer),
        "k": k,
    }


def write_scored(
    directory: Path, answers: Mapping[str, Sequence[Rollout]], scores: Iterable[tuple[int, TopK]]
) -> JsonObject:
    """Write the completions and their scores into a cache's directory; all but teacher-cache.json.

    Args:
        directory: of the new cache.
        answers: completions by split.
        scores: the place of a completion among all of them, and its scores as they are stored; each once, in any order.

    Returns:
        `prompts`, the number of completions by split, `prompts_sha256`, the hash of their file, and `shards`, the files
        of scores, as the record holds them.
    """
    shards = _Shards(directory)
    places = {number: shards.add(stored) for number, stored in scores}
    shards.flush()
    everything = [(split, r) for split, rollouts in answers.items() for r in rollouts]
    lines = []
    for number, (split, r) in enumerate(everything):
        shard, start = places[number]
        row = {"id": r.id, "split": split, "prompt": r.prompt, "completion": r.completion, "clipped": r.clipped}
        lines.append(json_line({**row, "shard": shard, "start": start}))
    write_text(directory / PROMPTS, "".join(lines))
    return {
        "prompts": {split: len(rollouts) for split, rollouts in answers.items()},
        "prompts_sha256": hash_file(directory / PROMPTS),
        "shards": shards.written,
    }


@torch.no_grad()
def _scored(
    parts: Scorer, rollouts: Sequence[Rollout], k: int, errors: _Errors, advance: Advance
) -> Iterator[tuple[int, TopK]]:
    """Score all completions, like lengths together: the number of each, and its scores as they are stored."""
    lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
    head, rows = parts.head, chunk_rows(parts.shared, parts.device)
    for part in batches_by_length(lengths, rows=ROWS):
        batch = pack([(rollouts[i].prompt, rollouts[i].completion) for i in part], device=parts.device)
        states_NE = parts.states(batch)
        stored = []
        for start in range(0, states_NE.shape[0], rows):
            logits_NV = head(states_NE[start : start + rows]).float()
            target = top_k(logits_NV, k)
            stored.append(TopK(target.ids_NK.int().cpu(), target.log_p_NK.half().cpu(), target.log_tail_N.cpu()))
            errors.add(logits_NV, target, stored[-1])
        joined, start = _joined(stored), 0
        for i in part:
            end = start + len(rollouts[i].completion)
            yield i, joined[start:end]
            start = end
        advance(len(part))


def _joined(parts: Sequence[TopK]) -> TopK:
    return TopK(*(torch.cat(tensors) for tensors in zip(*(vars(p).values() for p in parts), strict=True)))


class _Shards:
    """Writes rows into files of about SHARD_BYTES; a completion's rows stay together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.written: list[JsonObject] = []
        self._held: list[TopK] = []

    def add(self, stored: TopK) -> tuple[int, int]:
        """Take a completion's rows: (number of the shard, first row in it)."""
        if self._held and sum(t.nbytes for rows in (*self._held, stored) for t in vars(rows).values()) > SHARD_BYTES:
            self.flush()
        start = sum(map(len, self._held))
        self._held.append(stored)
        return len(self.written), start

    def flush(self) -> None:
        """Write what is held."""
        if not self._held:
            return
        path, rows = self.directory / f"scores-{len(self.written):05d}.safetensors", _joined(self._held)
        tensors = {"ids": rows.ids_NK, "log_p": rows.log_p_NK, "log_tail": rows.log_tail_N}
        save_file(tensors, path, metadata={"remend_teacher_cache": str(VERSION)})
        size, digest = path.stat().st_size, hash_file(path)
        self.written.append({"file": path.name, "rows": len(rows), "bytes": size, "sha256": digest})
        self._held = []


class _Errors:
    """What cutting to the top k hides of the teacher, and what rounding adds, over all completion tokens.

    tail_mean, tail_max: probability outside the top k.
    entropy: mean H(p), nats;  entropy_lost: mean of H(p) − H(p folded). Nothing that the loss says of p inside its tail
        is left; what the student loses by it, p(tail) · KL(p given tail ‖ q given tail), depends on the student too.
    rounding_kl: mean KL(p folded ‖ the same as stored), nats;  rounding_max: largest change of a probability.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sums = dict.fromkeys(("tail_mean", "entropy", "entropy_lost", "rounding_kl"), 0.0)
        self._largest = dict.fromkeys(("tail_max", "rounding_max"), 0.0)

    def add(self, logits_NV: Tensor, target: TopK, stored: TopK) -> None:
        """Count some positions; the teacher's logits are float32."""
        tail_N, lost_N = target.log_tail_N.exp(), entropy_lost(logits_NV, target)
        read = replace(stored, log_p_NK=stored.log_p_NK.float())
        exact_NK1, rounded_NK1 = target.folded_NK1.cpu(), torch.log_softmax(read.folded_NK1, -1)
        entropy_N = torch.special.entr(exact_NK1.exp()).sum(-1)
        self.tokens += len(target)
        self._sums["tail_mean"] += float(tail_N.sum())
        self._sums["entropy"] += float(entropy_N.sum()) + float(lost_N.sum())
        self._sums["entropy_lost"] += float(lost_N.sum())
        # in float64: the divergence is of second order in a rounding error, below what float32 sums can show
        self._sums["rounding_kl"] += float(divergence(rounded_NK1.double(), exact_NK1.double()).sum())
        self._largest["tail_max"] = max(self._largest["tail_max"], float(tail_N.max()))
        change = float((rounded_NK1.exp() - exact_NK1.exp()).abs().max())
        self._largest["rounding_max"] = max(self._largest["rounding_max"], change)

    def figures(self) -> dict[str, float]:
        """Means and maxima."""
        return {**{name: value / self.tokens for name, value in self._sums.items()}, **self._largest}
