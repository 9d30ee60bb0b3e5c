"""The models that are diagnosed: found, named, compared with the reference's tokenizer, and told apart by kind.

A student is named as everywhere, or by a recovery's run directory: then its model is meant, and the run says which
student it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remend.compression.recognise import recognise
from remend.console import stage
from remend.errors import InputError
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST
from remend.models.find import ModelSource, find_model
from remend.models.layers import count_parameters, infer_layer_map
from remend.models.load import load_config, load_tokenizer, skeleton
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.room import Room, room_of
from remend.models.vocabulary import compare_vocabularies, cutting_warnings, template_warnings, unknown_ids
from remend.models.written import RECORD


@dataclass(frozen=True)
class Subject:
    """A student.

    name: short and distinct; spec: as the user gave it; made_from: what it was recovered from, if a run says.
    """

    name: str
    spec: str
    source: ModelSource
    made_from: str | None


def find(specs: Sequence[str], *, trust_remote_code: bool = False) -> list[Subject]:
    """All students. Raises InputError for none or for one that is given twice, FileError for one that is not there."""
    if not specs:
        raise InputError("no student is given; name at least one with --student")
    students: list[Subject] = []
    for spec in specs:
        path = Path(spec)
        folder = path / "model" if (path / MANIFEST).is_file() and (path / "model").is_dir() else path
        source = find_model(str(folder) if folder != path else spec, trust_remote_code=trust_remote_code)
        if any(source == other.source for other in students):
            raise InputError(f"student {spec} is given twice; every student is measured once")
        students.append(Subject(_name(spec, [s.name for s in students]), spec, source, _made_from(folder)))
    return students


def _name(spec: str, taken: Sequence[str]) -> str:
    parts = [part for part in Path(spec).parts if part not in ("/", ".", "..", "model")] or [spec]
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if name not in taken:
            return name
    return f"{spec} ({len(taken) + 1})"


def _made_from(folder: Path) -> str | None:
    manifest = folder.parent / MANIFEST
    if folder.name != "model" or not manifest.is_file():
        return None
    return str(read_object(manifest).get("recipe", {}).get("student") or "") or None


def degraded_of(subjects: Sequence[Subject]) -> list[int | None]:
    """For each student the number of the one that it is compared with: what it was recovered from where that is among
    them, else the first (the first itself has none)."""
    paths = [_where(subject.source.path) for subject in subjects]
    numbers: list[int | None] = []
    for i, subject in enumerate(subjects):
        origin = _where(Path(subject.made_from)) if subject.made_from else None
        known = paths.index(origin) if origin in paths and origin is not None else None
        numbers.append(known if known is not None and known != i else (0 if i else None))
    return numbers


def _where(path: Path | None) -> Path | None:
    return path.resolve() if path else None


@dataclass(frozen=True)
class Vocabulary:
    """Leading ids that the reference and all students share, what is to be said of it, and what can be read by all.

    unknown: by student, token ids of the reference's tokenizer that it does not know.
    """

    shared: int
    warnings: list[str]
    room: Room
    unknown: Mapping[str, frozenset[int]]


def compare(reference: ModelSource, subjects: Sequence[Subject], tokenizer: Tokenizer) -> Vocabulary:
    """One vocabulary for all. Raises InputError with every student that has another."""
    room = _room(reference)
    rows = shared = room.rows
    problems, warnings, unknown = [], [], {}
    for subject in subjects:
        read = _room(subject.source)
        theirs = read.rows
        other = load_tokenizer(subject.source)
        match = compare_vocabularies(other.get_vocab(), tokenizer.get_vocab(), theirs, rows)
        problems += [f"{subject.spec}: {problem}" for problem in match.problems]
        cut = [] if match.problems else cutting_warnings(other, tokenizer, "reference")
        told = [*match.warnings, *template_warnings(other, tokenizer, "reference"), *cut]
        warnings += [f"{subject.spec}: {warning}" for warning in told]
        shared, room = min(shared, match.shared), replace(room.less(read), rows=rows)
        unknown[subject.name] = unknown_ids(tokenizer.get_vocab(), other.get_vocab(), theirs)
    if problems:
        raise InputError("\n".join(problems))
    return Vocabulary(shared, warnings, room, unknown)


def _room(source: ModelSource) -> Room:
    config = load_config(source)
    return room_of(skeleton(source, config), config)


def kind_of(subject: Subject, student: CausalLM, reference: CausalLM) -> str:
    """'grid', 'mask', 'smaller' or 'dense': what a recovery would hold it to."""
    held = recognise(subject.source, as_dense=True)
    if held.stored is not None:
        return "grid"
    if held.mask:
        return "mask"
    count = count_parameters
    return "smaller" if count(student) < count(reference) else "dense"


def layer_map(subject: Subject, student: CausalLM, reference: CausalLM, given: Sequence[int] | None) -> list[int]:
    """For each of the student's layers the reference's that it is: given, recorded, equal in number, or by weights.

    Raises InputError where none is found.
    """
    ours, theirs = (m.config.get_text_config().num_hidden_layers for m in (student, reference))
    if given is not None and ours != theirs:
        if len(given) != ours or list(given) != sorted(set(given)) or not 0 <= given[0] <= given[-1] < theirs:
            raise InputError(
                f"layer_map {list(given)} must name, rising and below {theirs}, one of the reference's layers for each "
                f"of the {ours} of {subject.spec}"
            )
        return list(given)
    if ours == theirs:
        return list(range(ours))
    path = subject.source.path
    if path and (path / RECORD).is_file():
        recorded = read_object(path / RECORD).get("layer_map")
        numbers = isinstance(recorded, list) and all(type(at) is int for at in recorded)
        if (
            isinstance(recorded, list)
            and numbers
            and len(recorded) == ours
            and recorded == sorted(set(recorded))
            and recorded[0] >= 0
            and recorded[-1] < theirs
        ):
            return list(recorded)
    with stage(f"finding which of the reference's layers {subject.name} has kept"):
        try:
            return infer_layer_map(student, reference)
        except (InputError, RuntimeError) as error:
            raise InputError(
                f"no layer map is found for {subject.spec}: {error}. Give one with --layer-map, or another reference"
            ) from None
