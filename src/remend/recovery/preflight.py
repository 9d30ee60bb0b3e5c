"""Everything that can be known about a recovery before training: a frozen plan, or all problems at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from remend.compression.formats import GridFormat
from remend.compression.recognise import PLAIN, Recognised, read_record, recognise
from remend.data.examples import Example
from remend.data.templates import encode
from remend.errors import FileError, InputError, did_you_mean, shortened
from remend.files.launch import HOW, alone_among_several, mixed_precision, processes, refusals
from remend.files.reading import read_object
from remend.files.run_directory import occupied
from remend.models.activations.capture import LEAST_ROWS
from remend.models.activations.walkable import seen_of_skeleton
from remend.models.adapters import check_targets, unmergeable, untouched_experts
from remend.models.attention import attention_problem
from remend.models.device import choose_device, choose_dtype, device_problem, gpu_has_bfloat16
from remend.models.find import ModelSource, fetch_model, find_model, origin_note
from remend.models.load import check_weights, load_config, load_tokenizer, skeleton
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.room import Room, room_of
from remend.models.sizes import Size, size_of
from remend.models.vocabulary import ending_problem, unreadable
from remend.models.written import RECORD
from remend.recovery import alignment
from remend.recovery.calibration_text import TOKENS as REPAIR_TOKENS
from remend.recovery.calibration_text import Reader, read_repair_text
from remend.recovery.epochs import in_steps
from remend.recovery.estimate import Train
from remend.recovery.findings import Findings
from remend.recovery.forecast import disk_at_most, free_disk, streams_of
from remend.recovery.memory import activation_bytes
from remend.recovery.output_directory import inside, unwritable
from remend.recovery.placing import REPAIRED, place_models
from remend.recovery.plan import Checked, Plan
from remend.recovery.prompts import Prompts, StreamData, kept_apart, load_stream
from remend.recovery.rules import notes_of_length, problems, problems_of_length, warnings, warnings_of_length
from remend.recovery.settings import SELF, RecoverConfig
from remend.recovery.streams import Stream, reference_of, resolve, rows_of
from remend.report.recovery import FEW
from remend.training.constraints import CONSTRAINTS, StudentFacts, kind_of
from remend.training.constraints.fitting import shapes
from remend.training.optimizers import OPTIMIZERS
from remend.training.teachers import NamedTeacher, as_directory, named

SELF_WRITTEN = Example("that the reference writes", "text", {})
"""Stands for the prompts that are not there yet."""


@dataclass(frozen=True)
class Student:
    """What is known of the student from its configuration and tokenizer alone."""

    source: ModelSource
    tokenizer: Tokenizer
    room: Room
    eos: set[int]
    size: Size
    activation: int
    layers: int
    matrices: Mapping[str, torch.Size]


def preflight(config: RecoverConfig, *, resuming: bool = False, files: bool = True) -> Checked:
    """Run every check. Problems are collected, not raised; nothing is written.

    No model is loaded: the student's files are read only to see what it is held to. Without `files`, nothing that the
    settings name is looked at.
    """
    say, began = Findings(), time.monotonic()
    if files and not resuming and (problem := occupied(Path(config.out), inputs=True) or unwritable(config.out)):
        say.problems.append(problem)
    device = torch.device("cpu")
    with say.collecting():
        device = choose_device(config.device)
        say.problems += [problem] if (problem := OPTIMIZERS.get(config.optimizer).problem(device)) else []
    _check_settings(config, say)
    _check_launch(config, device, say)
    if config.dtype == "bfloat16" and device.type == "cuda" and not gpu_has_bfloat16():
        say.warnings.append("this GPU has no bfloat16 of its own, and emulates it; dtype: auto takes float32")
    streams, reference = _streams(config, say)
    if config.epochs is None:
        _check_length(config, streams, say)
    plan = _plan(config, device, streams, reference, say, resuming=resuming) if files and reference else None
    if plan:
        plan = replace(plan, checked_in=time.monotonic() - began)
    return Checked(plan if not say.problems else None, say.problems, say.warnings, say.notes)


def _streams(config: RecoverConfig, say: Findings) -> tuple[list[Stream], str]:
    """The recipe's streams and the reference's name, which is empty where there is none."""
    streams: list[Stream] = []
    reference = ""
    with say.collecting():
        streams = resolve(config)
        reference = reference_of(config)
        rows_of(streams, config.prompts_a_step)
        say.problems += problems(config, streams)
    say.warnings += warnings(config, streams)
    return streams, reference


def _check_length(config: RecoverConfig, streams: Sequence[Stream], say: Findings) -> None:
    """What does not fit the number of steps."""
    if not streams:
        return
    say.problems += problems_of_length(config)
    say.warnings += warnings_of_length(config, streams)
    say.notes += notes_of_length(config, streams)


def _plan(
    config: RecoverConfig,
    device: torch.device,
    streams: Sequence[Stream],
    reference: str,
    say: Findings,
    *,
    resuming: bool,
) -> Plan | None:
    """The plan, after a look at all files; None where the student can't be told. Problems go to `say`."""
    source = None
    with say.collecting():
        source = fetch_model(find_model(config.student, trust_remote_code=config.trust_remote_code), weights=False)
    teachers = _opened_teachers(config, [reference, *(s.teacher.name for s in streams)], say)
    say.problems += [] if resuming else inside(config.out, _directories(source, teachers))
    student, facts, shared, unknown = None, None, 0, dict[str, frozenset[int]]()
    if source:
        student = _student(config, source, choose_dtype(config.dtype, device).itemsize, say)
        facts = _facts(config, source, say)
        _check_adapter(config, source, facts, teachers, say)
    for files in [source, *(teacher.source for teacher in teachers.values())]:
        with say.collecting():
            told = check_weights(files) if files else []
            say.warnings += [text for text in told if text not in say.warnings]
            how = config.attn_implementation
            problem = attention_problem(files.base or files, how) if files and how else None
            say.problems += [problem] if problem and problem not in say.problems else []
    if student:
        shared, unknown = _shared(student, teachers, streams, say)
        _check_tokens(student, shared, say)
    for stream in streams:
        if stream.top_k and shared and stream.top_k > shared:
            say.problems.append(f"top_k is {stream.top_k}; the vocabulary has {shared} tokens. Leave it out")
    say.problems += alignment.problems(config, streams[0].teacher, student.layers if student else 0)
    healthy = teachers.get(reference, named(reference))
    if healthy.no_layers and config.diagnose_every:
        say.problems.append(
            f"diagnose_every needs the reference's layers in memory; {healthy.no_layers}, or set it to 0"
        )
    if healthy.brings_prompts and any(s.data == SELF for s in streams):
        say.problems.append("data: self needs the reference in memory to write prompts; a cache can't")
    repairs = False
    if student and facts:
        with say.collecting():
            repairs, facts = _fit_to_reference(config, student, facts, healthy, say)
    data: list[StreamData] = []
    if student:
        for stream in streams:
            with say.collecting():
                name = stream.teacher.name
                if name not in teachers and stream.data is None:
                    continue  # the problem of opening what brings the prompts is told already
                teacher = teachers.get(name, stream.teacher)
                answer = max(*stream.lengths, REPAIR_TOKENS if repairs else 0)
                empty = StreamData(stream, name == reference, room=_room(student, teacher), answer=answer)
                loaded = load_stream(empty, config, student.tokenizer, teacher, say)
                asked = (
                    [encode(student.tokenizer, SELF_WRITTEN)] if loaded.unwritten else [*loaded.train, *loaded.held_out]
                )
                say.problems += unreadable(student.tokenizer, asked, unknown.get(name, frozenset()), f"teacher {name}")
                data.append(loaded)
    data = kept_apart(data, say)
    text = None
    if student and facts and repairs and config.repair_text:
        alien = unknown.get(reference, frozenset())
        reader = Reader(student.tokenizer, sorted(student.eos), _room(student, healthy), reference, alien)
        count = config.repair_samples or kind_of(facts).repair_answers(facts)
        text = read_repair_text(config, reader, data, count, say)
    elif config.repair_text and student:
        say.warnings.append("repair_text has no effect, since the student is not repaired")
    if student is None or facts is None or say.problems:
        return None
    config, epochs = in_steps(config, data)
    if epochs:
        _check_length(config, streams, say)
    plan = Plan(
        config=config,
        epochs=epochs,
        student=student.source,
        tokenizer=student.tokenizer,
        shared=shared,
        size=student.size,
        reference_size=_size(healthy),
        activation=student.activation,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        facts=facts,
        repairs=repairs,
        reference=reference,
        teachers=teachers,
        prompts=Prompts(tuple(data)),
        warnings=tuple(say.warnings),
        notes=tuple(say.notes),
        repair_text=text,
    )
    plan = replace(plan, placed=place_models(plan, say))
    _check_disk(plan, say, _written(config.out) if resuming else 0)
    _check_held_out(plan, say)
    return replace(plan, warnings=tuple(say.warnings))


def _size(teacher: NamedTeacher) -> Size | None:
    """Of a teacher that is loaded beside the student; None for a view of the student, and for stored answers."""
    if teacher.source is None:
        return None
    settings = load_config(teacher.source)
    return size_of(skeleton(teacher.source, settings), settings)


def _directories(student: ModelSource | None, teachers: Mapping[str, NamedTeacher]) -> dict[str, Path | None]:
    """Where the models lie, by what they are to the run; those of the hub's cache are nobody's own."""
    sources = {"the student": student, **{f"teacher {name}": teacher.source for name, teacher in teachers.items()}}
    return {what: source.path for what, source in sources.items() if source and not source.repo}


def _opened_teachers(config: RecoverConfig, names: Sequence[str], say: Findings) -> dict[str, NamedTeacher]:
    teachers: dict[str, NamedTeacher] = {}
    for name in dict.fromkeys(names):
        with say.collecting():
            teacher = teachers[name] = named(name).opened(trust_remote_code=config.trust_remote_code)
            note = origin_note(teacher.source) if teacher.source else None
            say.notes.extend([note] if note and note not in say.notes else [])
    return teachers


def _check_settings(config: RecoverConfig, say: Findings) -> None:
    if config.report_to is not None:
        _check_tracker(config.report_to, say)
    if config.eval_data and config.held_out is not None:
        say.warnings.append("held_out has no effect, since eval_data is given")


def _check_launch(config: RecoverConfig, device: torch.device, say: Findings) -> None:
    """What the processes that were launched can't share, and what of accelerate's configuration can't be had."""
    count = processes()
    say.problems += refusals()
    if (problem := device_problem(device)) is not None:
        say.problems.append(problem)
    if count > config.prompts_a_step:
        say.problems.append(
            f"{count} processes share the prompts of a step, which are {config.prompts_a_step}; launch "
            f"{config.prompts_a_step} at most, or raise prompts_per_step"
        )
    if count > 1 and config.alignment is not None:
        say.problems.append(
            f"alignment compares the rows of a micro-batch, which {count} processes cut otherwise than one; leave it "
            "out, or launch one process"
        )
    if mixed_precision() == "bf16" and choose_dtype(config.dtype, device) == torch.float32:
        say.warnings.append("accelerate's mixed_precision bf16 has no effect: dtype decides, and it is float32 here")
    if alone_among_several():
        say.warnings.append(
            "accelerate launch was asked for several processes and has started this one alone, as it does on a CPU; "
            f"{HOW} N -m remend … starts N that share a step"
        )


def _check_tracker(name: str, say: Findings) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType.list() if kind != "all"]
    if name not in known:
        say.problems.append(f'unknown report_to "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    elif name not in map(str, get_available_trackers()):
        say.problems.append(f"report_to {name} needs the package of that tracker, which is not installed")


def _student(config: RecoverConfig, source: ModelSource, itemsize: int, say: Findings) -> Student | None:
    with say.collecting():
        settings = load_config(source)
        text = settings.get_text_config()
        tokenizer = load_tokenizer(source)
        told = _told_eos(source, say)
        say.warnings += _ending(tokenizer, told, text.vocab_size)
        ends = _ids(told or text.eos_token_id) | _ids(tokenizer.eos_token_id)
        model = skeleton(source, settings)
        if config.lora:
            check_targets(model, config.lora.targets)
            left = untouched_experts(model)
            say.warnings += [left] if left else []
        if config.merge and source.kind == "adapter" and source.path and (why := unmergeable(source.path, model)):
            say.problems.append(
                f"merge: true can't fold the adapter {config.student} into its base: {why}; leave merge out"
            )
        layers, given = text.num_hidden_layers, config.layer_map
        if given is not None and (len(given) != layers or min(given) < 0 or given != sorted(set(given))):
            raise InputError(
                f"layer_map {given} must name, rising from 0, one of the teacher's layers for each of the student's "
                f"{layers}"
            )
        train: Train = "adapter" if config.lora or source.kind == "adapter" else config.train
        size, kept = size_of(model, settings), activation_bytes(text, 1, 1, itemsize, train)
        return Student(source, tokenizer, room_of(model, settings), ends, size, kept, layers, shapes(model))
    return None


def _check_adapter(
    config: RecoverConfig,
    source: ModelSource,
    facts: StudentFacts | None,
    teachers: Mapping[str, NamedTeacher],
    say: Findings,
) -> None:
    """What of the settings is about an adapter, where there is none, or one too many."""
    if config.lora and source.kind == "adapter":
        say.problems.append(f"student {config.student} is an adapter, which is trained as it is; leave lora out")
    adapted = bool(config.lora) or source.kind == "adapter"
    if not adapted and any(t.moving and t.healthy for t in teachers.values()):
        say.problems.append(
            "teacher base is the student without its adapter, and there is none; set lora, or name one"
            + as_directory("base")
        )
    constraint = kind_of(facts).describe(facts) if facts else "none"
    if config.save_dtype and adapted and not config.merge:
        say.warnings.append("save_dtype has no effect, since an adapter is saved, in float32")
    elif config.save_dtype in ("bfloat16", "float16") and facts and facts.recognised.stored and not adapted:
        say.problems.append(
            f"save_dtype {config.save_dtype} would take the student off its grid ({constraint}), whose points are "
            "saved exactly, in float32; leave it out. remend export writes them in their few bits"
        )
    if config.merge and not adapted:
        say.problems.append("merge: true has no adapter to fold in; set lora, or leave merge out")
    elif config.merge and constraint != "none":
        say.problems.append(
            f"merge: true would take the student off what it is held to ({constraint}); leave the adapter apart"
        )


def _shared(
    student: Student, teachers: Mapping[str, NamedTeacher], streams: Sequence[Stream], say: Findings
) -> tuple[int, dict[str, frozenset[int]]]:
    """How many leading token ids mean the same to the student and all its teachers; and what each does not know."""
    shared, unknown = student.room.rows, {}
    # a teacher that sees no more of the prompt than the student, in some stream
    alike = {s.teacher.name for s in streams if not s.demonstrations}
    # teachers that bring completions come last: what they hold is compared with what is left of the vocabulary
    for name, teacher in sorted(teachers.items(), key=lambda item: item[1].brings_prompts):
        with say.collecting():
            rows = shared if teacher.brings_prompts else student.room.rows
            fit = teacher.compare(student.source, student.tokenizer, rows, shown_more=name not in alike)
            if fit is not None:
                say.problems.extend(fit.problems)
                say.warnings += [warning for warning in fit.warnings if warning not in say.warnings]
                shared, unknown[name] = min(shared, fit.shared), fit.unknown
    return shared, unknown


def _room(student: Student, teacher: NamedTeacher) -> Room:
    """What both can read; ids are the student's, since what a teacher does not know is told apart."""
    if teacher.source is None:
        return student.room
    settings = load_config(teacher.source)
    theirs = room_of(skeleton(teacher.source, settings), settings)
    return replace(student.room.less(theirs), rows=student.room.rows)


def _fit_to_reference(
    config: RecoverConfig, student: Student, facts: StudentFacts, reference: NamedTeacher, say: Findings
) -> tuple[bool, StudentFacts]:
    """Whether one-shot repair has an effect; and the facts, without a map of layers that does not fit the reference."""
    repairs, theirs = config.repair and facts.compressed, None
    if not (facts.layer_map or repairs):
        return False, facts
    if reference.source is not None:
        settings = load_config(reference.source)
        theirs = shapes(skeleton(reference.source, settings))
        facts = _with_fitting_layers(config, student, facts, settings.get_text_config().num_hidden_layers, say)
    elif not reference.brings_prompts:
        return False, facts  # the reference is the student's own base
    if not repairs:
        return False, facts
    why = kind_of(facts).no_repair(facts, student.matrices, theirs)
    say.notes.extend([f"the student is not repaired before training: {why}"] if why else [])
    if why is None:
        sources = [student.source, *([reference.source] if reference.source else [])]
        models = [skeleton(source, load_config(source)) for source in sources]
        if _alike(*models):
            models = models[:1]
        say.problems += dict.fromkeys(text for model in models if (text := seen_of_skeleton(model)))
    return why is None, facts


def _alike(first: CausalLM, *others: CausalLM) -> bool:
    """Whether models are of one class with the same shapes, so that what shapes tell of one they tell of all."""
    of = [(type(m), {name: weight.shape for name, weight in m.named_parameters()}) for m in (first, *others)]
    return all(one == of[0] for one in of)


def _with_fitting_layers(
    config: RecoverConfig, student: Student, facts: StudentFacts, depth: int, say: Findings
) -> StudentFacts:
    """The facts, without a map of layers that does not fit a teacher of `depth` layers."""
    placed = facts.layer_map
    if not placed or (len(placed) == student.layers and max(placed) < depth):
        return facts
    where = "layer_map" if config.layer_map else f"the layer map in the student's {RECORD}"
    what = f"{where}, {list(placed)}, does not fit a student of {student.layers} layers and a teacher of {depth}"
    if config.layer_map:
        raise InputError(f"{what}: name, below {depth}, one of the teacher's for each of the student's")
    say.warnings.append(f"{what}, and is left aside")
    return replace(facts, layer_map=None)


def _facts(config: RecoverConfig, source: ModelSource, say: Findings) -> StudentFacts | None:
    """What the student's files say that training must keep, and how it came about."""
    directory = source.path if source.kind == "directory" else None
    adapted = bool(config.lora) or source.kind == "adapter"
    with say.collecting():
        record = read_record(directory) if directory else {}
        held, dense = recognise(source, as_dense=config.as_dense), config.as_dense
        placed = config.layer_map or _recorded_map(record, say)
        say.warnings += _other_grid(record, held)
        facts = StudentFacts(
            held, directory, record, adapted=adapted, as_dense=dense, layer_map=placed, train=config.train
        )
        say.problems.extend(what for kind in CONSTRAINTS.entries.values() if (what := kind.lost(facts)))
        if held.kind != "remend" and held.why != PLAIN:
            say.notes.append(f"student {config.student}: {held.why}")
        if config.train != "all" and adapted:
            say.problems.append(f"train: {config.train} trains no adapter; leave train out, or lora")
        if config.train_embeddings and config.train != "all":
            say.problems.append(f"train_embeddings has no effect with train: {config.train}; leave one of them out")
        if config.train_embeddings and adapted:
            say.warnings.append("train_embeddings has no effect, since an adapter is trained")
        return facts
    return None


def _recorded_map(record: Mapping[str, object], say: Findings) -> list[int] | None:
    """The layer map of a degradation.json, where it is one."""
    placed = record.get("layer_map")
    if placed is None:
        return None
    numbers = isinstance(placed, list) and placed and all(type(at) is int and at >= 0 for at in placed)
    if isinstance(placed, list) and numbers and placed == sorted(set(placed)):
        return placed
    say.warnings.append(
        f"the layer map in the student's {RECORD}, {shortened(placed, 60)}, is no list of layers that rises "
        "from 0, and is left aside"
    )
    return None


def _other_grid(record: Mapping[str, object], held: Recognised) -> list[str]:
    """Whether a degradation.json tells of another grid than the one that lies beside it."""
    told = record.get("format")
    if held.kind != "remend" or not held.stored or not isinstance(told, str):
        return []
    try:
        same = GridFormat.parse(told).name == held.stored.format.name
    except InputError:
        same = False
    return (
        []
        if same
        else [
            f"the student's {RECORD} tells of the grid {shortened(told, 40)}, and its files hold "
            f"{held.stored.format.name}, which counts; the record may be another model's"
        ]
    )


def _told_eos(source: ModelSource, say: Findings) -> Any:
    """The token or tokens that end answers by the generation configuration, None where it tells none."""
    path = source.path / "generation_config.json" if source.kind == "directory" and source.path else None
    if path and path.is_file():
        try:
            return read_object(path).get("eos_token_id")
        except FileError as error:
            say.warnings.append(f"{error}; transformers' defaults hold")
    return None


def _ids(value: Any) -> set[int]:
    return {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}


def _ending(tokenizer: Tokenizer, told: Any, rows: int) -> list[str]:
    if tokenizer.eos_token_id is None:
        return ["the student's tokenizer has no end-of-sequence token: every rollout will run to max_new_tokens"]
    ends = _ids(told)
    beyond = sorted(end for end in ends if not 0 <= end < rows)
    said = [
        f"the generation config ends answers at token {end}, and the model has {rows} rows: it can never write "
        "that token, so no answer ends there; correct eos_token_id in generation_config.json"
        for end in beyond
    ]
    if tokenizer.eos_token_id not in ends and len(beyond) < len(ends):
        said.append(
            f"the generation config ends answers at token {told}, the tokenizer at {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}); rollouts end at either"
        )
    return said


def _check_tokens(student: Student, shared: int, say: Findings) -> None:
    """Tokens that steer the student, and that nothing can be done with here."""
    rows, pad = student.room.rows, student.tokenizer.pad_token_id
    if shared and (problem := ending_problem(student.tokenizer, student.eos, shared, rows)):
        say.problems.append(problem)
    if pad is not None and pad >= rows:
        say.warnings.append(
            f"the student's pad token {pad} has no row in its embedding of {rows}; nothing here reads it, but other "
            "programs that pad batches may fail"
        )


def _check_disk(plan: Plan, say: Findings, written: int) -> None:
    """Whether the disk has room for what the run writes beyond the bytes that it has `written` already."""
    config, needed = plan.config, disk_at_most(plan)
    free = free_disk(config.out)
    blocks = REPAIRED * plan.size.matrices if plan.repairs and plan.placed.student.by_block else 0
    if needed.total + blocks > free + written:
        there = f", of which {_size_in_words(written)} are there already," if written else ""
        what, way = "the model", "free some space"
        if needed.checkpoints:
            what += f", {needed.checkpoints} checkpoints of {_size_in_words(needed.checkpoint)}"
            way = "lower keep_checkpoints, raise save_every"
        what += ", the repaired blocks" if blocks else ""
        say.problems.append(
            f"out {config.out}: the run writes up to {_size_in_words(needed.total + blocks)} ({what}){there} and "
            f"{_size_in_words(free)} are free; {way}, or name another disk"
        )


def _written(out: str) -> int:
    """Bytes of a run's checkpoints and models."""
    return sum(path.stat().st_size for path in Path(out).rglob("*.safetensors") if path.is_file())


def _size_in_words(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _check_held_out(plan: Plan, say: Findings) -> None:
    """Warn where the measurement will say little."""
    count = streams_of(plan)[0].held_out
    if plan.config.diagnose_every and count < LEAST_ROWS:
        say.problems.append(
            f"diagnose_every compares layers over the held-out prompts, {LEAST_ROWS} at least, and there are {count}; "
            "raise held_out, give more eval_data, or set diagnose_every to 0"
        )
    if 0 < count < FEW:
        be = "prompt is held out" if count == 1 else "prompts are held out"
        say.warnings.append(
            f"{count} {be} to measure the recovery: an interval over fewer than {FEW} says little. Give more prompts, "
            "a larger held_out, or eval_data"
        )
