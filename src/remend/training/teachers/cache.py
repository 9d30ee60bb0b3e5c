"""A cached teacher, read: completions that it wrote, and its scores at each of their tokens.

`remend cache-teacher` writes such a directory once (training/write_cache.py), and a student can then be taught where
the teacher itself does not fit:

    teacher-cache.json   settings, hashes, and the errors that cutting and rounding make
    prompts.jsonl        one completion a line: id, split, prompt, completion (token ids), clipped, shard, start
    scores-00000.safetensors, …    rows of tokens: `ids` int32 [n, K], `log_p` float16 [n, K], `log_tail` float32 [n];
                         those of a completion are rows start … start + its length − 1 of its shard

log_p is float16: its relative error of at most 2^-11 is finest where it matters, near log p = 0. The tail, which can be
very small, is float32. What the rounding costs is measured when the cache is written.

Legend: N completion tokens, K kept tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from remend.data.sources import read_lines
from remend.data.templates import template_text
from remend.errors import FileError, InputError, shortened
from remend.files.hashes import hash_file
from remend.files.reading import MISSHAPEN, read_object, stays_inside
from remend.files.signed import as_signed
from remend.maths.topk import TopK
from remend.models.find import ModelSource
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.answers import token_ids
from remend.models.sampling.rollout import Rollout
from remend.models.vocabulary import VocabularyMatch
from remend.training.teachers.teacher import TEACHERS, NamedTeacher, StreamView, Teacher, Workplace

RECORD, PROMPTS = "teacher-cache.json", "prompts.jsonl"
SPLITS = {"train": "training", "held_out": "held-out"}
"""Of the prompts, and their names in messages."""

VERSION = 1
"""Of the layout."""


def is_cache(path: str | Path) -> bool:
    """Whether a directory is a cached teacher."""
    return (Path(path) / RECORD).is_file()


def vocabulary_hash(vocabulary: Mapping[str, int], shared: int) -> str:
    """SHA-256 over the tokens that the ids below `shared` stand for."""
    named = sorted((i, token) for token, i in vocabulary.items() if i < shared)
    return hashlib.sha256(
        "".join(f"{i}\0{token}\0" for i, token in named).encode("utf-8", "backslashreplace")
    ).hexdigest()


def template_hash(tokenizer: Tokenizer) -> str | None:
    """SHA-256 of a tokenizer's chat template, None where it has none."""
    text = template_text(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest() if text else None


@dataclass(frozen=True)
class TeacherCache(Teacher):
    """An opened cache, a teacher that has scored its own completions only. Scores stay on disk until asked for.

    record: the content of teacher-cache.json.
    train, held_out: the teacher's completions, sampled for training prompts and greedy for held-out ones.
    """

    path: Path
    record: Mapping[str, Any]
    _places: Mapping[tuple[tuple[int, ...], tuple[int, ...]], tuple[str, int]] = field(repr=False)
    train: Sequence[Rollout] = ()
    held_out: Sequence[Rollout] = ()
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: str | Path) -> TeacherCache:
        """Read all but the scores.

        Raises:
            InputError: the directory is no cache, or one of another layout.
            FileError: the cache is incomplete or damaged.
        """
        path = Path(path)
        if not is_cache(path):
            raise InputError(
                f"{path} is no cached teacher: it has no {RECORD}; give the directory that remend cache-teacher --out "
                "named"
            )
        record = read_object(path / RECORD, REMEDY)
        version = record.get("version")
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"{path / RECORD} has version {version}, and this remend reads {VERSION}; write the cache again with "
                "remend cache-teacher"
            )
        if not as_signed(record):
            raise _damaged(path, f"{RECORD} changed since it was written")
        try:
            for shard in record["shards"]:
                _require_whole(path, shard["file"], shard["bytes"], shard["sha256"])
            if not (path / PROMPTS).is_file():
                raise _damaged(path, f"{PROMPTS} is missing")
            if record.get("prompts_sha256") not in (None, hash_file(path / PROMPTS)):
                raise _damaged(path, f"{PROMPTS} changed since it was written")
            answers: dict[str, list[Rollout]] = {split: [] for split in SPLITS}
            places = {}
            for _, row in read_lines(path / PROMPTS, "prompt"):
                prompt, completion = token_ids(row["prompt"]), token_ids(row["completion"])
                rollout = Rollout(str(row["id"]), prompt, completion, bool(row["clipped"]), off_policy=True)
                answers[row["split"]].append(rollout)
                shard, start = record["shards"][row["shard"]], int(row["start"])
                if not 0 <= start <= start + len(completion) <= shard["rows"]:
                    raise ValueError(f"{shard['file']} has no rows {start} to {start + len(completion)}")
                places[prompt, completion] = (shard["file"], start)
            counts = [len(rollouts) for rollouts in answers.values()]
            counts.append(sum(len(r.completion) for rollouts in answers.values() for r in rollouts))
            expected = [record["prompts"][split] for split in SPLITS] + [record["tokens"]]
            missing = [name for name in ("k", "model", "eos_token", "chat_template_sha256") if name not in record]
            whole = {"shared", "sha256"} <= set(record["vocabulary"])
            numbers = (record["k"], record["vocabulary"]["shared"]) if whole and not missing else ()
            if not all(type(number) is int and number > 0 for number in numbers):
                raise TypeError(f"k and the vocabulary's size are {shortened(numbers)}, and must be whole numbers")
            if not isinstance(record.get("files", {}), dict):
                raise TypeError("files is no object")
        except FileError:
            raise
        except MISSHAPEN as error:
            raise _damaged(path, f"{type(error).__name__}: {shortened(error)}") from None
        if missing or not whole:
            raise _damaged(path, f"{RECORD} lacks {', '.join(missing) or 'the vocabulary'}")
        if counts != expected:
            raise _damaged(path, f"{PROMPTS} has (training, held-out, tokens) {tuple(counts)} of {tuple(expected)}")
        return TeacherCache(path, record, places, answers["train"], answers["held_out"])

    @property
    def shared(self) -> int:
        """How many token ids, from 0, the probabilities are over: the student is to be scored over the same."""
        return int(self.record["vocabulary"]["shared"])

    @property
    def k(self) -> int:
        """Tokens kept by name at each position."""
        return int(self.record["k"])

    def check(self, tokenizer: Tokenizer, rows: int | None = None) -> list[str]:
        """Warnings about a student that is to learn from this cache.

        Args:
            tokenizer: the student's.
            rows: of the student's output embedding, where they are known.

        Raises:
            InputError: a token id means something else to the student, or it lacks some.
        """
        if rows is not None and rows < self.shared:
            raise InputError(
                f"the student has {rows} token ids and the cached teacher {self.path} is over {self.shared}; cached "
                "probabilities can't be aligned afterwards: choose a teacher with the student's vocabulary"
            )
        if vocabulary_hash(tokenizer.get_vocab(), self.shared) != self.record["vocabulary"]["sha256"]:
            raise InputError(
                f"the cached teacher {self.path} ({self.record['model']}) has another vocabulary than the student: its "
                f"{self.shared} token ids don't all stand for the same tokens. Distillation needs one vocabulary; "
                "choose a teacher of the same family and cache that"
            )
        warnings = []
        if tokenizer.eos_token != self.record["eos_token"]:
            warnings.append(
                f"the end-of-sequence token differs: {tokenizer.eos_token!r} for the student, "
                f"{self.record['eos_token']!r} for the cached teacher, whose completions end with that"
            )
        if template_hash(tokenizer) != self.record["chat_template_sha256"]:
            warnings.append(
                "the chat template differs between student and cached teacher; its prompts are in the teacher's"
            )
        if "strftime_now" in template_text(tokenizer):
            warnings.append(
                "the chat template may write the date: the prompts of the cached teacher hold that of the day on which "
                "it was written"
            )
        return warnings

    @property
    def model(self) -> None:
        """There is none."""
        return None

    def policy(self) -> AbstractContextManager[CausalLM]:
        """Raises InputError: a cache answers nothing new."""
        raise InputError(f"the cached teacher {self.path} holds completions, and no model that could write others")

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> TopK:
        """Folded distributions, on the CPU.

        Only these rows are read. `skip_first` tokens at the start of each completion are left out, as `pack` does.

        Raises:
            InputError: a rollout is not of this cache.
            FileError: its shard can't be read.
        """
        ids, log_p, log_tail = [], [], []
        for rollout in rollouts:
            place = self._places.get((rollout.prompt, rollout.completion))
            if place is None:
                raise InputError(
                    f'the completion for "{rollout.id}" is not of the cached teacher {self.path}, which has scored '
                    "its own only; take rollouts from its train and held_out"
                )
            name, start = place
            rows = slice(min(start + skip_first, start + len(rollout.completion)), start + len(rollout.completion))
            try:
                shard = self._shard(name)
                ids.append(shard.get_slice("ids")[rows].long())
                log_p.append(shard.get_slice("log_p")[rows].float())
                log_tail.append(shard.get_slice("log_tail")[rows])
            except (SafetensorError, OSError) as error:
                raise _damaged(self.path, f"{name}: {error}") from None
            if len(ids[-1]) != rows.stop - rows.start:
                raise _damaged(self.path, f"{name} ends before row {rows.stop}")
        if not ids:
            return TopK(torch.zeros(0, self.k, dtype=torch.long), torch.zeros(0, self.k), torch.zeros(0))
        return TopK(torch.cat(ids), torch.cat(log_p), torch.cat(log_tail))

    def _shard(self, name: str) -> Any:
        # an open file is memory-mapped: it costs address space, and memory only for what was read
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]


def _require_whole(directory: Path, name: str, size: int, digest: str) -> None:
    """Raise FileError unless a file of a cache lies in its directory and is what was written."""
    if not stays_inside(name):
        raise _damaged(directory, f"{name} is no file's name: what a cache reads lies in its own directory")
    file = directory / name
    if not file.is_file():
        raise _damaged(directory, f"{name} is missing")
    if file.stat().st_size != size:
        raise _damaged(directory, f"{name} has {file.stat().st_size} bytes instead of {size}")
    if hash_file(file) != digest:
        raise _damaged(directory, f"{name} changed since it was written: its SHA-256 is another one")


def _damaged(path: Path, reason: str) -> FileError:
    return FileError(f"the cached teacher {path} is damaged ({reason}); {REMEDY}")


REMEDY = "write it again with remend cache-teacher"
"""What to do about a damaged cache."""


@TEACHERS.register("cache", source="remend cache-teacher")
@dataclass(frozen=True)
class NamedCache(NamedTeacher):
    """A directory that `remend cache-teacher` wrote: prompts, completions and scores in one."""

    cache: TeacherCache | None = None
    brings_prompts = True
    no_layers = "a cache has none"

    @classmethod
    def claims(cls, name: str) -> bool:
        return is_cache(name)

    def refuses(self, stream: StreamView) -> list[str]:
        reasons = []
        if stream.on_policy:
            reasons.append("a cached teacher has scored its own completions only, never the student's; set policy: off")
        if stream.data:
            reasons.append("a cached teacher brings its own prompts; leave data out")
        if stream.demonstrations:
            reasons.append("a cached teacher has seen no demonstrations; leave them out, or name the model")
        if stream.top_k:
            reasons.append(f"the cache {self.name} was cut to its own top k when it was made; leave top_k out")
        return reasons

    def opened(self, *, trust_remote_code: bool) -> NamedCache:
        return replace(self, cache=TeacherCache.open(Path(self.name)))

    def brings(self) -> tuple[Sequence[Rollout], Sequence[Rollout], str]:
        """The digest is over the cache's own record of what it holds."""
        assert self.cache is not None
        digest = hashlib.sha256(json.dumps(dict(self.cache.record), sort_keys=True).encode()).hexdigest()
        return self.cache.train, self.cache.held_out, digest

    def compare(self, student: ModelSource, tokenizer: Tokenizer, rows: int, *, shown_more: bool) -> VocabularyMatch:
        assert self.cache is not None
        return VocabularyMatch(self.cache.shared, warnings=self.cache.check(tokenizer, rows))

    def hashes(self) -> Mapping[str, str]:
        assert self.cache is not None
        files: Mapping[str, str] = self.cache.record["files"]
        return files

    def load(self, workplace: Workplace) -> TeacherCache:
        assert self.cache is not None
        return self.cache
