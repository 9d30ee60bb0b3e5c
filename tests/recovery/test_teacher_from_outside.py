"""A teacher that the package does not know: a class and a registration, and a recipe names it like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.recovering import assert_equal_runs, keeping, torn_copy
from helpers.registering import restored
from remend.errors import InputError
from remend.maths.losses import HeadTarget
from remend.models.find import fetch_model, find_model
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.recovery.job import check, recover
from remend.training.teachers import TEACHERS, NamedTeacher, Teacher
from remend.training.teachers.ema import NamedEma
from remend.training.teachers.frozen import Frozen, NamedModel
from remend.training.teachers.teacher import StreamView, Workplace

PREFIX = "soft:"


class Softened(Frozen):
    """A frozen model at temperature 2."""

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> HeadTarget:
        target = super().score(rollouts, skip_first=skip_first)
        return replace(target, head=replace(target.head, scale=target.head.scale / 2))


@TEACHERS.register("soft", source="this test")
@dataclass(frozen=True)
class NamedSoftened(NamedModel):
    """soft:MODEL in a recipe."""

    @classmethod
    def claims(cls, name: str) -> bool:
        return name.startswith(PREFIX)

    def opened(self, *, trust_remote_code: bool) -> NamedSoftened:
        source = find_model(self.name.removeprefix(PREFIX), trust_remote_code=trust_remote_code)
        return replace(self, files=fetch_model(source, weights=False))

    def refuses(self, stream: StreamView) -> list[str]:
        return ["a softened teacher has learned nothing from demonstrations"] if stream.demonstrations else []

    def load(self, workplace: Workplace) -> Softened:
        return Softened(super().load(workplace).parts)


@pytest.fixture
def softened(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "teacher": f"{PREFIX}{recipe['teacher']}"}


def test_a_recovery_learns_from_it(softened: dict[str, Any], reference_dir: Path, tmp_path: Path) -> None:
    """It is the reference: what is measured and what is trained towards is its distribution, not the model's own."""
    result = recover(**{**softened, "steps": 12, "learning_rate": 4e-3, "save_every": 6})
    assert result.summary["recovered"]["kl"] < result.summary["degraded"]["kl"]
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (result.model, reference_dir))
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        log_q_NV = student(ids).logits[0].log_softmax(-1)
        soft, hard = ((teacher(ids).logits[0] / heat).log_softmax(-1) for heat in (2.0, 1.0))
    kl = [float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()) for log_p_NV in (soft, hard)]
    assert kl[0] < kl[1]
    assert_equal_runs(result, recover(resume=torn_copy(result.out, tmp_path / "torn", 6)))


def test_a_stream_may_have_it_beside_the_reference(both: dict[str, Any], place: Path) -> None:
    name = f"{PREFIX}{both['teacher']}"
    beside = recover(**{**keeping(both, teacher=name), "steps": 1})
    assert beside.metrics[0]["keep/loss"] > 0.01
    (problem,) = check(**{**keeping(both, teacher=name, demonstrations=True), "out": str(place / "refused")}).problems
    assert problem == "streams.keep: a softened teacher has learned nothing from demonstrations"


class Blended(Teacher):
    """Two models' mean: none of its own."""

    model = None

    def __init__(self, parts: Scorer) -> None:
        self.parts = parts

    def score(self, rollouts: Sequence[Rollout], *, skip_first: int = 0) -> HeadTarget:
        return Frozen(self.parts).score(rollouts, skip_first=skip_first)

    @contextmanager
    def policy(self) -> Iterator[CausalLM]:
        yield self.parts.model


@pytest.mark.parametrize("key", ["alignment", "diagnose_every"])
def test_one_without_layers_is_refused_by_name(recipe: dict[str, Any], key: str) -> None:
    """In the checks; one that promises layers and brings none, when it is loaded."""

    class NamedBlended(NamedTeacher):
        word = "blended"

        def load(self, workplace: Workplace) -> Blended:
            return Blended(workplace.student)

    class Promising(NamedBlended):
        word = "promising"
        no_layers = None

    values = {**recipe, key: {"measure": "cka"} if key == "alignment" else 2}
    with restored(TEACHERS):
        for kind in (NamedBlended, Promising):
            TEACHERS.register(str(kind.word), source="this test")(kind)
        problems = check(**{**values, "teacher": "blended"}).problems
        said = (
            "blended is none" if key == "alignment" else "reference's layers in memory; this kind of teacher shows none"
        )
        assert [said in problem for problem in problems] == [True]
        with pytest.raises(
            InputError, match=r"teacher promising: Promising.no_layers is None, so it must bring a model"
        ):
            recover(**{**values, "teacher": "promising"})


def test_settings_of_a_kind_have_an_effect_on_kinds_made_of_it(both: dict[str, Any]) -> None:
    class Slow(NamedEma):
        word = "slow"

    def warnings(teacher: str) -> list[str]:
        checked = check(**{**keeping(both, teacher=teacher, demonstrations=True), "ema": {"rate": 0.001}})
        return [warning for warning in checked.warnings if warning.startswith("ema has no effect")]

    with restored(TEACHERS):
        TEACHERS.register("slow", source="this test")(Slow)
        assert warnings("slow") == []
    assert warnings("initial") == ["ema has no effect, since no stream has teacher: ema"]


def test_other_names_mean_what_they_meant(recipe: dict[str, Any]) -> None:
    plan = check(**recipe).plan
    assert plan is not None
    assert type(plan.teachers[plan.reference]) is NamedModel
