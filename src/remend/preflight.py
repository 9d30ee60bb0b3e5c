"""Everything that can be known about a recovery before training: all findings at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from remend import models, run
from remend.adapters import check_targets
from remend.config import RecoverConfig
from remend.constraints import GRID_FILE
from remend.data import Example, data_hash, load_examples, split_held_out, without
from remend.errors import CheckError, RemendError, did_you_mean
from remend.foreign import PLAIN, Recognised, recognise
from remend.prompts import Encoded, encode_within
from remend.vocabulary import compare_vocabularies, template_warnings

DROPPED_LIMIT = 0.2
"""Above this share of prompts over the length limit, dropping them would change what is trained on: a problem."""


@dataclass
class Preflight:
    """What the checks found and prepared. Fields below `warnings` are complete only when there is no problem."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    student: models.Source | None = None
    teacher: models.Source | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer: Any = None
    shared: int = 0
    parameters: int = 0
    grid: str | None = None
    recognised: Recognised = field(default_factory=lambda: Recognised("plain", None, False, PLAIN))
    layer_map: list[int] | None = None
    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    held_out_examples: dict[str, Example] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    data_hashes: dict[str, str] = field(default_factory=dict)

    def raise_problems(self) -> None:
        """Raise CheckError when there are problems."""
        if self.problems:
            raise CheckError(self.problems)

    @property
    def constraint(self) -> str:
        """What training holds, in words: a grid's name, a mask's share of zeros, or 'none'."""
        held = self.recognised
        if held.mask:
            return f"mask, {held.sparsity:.1%} zeros" + (f" ({held.pattern})" if held.pattern else "")
        return self.grid or "none"

    @contextmanager
    def _collect(self) -> Iterator[None]:
        try:
            yield
        except RemendError as error:
            self.problems.append(str(error))


def preflight(config: RecoverConfig, *, resuming: bool = False) -> Preflight:
    """Run every check. Problems are collected, not raised; nothing is written.

    No model is loaded: the student's files are read only to see what it is held to.
    """
    found = Preflight()
    if not resuming:
        problem = run.occupied(Path(config.out))
        if problem:
            found.problems.append(problem)
    with found._collect():
        found.device = models.choose_device(config.device)
    _settings(found, config)
    with found._collect():
        found.student = models.fetch(models.resolve(config.student), weights=False)
    with found._collect():
        found.teacher = models.fetch(models.resolve(config.teacher), weights=False)
    if found.teacher:
        note = models.origin_note(found.teacher)
        found.notes += [note] if note else []
    if found.student and found.teacher:
        _models(found, config, found.student, found.teacher)
    _data(found, config)
    if found.parameters and not found.problems:
        _disk(found, config)
    return found


def _settings(found: Preflight, config: RecoverConfig) -> None:
    _tracker(found, config.report_to)
    for near, name in ((0.0, "forward KL"), (1.0, "reverse KL")):
        if config.beta != near and abs(config.beta - near) < 0.05:
            found.warnings.append(
                f"beta {config.beta:g} is close to {near:g} but is no {name}: the generalised JSD shrinks there "
                f"(about {abs(config.beta - near):g} of the KL), so the same learning rate does less; "
                f"{near:g} is the {name} itself"
            )
    if config.eval_data and config.held_out is not None:
        found.warnings.append("held_out has no effect, since eval_data is given")
    if config.warmup_steps > config.steps > 0:
        found.warnings.append(
            f"warmup_steps {config.warmup_steps} is above steps {config.steps}: the peak learning rate is never reached"
        )


def _tracker(found: Preflight, name: str | None) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType.list() if kind != "all"]
    if name is not None and name not in known:
        found.problems.append(f'unknown report_to "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    elif name is not None and name not in map(str, get_available_trackers()):
        found.problems.append(f"report_to {name} needs the package of that tracker, which is not installed")


def _models(found: Preflight, config: RecoverConfig, student: models.Source, teacher: models.Source) -> None:
    same = student.path is not None and teacher.path is not None and student.path.resolve() == teacher.path.resolve()
    if same:
        found.problems.append(
            f"teacher {config.teacher} is the student's own model: a frozen teacher that equals the "
            "student teaches nothing. "
            "Name the healthy checkpoint from before the damage."
        )
        return
    trust = config.trust_remote_code
    with found._collect():
        settings = models.load_config(student, trust_remote_code=trust)
        teacher_settings = models.load_config(teacher, trust_remote_code=trust)
        found.tokenizer = models.load_tokenizer(student, trust_remote_code=trust)
        teacher_tokenizer = models.load_tokenizer(teacher, trust_remote_code=trust)
        rows, teacher_rows = settings.get_text_config().vocab_size, teacher_settings.get_text_config().vocab_size
        match = compare_vocabularies(found.tokenizer.get_vocab(), teacher_tokenizer.get_vocab(), rows, teacher_rows)
        found.shared = match.shared
        found.problems += match.problems
        found.warnings += match.warnings
        found.warnings += template_warnings(found.tokenizer, teacher_tokenizer)
        found.warnings += _ending(found.tokenizer, student)
        shapes = models.skeleton(settings, trust_remote_code=trust)
        found.parameters = models.count_parameters(shapes)
        if config.lora:
            check_targets(shapes, config.lora.targets)
    if config.lora and student.kind == "adapter":
        found.problems.append(f"student {config.student} is an adapter, which is trained as it is; leave lora out")
    _constraint(found, config, student)


def _constraint(found: Preflight, config: RecoverConfig, student: models.Source) -> None:
    path = student.path if student.kind == "directory" else None
    declared = path / "degradation.json" if path else None
    with found._collect():
        degradation = run.read_json(declared) if declared and declared.is_file() else {}
        held = recognise(student, as_dense=config.as_dense)
        found.recognised = held
        found.layer_map = config.layer_map or degradation.get("layer_map")
        if held.kind != "remend" and held.why != PLAIN:
            found.notes.append(f"student {config.student}: {held.why}")
        if degradation.get("kind") == "quantization" and held.stored is None and not config.as_dense:
            found.problems.append(
                f"{declared} says that the student lies on the grid {degradation.get('format')}, and "
                f"{GRID_FILE} is missing beside it"
            )
        if config.scales == "learned" and held.stored is None:
            found.warnings.append("scales: learned has no effect, since the student lies on no grid")
        found.grid = held.stored.format.name if held.stored else None


def _ending(tokenizer: Any, source: models.Source) -> list[str]:
    if tokenizer.eos_token_id is None:
        return ["the student's tokenizer has no end-of-sequence token: every rollout will run to max_new_tokens"]
    path = source.path / "generation_config.json" if source.kind == "directory" and source.path else None
    if path and path.is_file():
        try:
            given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except ValueError:
            return [f"{path} is not valid JSON and is left to transformers' defaults"]
        ids = given if isinstance(given, list) else [given]
        if given is not None and tokenizer.eos_token_id not in ids:
            return [
                f"the generation config ends answers at token {given}, the tokenizer at {tokenizer.eos_token_id} "
                f"({tokenizer.eos_token!r}); rollouts end at either"
            ]
    return []


def _data(found: Preflight, config: RecoverConfig) -> None:
    train: list[Example] = []
    held_out: list[Example] = []
    with found._collect():
        train = load_examples(config.data)
    if config.eval_data:
        with found._collect():
            held_out = load_examples(config.eval_data)
        total = len(train)
        train = without(train, held_out)
        if total > len(train):
            found.warnings.append(f"{total - len(train)} training prompts are also in eval_data and are not trained on")
    elif train:
        with found._collect():
            train, held_out = split_held_out(train, config.held_out, config.seed)
    if not train or not held_out or found.tokenizer is None:
        if held_out and not train and config.eval_data:
            found.problems.append(f"no example is left to train on: all prompts of {config.data} are in eval_data")
        return
    with found._collect():
        found.train = _encode(found, "training", train, config)
        found.held_out = _encode(found, "held-out", held_out, config)
    found.held_out_examples = {e.id: e for e in held_out}
    found.data_hashes = {"train": data_hash(train), "held_out": data_hash(held_out)}


def _encode(found: Preflight, what: str, examples: list[Example], config: RecoverConfig) -> list[Encoded]:
    kept, dropped = encode_within(found.tokenizer, examples, config.max_prompt_tokens)
    if dropped:
        found.dropped[what] = dropped
        share = len(dropped) / len(examples)
        named = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
        text = (
            f"{len(dropped)} of {len(examples)} {what} prompts have over max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens "
            f"and are dropped, not cut ({named})"
        )
        if share > DROPPED_LIMIT or not kept:
            rest = "no example is left" if not kept else f"that is {share:.0%}, above the {DROPPED_LIMIT:.0%} limit"
            found.problems.append(f"{text}; {rest}. Raise max_prompt_tokens or shorten the prompts.")
        else:
            found.warnings.append(text)
    return kept


def _disk(found: Preflight, config: RecoverConfig) -> None:
    saved = min(config.keep_checkpoints + 1, config.steps // config.save_every) if config.save_every else 0
    need = found.parameters * (12 * saved + 4)
    target = Path(config.out)
    while not target.exists():
        target = target.parent
    free = shutil.disk_usage(target).free
    if need > free:
        found.problems.append(
            f"out {config.out}: the run writes up to {need / 2**30:.1f} GiB (model and {saved} "
            "checkpoints of 12 bytes a "
            f"parameter) and {free / 2**30:.1f} GiB are free; lower keep_checkpoints, raise save_every, "
            "or name another disk"
        )
