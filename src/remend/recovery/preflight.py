"""Everything that can be known about a recovery before training: all findings at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from remend.compression.recognise import PLAIN, RECORD, Recognised, recognise
from remend.errors import CheckError, InputError, RemendError, did_you_mean
from remend.files.atomic import read_json
from remend.files.run_directory import occupied
from remend.maths.losses import of_beta
from remend.models.adapters import check_targets
from remend.models.device import choose_device
from remend.models.find import ModelSource, fetch_model, find_model, origin_note
from remend.models.layers import count_parameters
from remend.models.load import load_config, load_tokenizer, skeleton
from remend.models.vocabulary import compare_vocabularies, template_warnings
from remend.recovery.prompts import StreamData, keep_apart, load_stream
from remend.recovery.rules import notes, problems, warnings
from remend.recovery.settings import BASE, MOVING, SELF, RecoverConfig
from remend.recovery.streams import Stream, reference_of, resolve, rows_of
from remend.training.constraints import CONSTRAINTS, StudentFacts, kind_of
from remend.training.constraints.fitting import shapes as shapes_of
from remend.training.teachers.cache import TeacherCache, is_cache


@dataclass
class Preflight:
    """What the checks found and prepared. Fields below `warnings` are complete only when there is no problem."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    student: ModelSource | None = None
    teacher: ModelSource | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer: Any = None
    shared: int = 0
    parameters: int = 0
    facts: StudentFacts = field(default_factory=lambda: StudentFacts(Recognised("plain", None, False, PLAIN)))
    layers: int = 0
    matrices: dict[str, torch.Size] = field(default_factory=dict)
    repairs: bool = False
    teachers: dict[str, ModelSource] = field(default_factory=dict)
    caches: dict[str, TeacherCache] = field(default_factory=dict)
    streams: list[StreamData] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def main(self) -> StreamData:
        """The stream whose held-out prompts say how much was recovered: the first that the reference teaches."""
        return next((s for s in self.streams if s.by_reference), self.streams[0])

    @property
    def data_hashes(self) -> dict[str, Any]:
        """Of the prompts: of the one stream, or by stream."""
        hashes = {s.stream.name: s.hashes for s in self.streams}
        return dict(self.main.hashes) if len(hashes) == 1 else hashes

    def raise_problems(self) -> None:
        """Raise CheckError when there are problems."""
        if self.problems:
            raise CheckError(self.problems)

    def verdict(self) -> str:
        """One line for a recipe without problems."""
        if not self.streams:
            return "ok: the settings agree; no file was looked at"
        prompts = "; ".join(
            (f"{s.stream.name}: " if len(self.streams) > 1 else "")
            + ("prompts that the reference writes" if s.unwritten else f"{len(s.train)} training")
            + f" and {len(s.held_out)} held-out prompts"
            for s in self.streams
        )
        held = f"; held to {self.constraint}" if self.constraint != "none" else ""
        losses = list(dict.fromkeys(s.stream.loss.words for s in self.streams))
        loss = f"; loss {'; '.join(losses)}" if losses != [of_beta(0.0).words] else ""
        return f"ok: {prompts}, {self.parameters / 1e6:.1f}M parameters, {self.shared} shared token ids{held}{loss}"

    @property
    def constraint(self) -> str:
        """What training holds, in words: a grid's name, a mask's share of zeros, or 'none'."""
        return kind_of(self.facts).describe(self.facts)

    @property
    def layer_map(self) -> Sequence[int] | None:
        """For each of the student's layers the teacher's, where it has fewer and they are known."""
        return self.facts.layer_map

    @contextmanager
    def _collect(self) -> Iterator[None]:
        try:
            yield
        except RemendError as error:
            self.problems.append(str(error))


def preflight(config: RecoverConfig, *, resuming: bool = False, files: bool = True) -> Preflight:
    """Run every check. Problems are collected, not raised; nothing is written.

    No model is loaded: the student's files are read only to see what it is held to. Without `files`, nothing that the
    settings name is looked at.
    """
    found = Preflight()
    if files and not resuming:
        problem = occupied(Path(config.out), inputs=True)
        if problem:
            found.problems.append(problem)
    with found._collect():
        found.device = choose_device(config.device)
    _settings(found, config)
    streams: list[Stream] = []
    reference = ""
    with found._collect():
        streams = resolve(config)
        reference = reference_of(config)
        rows_of(streams, config.batch_size * config.gradient_accumulation)
        found.problems += problems(config, streams, {s.teacher: is_cache(s.teacher) for s in streams})
    found.warnings += warnings(config, streams)
    found.notes += notes(config, streams)
    if not files or not reference:
        return found
    with found._collect():
        found.student = fetch_model(find_model(config.student), weights=False)
    _teachers(found, config, [name for name in (reference, *(s.teacher for s in streams)) if name not in MOVING])
    found.teacher = found.teachers.get(reference)
    if found.student:
        _student(found, config, found.student, based=BASE in (reference, *(s.teacher for s in streams)))
        taught = {s.teacher for s in streams if not s.demonstrations}
        for name, teacher in found.teachers.items():
            _compare(found, config, found.student, name, teacher, alike=name not in taught)
        for cache in found.caches.values():
            with found._collect():
                found.warnings += cache.check(found.tokenizer, found.shared)
                found.shared = min(found.shared, cache.shared)
    for stream in streams:
        if stream.top_k and found.shared and stream.top_k > found.shared:
            found.problems.append(f"top_k is {stream.top_k}; the vocabulary has {found.shared} tokens. Leave it out")
    if config.alignment:
        _alignment(found, config, streams)
    if (reference in found.caches or reference == BASE) and config.diagnose_every:
        why = "a cache has none" if reference in found.caches else "base has the student's own. Name the base model"
        found.problems.append(f"diagnose_every needs the reference's layers in memory; {why}, or set it to 0")
    if reference in found.caches and any(s.data == SELF for s in streams):
        found.problems.append("data: self needs the reference in memory to write prompts; a cache can't")
    with found._collect():
        _reference(found, config, reference)
    _data(found, config, streams, reference)
    if found.parameters and not found.problems:
        _disk(found, config)
    return found


def _teachers(found: Preflight, config: RecoverConfig, names: list[str]) -> None:
    for name in dict.fromkeys(names):
        with found._collect():
            if is_cache(name):
                found.caches[name] = TeacherCache.open(Path(name))
                continue
            found.teachers[name] = fetch_model(find_model(name), weights=False)
            note = origin_note(found.teachers[name])
            found.notes += [note] if note and note not in found.notes else []


def _settings(found: Preflight, config: RecoverConfig) -> None:
    _tracker(found, config.report_to)
    if config.eval_data and config.held_out is not None:
        found.warnings.append("held_out has no effect, since eval_data is given")
    if config.warmup_steps > config.steps > 0:
        found.warnings.append(
            f"warmup_steps {config.warmup_steps} is above steps {config.steps}: the peak learning rate is never reached"
        )


def _alignment(found: Preflight, config: RecoverConfig, streams: list[Stream]) -> None:
    assert config.alignment is not None
    if streams[0].teacher not in found.teachers:
        found.problems.append(
            f"alignment needs a frozen model as the teacher of the first stream, and {streams[0].teacher} is none: its "
            "layers are not there, or move with the student. Name a model, or leave alignment out"
        )
    layers, count = config.alignment.layers, found.layers
    wrong = [layer for layer in layers or [] if count and not 0 <= layer < count]
    if layers is not None and (not layers or wrong):
        found.problems.append(
            f"alignment.layers is {layers}; allowed are the student's layers, 0 to {(count or 1) - 1}, or none for all"
        )


def _tracker(found: Preflight, name: str | None) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType.list() if kind != "all"]
    if name is not None and name not in known:
        found.problems.append(f'unknown report_to "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    elif name is not None and name not in map(str, get_available_trackers()):
        found.problems.append(f"report_to {name} needs the package of that tracker, which is not installed")


def _student(found: Preflight, config: RecoverConfig, student: ModelSource, *, based: bool) -> None:
    trust = config.trust_remote_code
    with found._collect():
        settings = load_config(student, trust_remote_code=trust)
        found.shared = settings.get_text_config().vocab_size
        found.tokenizer = load_tokenizer(student, trust_remote_code=trust)
        found.warnings += _ending(found.tokenizer, student)
        shapes = skeleton(settings, trust_remote_code=trust)
        found.parameters = count_parameters(shapes)
        if config.lora:
            check_targets(shapes, config.lora.targets)
        found.layers, found.matrices = settings.get_text_config().num_hidden_layers, shapes_of(shapes)
        _layer_map(config.layer_map, found.layers)
    if config.lora and student.kind == "adapter":
        found.problems.append(f"student {config.student} is an adapter, which is trained as it is; leave lora out")
    _constraint(found, config, student)
    adapted = bool(config.lora) or student.kind == "adapter"
    if based and not adapted:
        found.problems.append(
            "teacher base is the student without its adapter, and there is none; set lora, or name one"
        )
    if config.merge and not adapted:
        found.problems.append("merge: true has no adapter to fold in; set lora, or leave merge out")
    elif config.merge and found.constraint != "none":
        found.problems.append(
            f"merge: true would take the student off what it is held to ({found.constraint}); leave the adapter apart"
        )


def _layer_map(given: list[int] | None, layers: int) -> None:
    if given is not None and (len(given) != layers or min(given) < 0 or given != sorted(set(given))):
        raise InputError(
            f"layer_map {given} must name, rising from 0, one of the teacher's layers for each of the "
            f"student's {layers}"
        )


def _compare(
    found: Preflight, config: RecoverConfig, student: ModelSource, name: str, teacher: ModelSource, *, alike: bool
) -> None:
    same = student.path is not None and teacher.path is not None and student.path.resolve() == teacher.path.resolve()
    if same and not alike:
        found.problems.append(
            f"teacher {name} is the student's own model: a frozen teacher that equals the "
            "student teaches nothing. "
            "Name the healthy checkpoint from before the damage, or initial for the student as it came in."
        )
        return
    trust = config.trust_remote_code
    with found._collect():
        if found.tokenizer is None:
            return
        settings = load_config(teacher, trust_remote_code=trust)
        tokenizer = load_tokenizer(teacher, trust_remote_code=trust)
        rows = load_config(student, trust_remote_code=trust).get_text_config().vocab_size
        theirs = settings.get_text_config().vocab_size
        match = compare_vocabularies(found.tokenizer.get_vocab(), tokenizer.get_vocab(), rows, theirs)
        found.shared = min(found.shared, match.shared)
        found.problems += match.problems
        found.warnings += [w for w in match.warnings if w not in found.warnings]
        found.warnings += [w for w in template_warnings(found.tokenizer, tokenizer) if w not in found.warnings]


def _reference(found: Preflight, config: RecoverConfig, reference: str) -> None:
    """What of the settings must fit the reference's shapes: the map of layers, and one-shot repair."""
    wanted = bool(found.layer_map) or (config.repair and found.facts.compressed)
    if not wanted or not found.layers or (found.teacher is None and reference not in found.caches):
        return
    theirs = None
    if found.teacher is not None:
        settings = load_config(found.teacher, trust_remote_code=config.trust_remote_code)
        theirs = skeleton(settings, trust_remote_code=config.trust_remote_code)
        depth = settings.get_text_config().num_hidden_layers
        given = found.layer_map
        if given and (len(given) != found.layers or max(given) >= depth):
            where = "layer_map" if config.layer_map else f"the layer map in the student's {RECORD}"
            what = f"{where}, {given}, does not fit a student of {found.layers} layers and a teacher of {depth}"
            if config.layer_map:
                raise InputError(f"{what}: name, below {depth}, one of the teacher's for each of the student's")
            found.warnings.append(f"{what}, and is left aside")
            found.facts = replace(found.facts, layer_map=None)
    if config.repair and found.facts.compressed:
        taught = shapes_of(theirs) if theirs is not None else None
        why = kind_of(found.facts).no_repair(found.facts, found.matrices, taught)
        found.repairs = why is None
        found.notes += [f"the student is not repaired before training: {why}"] if why else []


def _constraint(found: Preflight, config: RecoverConfig, student: ModelSource) -> None:
    directory = student.path if student.kind == "directory" else None
    adapted = bool(config.lora) or student.kind == "adapter"
    with found._collect():
        record = read_json(directory / RECORD) if directory and (directory / RECORD).is_file() else {}
        held, dense = recognise(student, as_dense=config.as_dense), config.as_dense
        layer_map = config.layer_map or record.get("layer_map")
        found.facts = StudentFacts(held, directory, record, adapted=adapted, as_dense=dense, layer_map=layer_map)
        found.problems += [what for kind in CONSTRAINTS.entries() if (what := kind.lost(found.facts))]
        if held.kind != "remend" and held.why != PLAIN:
            found.notes.append(f"student {config.student}: {held.why}")
        if config.train_embeddings and adapted:
            found.warnings.append("train_embeddings has no effect, since an adapter is trained")


def _ending(tokenizer: Any, source: ModelSource) -> list[str]:
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


def _data(found: Preflight, config: RecoverConfig, streams: list[Stream], reference: str) -> None:
    for stream in streams:
        if stream.teacher in found.caches or found.tokenizer is not None:
            with found._collect():
                cache = found.caches.get(stream.teacher)
                data = load_stream(stream, config, found.tokenizer, cache, by_reference=stream.teacher == reference)
                found.streams.append(data)
                found.problems += data.problems
                found.warnings += data.warnings
                found.dropped.update(data.dropped)
    wrong, said = keep_apart(found.streams)
    found.problems += wrong
    found.warnings += said


def _disk(found: Preflight, config: RecoverConfig) -> None:
    saved = min(config.keep_checkpoints + 1, config.steps // config.save_every) if config.save_every else 0
    # an adapter's checkpoints hold the adapter alone, a hundredth of the model or so; ema adds its average
    each = 16 if any(s.stream.teacher == "ema" for s in found.streams) else 12
    adapted = config.lora or (found.student and found.student.kind == "adapter")
    trained = found.parameters // 50 if adapted else found.parameters
    best = 4 * trained if config.selects == "best" else 0
    need = trained * each * saved + best + 4 * found.parameters
    target = Path(config.out)
    while not target.exists():
        target = target.parent
    free = shutil.disk_usage(target).free
    if need > free:
        found.problems.append(
            f"out {config.out}: the run writes up to {need / 2**30:.1f} GiB (model and {saved} "
            f"checkpoints of {each} bytes a trained "
            f"parameter) and {free / 2**30:.1f} GiB are free; lower keep_checkpoints, raise save_every, "
            "or name another disk"
        )
