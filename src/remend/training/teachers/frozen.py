"""A healthy checkpoint that stays as it is: the teacher that any other name means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from remend.maths.losses import HeadTarget
from remend.models.find import ModelSource, fetch_model, find_model, hash_files
from remend.models.load import load_config, load_tokenizer
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack, scorer
from remend.models.vocabulary import VocabularyMatch, compare_vocabularies, cutting_warnings, template_warnings
from remend.training.teachers.teacher import TEACHERS, NamedTeacher, Teacher, Workplace


@torch.no_grad()
def scored(parts: Scorer, rollouts: Sequence[Rollout], skip_first: int) -> HeadTarget:
    """The states of a model at the rollouts' completion tokens, after the prompts that a teacher is shown."""
    pairs = [(r.shown or r.prompt, r.completion) for r in rollouts]
    return HeadTarget(parts.states(pack(pairs, device=parts.device, skip_first=skip_first)), parts.head.detach())


@dataclass
class Frozen(Teacher):
    """The teacher at work; `parts` is the model as body and head."""

    parts: Scorer

    @property
    def model(self) -> CausalLM:
        return self.parts.model

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> HeadTarget:
        return scored(self.parts, rollouts, skip_first)

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        yield self.model


@TEACHERS.register("frozen", source="arXiv 2604.15794")
@dataclass(frozen=True)
class NamedModel(NamedTeacher):
    """A model's name: directory, GGUF file, hub id[@revision], smollm2."""

    files: ModelSource | None = None
    no_layers = None

    def opened(self, *, trust_remote_code: bool) -> NamedModel:
        source = find_model(self.name, trust_remote_code=trust_remote_code)
        return replace(self, files=fetch_model(source, weights=False))

    @property
    def source(self) -> ModelSource | None:
        return self.files

    def compare(self, student: ModelSource, tokenizer: Tokenizer, rows: int, *, shown_more: bool) -> VocabularyMatch:
        """A frozen teacher that equals the student and sees no more teaches nothing."""
        assert self.files is not None
        ours, theirs = student.path, self.files.path
        if ours is not None and theirs is not None and ours.resolve() == theirs.resolve() and not shown_more:
            problem = (
                f"teacher {self.name} is the student's own model: a frozen teacher that equals the student teaches "
                "nothing. Name the healthy checkpoint from before the damage, or initial for the student as it came in."
            )
            return VocabularyMatch(rows, [problem])
        own = load_tokenizer(self.files)
        theirs_rows = load_config(self.files).get_text_config().vocab_size
        match = compare_vocabularies(tokenizer.get_vocab(), own.get_vocab(), rows, theirs_rows)
        cut = [] if match.problems else cutting_warnings(tokenizer, own)
        return replace(match, warnings=[*match.warnings, *template_warnings(tokenizer, own), *cut])

    def hashes(self) -> Mapping[str, str]:
        assert self.files is not None
        return hash_files(self.files)

    def load(self, workplace: Workplace) -> Frozen:
        assert self.files is not None
        model = workplace.read(self.files, workplace.dtype).requires_grad_(False)
        return Frozen(scorer(model, workplace.student.shared))
