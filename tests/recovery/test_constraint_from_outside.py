"""A constraint that the package does not know: a class and a registration, and whole recoveries are held to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from remend.degrade.width import prune_width
from remend.models.protocols import CausalLM
from remend.recovery.job import check, recover
from remend.training.constraints import CONSTRAINTS, Constraint, ConstraintKind, Free, Start, StudentFacts

MARK = "only-norms.txt"
"""The file beside a student that says so."""


class OnlyNorms(Free):
    """At work: all but the norms' weights stand still."""

    def save(self, directory: Path) -> None:
        """The mark goes along, so that the recovered model is recognised too."""
        (directory / MARK).touch()


class OnlyNormsKind(ConstraintKind):
    def holds(self, facts: StudentFacts) -> bool:
        free = facts.adapted or facts.as_dense
        return not free and facts.directory is not None and (facts.directory / MARK).is_file()

    def describe(self, facts: StudentFacts) -> str:
        return "only norms move"

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return OnlyNorms(model)


CONSTRAINTS.register("only norms", source="this test")(OnlyNormsKind())


@pytest.fixture
def marked(recipe: dict[str, Any], reference_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe for a narrower student with the mark."""
    prune_width(str(reference_dir), tmp_path / "marked", ffn=0.5, probe=False)
    (tmp_path / "marked" / MARK).touch()
    del recipe["learning_rate"]
    return {**recipe, "student": str(tmp_path / "marked"), "repair": True, "steps": 2}


def test_a_recovery_is_held_to_it(marked: dict[str, Any]) -> None:
    result = recover(**marked)
    assert result.summary["constraint"] == "only norms move"
    assert (result.summary["repair"], result.summary["learning_rate"]) == (None, 2e-4)
    (said,) = (note for note in result.summary["notes"] if "is not repaired" in note)
    assert "nothing of it can be won back in closed form" in said
    before, after = (load_file(Path(p) / "model.safetensors") for p in (marked["student"], result.model))
    assert {name for name in before if not after[name].equal(before[name])} == {n for n in before if "norm" in n}
    again = check(**{**marked, "student": str(result.model), "out": f"{marked['out']}-again"})
    assert again.problems == []
    assert again.verdict().endswith("held to only norms move")


def test_other_students_are_what_they_were(recipe: dict[str, Any]) -> None:
    assert check(**recipe).verdict().endswith("held to int3-g64-asym")
