"""A healthy checkpoint that stays as it is: the teacher that any other name means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from remend.maths.losses import HeadTarget
from remend.models.find import ModelSource, fetch_model, find_model, hash_files
from remend.models.load import load_config, load_tokenizer
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack, scorer
from remend.models.vocabulary import compare_vocabularies, template_warnings
from remend.training.teachers.teacher import TEACHERS, Comparison, NamedTeacher, Pupil, Unmoved, Workplace


@torch.no_grad()
def scored(parts: Scorer, rollouts: Sequence[Rollout], skip_first: int) -> HeadTarget:
    """The states of a model at the rollouts' completion tokens, after the prompts that a teacher is shown."""
    pairs = [(r.shown or r.prompt, r.completion) for r in rollouts]
    return HeadTarget(parts.states(pack(pairs, device=parts.device, skip_first=skip_first)), parts.head.detach())


@dataclass
class Frozen(Unmoved):
    """See the module docstring; `parts` is the model as body and head."""

    parts: Scorer

    @property
    def model(self) -> CausalLM:
        """See Teacher."""
        model: CausalLM = self.parts.model
        return model

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> HeadTarget:
        """See Teacher."""
        return scored(self.parts, rollouts, skip_first)

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        """See Teacher."""
        yield self.model


@TEACHERS.register("frozen", source="arXiv 2604.15794")
@dataclass(frozen=True)
class NamedModel(NamedTeacher):
    """A model's name: directory, GGUF file, hub id[@revision], smollm2."""

    found: ModelSource | None = None

    def opened(self, *, trust_remote_code: bool) -> NamedModel:
        """See NamedTeacher."""
        source = find_model(self.name, trust_remote_code=trust_remote_code)
        return replace(self, found=fetch_model(source, weights=False))

    @property
    def source(self) -> ModelSource | None:
        """See NamedTeacher."""
        return self.found

    def compare(self, pupil: Pupil, *, shown_more: bool) -> Comparison:
        """See NamedTeacher. A frozen teacher that equals the student and sees no more teaches nothing."""
        assert self.found is not None
        ours, theirs = pupil.source.path, self.found.path
        if ours is not None and theirs is not None and ours.resolve() == theirs.resolve() and not shown_more:
            return Comparison(
                problems=[
                    f"teacher {self.name} is the student's own model: a frozen teacher that equals the "
                    "student teaches nothing. "
                    "Name the healthy checkpoint from before the damage, or initial for the student as it came in."
                ]
            )
        rows = load_config(self.found).get_text_config().vocab_size
        tokenizer = load_tokenizer(self.found)
        match = compare_vocabularies(pupil.tokenizer.get_vocab(), tokenizer.get_vocab(), pupil.rows, rows)
        return Comparison(
            match.shared, match.problems, [*match.warnings, *template_warnings(pupil.tokenizer, tokenizer)]
        )

    def hashes(self) -> Mapping[str, str]:
        """See NamedTeacher."""
        assert self.found is not None
        return hash_files(self.found)

    def load(self, workplace: Workplace) -> Frozen:
        """See NamedTeacher."""
        assert self.found is not None
        model = workplace.read(self.found, workplace.dtype).requires_grad_(False)
        return Frozen(scorer(model, workplace.student.shared))
