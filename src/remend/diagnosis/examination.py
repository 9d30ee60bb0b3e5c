"""What all students of a diagnosis share, found before anything is measured: models, tokenizer, prompts, device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from remend.console import console, stage
from remend.data.examples import Example, bundled, choose, load_examples
from remend.data.templates import Encoded, dropped_text, encode_within
from remend.diagnosis import layers, subjects
from remend.diagnosis.settings import DiagnoseSettings
from remend.diagnosis.subjects import Subject
from remend.errors import InputError
from remend.files.launch import refusals
from remend.files.run_directory import occupied
from remend.models.activations.capture import LEAST_ROWS, SITES
from remend.models.blocks.placement import Placed, numbers_in, place
from remend.models.device import choose_device, choose_dtype, device_problem
from remend.models.find import ModelSource, fetch_model, find_model
from remend.models.load import check_weights, load_tokenizer
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.vocabulary import unreadable

GPU_ROWS, CPU_ROWS = 1024, 256

PROMPT_TOKENS = 1024

BYTES = 5
"""That a number of a model takes: float32, and some space."""


@dataclass(frozen=True)
class Examination:
    """A diagnosis that can begin.

    sites: the residual stream first. shared: leading token ids that all models share. examples: by id.
    prompts: the examples that are short enough, encoded. placed: where each model is kept.
    """

    settings: DiagnoseSettings
    sites: tuple[str, ...]
    source: ModelSource
    subjects: Sequence[Subject]
    tokenizer: Tokenizer
    shared: int
    examples: Mapping[str, Example]
    prompts: Sequence[Encoded]
    device: torch.device
    dtype: torch.dtype
    state: PartialState
    warnings: Sequence[str]
    placed: Mapping[ModelSource, Placed]

    def load(self, source: ModelSource, name: str) -> CausalLM:
        """A model, its weights without gradients."""
        with stage(f"loading {name}"):
            placed = self.placed[source]
            return placed.load(source, dtype=self.dtype, device=self.device).requires_grad_(False)


def examination(settings: DiagnoseSettings) -> Examination:
    """Find the models, compare their vocabularies and take the prompts.

    Raises InputError and FileError, see `remend.diagnose`.
    """
    sites = tuple(dict.fromkeys(("residual", *settings.sites)))
    _check(settings, sites)
    device = choose_device(settings.device)
    problems = [*refusals(), *([problem] if (problem := device_problem(device)) else [])]
    if problems:
        raise InputError("\n".join(problems))
    state = PartialState(cpu=device.type == "cpu")
    trust = settings.trust_remote_code
    source = find_model(settings.reference, trust_remote_code=trust)
    students = subjects.find(settings.students, trust_remote_code=trust)
    tokenizer = load_tokenizer(source)
    vocabulary = subjects.compare(source, students, tokenizer)
    wanted = settings.rows or (GPU_ROWS if device.type == "cuda" else CPU_ROWS)
    if settings.data is None:
        chosen = (bundled("held_out") + bundled("train"))[:wanted]  # first those that no recovery trains on
    else:
        chosen = choose(load_examples(settings.data, columns=settings.columns), wanted, settings.seed)
    limit, why = vocabulary.room.prompt_limit(PROMPT_TOKENS, settings.max_new_tokens)
    prompts, dropped = encode_within(tokenizer, chosen, limit, rows=vocabulary.room.rows)
    unread = [text for name, ids in vocabulary.unknown.items() for text in unreadable(tokenizer, prompts, ids, name)]
    if unread:
        raise InputError("\n".join(unread))
    warnings = list(vocabulary.warnings)
    for files in (source, *(student.source for student in students)):
        warnings += check_weights(files)
    if dropped:
        warnings.append(dropped_text(dropped, len(chosen), "prompts", why or str(PROMPT_TOKENS)))
    if len(prompts) < LEAST_ROWS:
        few = f"{len(prompts)} prompts are there, and {LEAST_ROWS} is the least that the debiased CKA needs"
        if not dropped:
            raise InputError(f"{few}; give more with --data")
        way = "lower --max-new-tokens, or give shorter prompts" if why else "give shorter prompts"
        raise InputError(f"{few}: {warnings[-1]}; {way} with --data")
    if len(prompts) < layers.FEW_ROWS:
        warnings.append(f"{len(prompts)} rows: below {layers.FEW_ROWS} the estimates are noisy, see their intervals")
    return Examination(
        settings,
        sites,
        source,
        students,
        tokenizer,
        vocabulary.shared,
        {example.id: example for example in chosen},
        prompts,
        device,
        choose_dtype("auto", device) if device.type == "cuda" else torch.float32,
        state,
        warnings,
        _placed(settings, [source, *(student.source for student in students)], device),
    )


def _placed(
    settings: DiagnoseSettings, sources: Sequence[ModelSource], device: torch.device
) -> dict[ModelSource, Placed]:
    """Where each model is kept: two are in memory at once. Raises InputError for a placement that can't be had."""
    fetched = {source: fetch_model(source, weights=True) for source in sources}
    sizes = sorted(numbers_in(local) or 0 for local in fetched.values())
    needed = BYTES * sum(sizes[-2:])
    placed = {s: place(settings.placement, local, needed, device, "diagnose") for s, local in fetched.items()}
    for line in dict.fromkeys(one.why for one in placed.values() if one.why):
        console.print(line, soft_wrap=True)
    return placed


def _check(settings: DiagnoseSettings, sites: Sequence[str]) -> None:
    if problem := occupied(Path(settings.out)):
        raise InputError(problem)
    if settings.rows is not None and settings.rows < LEAST_ROWS:
        raise InputError(f"rows is {settings.rows}; the debiased CKA needs {LEAST_ROWS} or more")
    if settings.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {settings.max_new_tokens}; allowed is 1 or more")
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise InputError(f"unknown site {unknown[0]}; known: {', '.join(SITES)}")
