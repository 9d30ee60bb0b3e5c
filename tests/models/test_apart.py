"""A walk with a teacher judges each change on text that it is not fitted to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.random_text import random_text
from helpers.tiny import build_model, build_tokenizer
from remend.models.activations.apart import divided
from remend.models.activations.walk import Sites, walk
from remend.models.sampling.rollout import Rollout

SPOILED = "model.layers.1.mlp.down_proj"


@pytest.fixture
def teacher() -> Any:
    return build_model(len(build_tokenizer()), layers=3).requires_grad_(False)


def damaged(teacher: Any) -> Any:
    """Every matrix with noise."""
    student, noise = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        if "proj" in name:
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=noise)
    return student


def healing(teacher: Any, spoiled: str = "") -> Any:
    """A visit that puts the teacher's weights back, but in one layer something worse than it was."""

    def visit(sites: Sites) -> None:
        for matrix in sites.matrices:
            healthy: Tensor = teacher.get_parameter(matrix.parameter)
            matrix.weight_OI.copy_(-healthy if matrix.name == spoiled else healthy)

    return visit


def test_every_eighth_is_held_apart_and_of_few_none() -> None:
    text = random_text()
    fitted, held = divided(text)
    assert [r.id for r in held] == ["7", "15", "23"]
    assert sorted([*fitted, *held], key=lambda r: int(r.id)) == text
    assert divided(text[:7]) == (text[:7], [])


def test_no_more_is_held_apart_than_it_takes_to_judge() -> None:
    fitted, held = divided([Rollout(str(i), (1,), (2,), False) for i in range(400)])
    assert (len(fitted), len(held)) == (368, 32)


def test_what_does_harm_on_that_text_is_taken_back_and_named(teacher: Any) -> None:
    student = damaged(teacher)
    came = copy.deepcopy(student)
    walked = walk(student, random_text(), healing(teacher, SPOILED), teacher=teacher)
    assert walked.held_back == (1,)
    changed = {n for n, _ in student.named_parameters() if "proj" in n}
    assert walked.unchanged == {n for n in changed if ".layers.1." in n}
    for name in changed:
        wanted = came if name in walked.unchanged else teacher
        assert student.get_parameter(name).equal(wanted.get_parameter(name)), name
    assert not walked.worse


@torch.no_grad()
def test_the_error_behind_the_last_block_is_that_of_plain_passes(teacher: Any) -> None:
    """Of what the held-apart text gives: the mean over its tokens of the relative squared distance."""
    student, text = damaged(teacher), random_text()
    came = copy.deepcopy(student)
    walked = walk(student, text, healing(teacher, SPOILED), teacher=teacher)
    assert walked.apart is not None
    for model, error in zip((came, student), walked.apart, strict=True):
        parts = []
        for row in divided(text)[1]:
            states = []
            for one in (model, teacher):
                one.model.norm.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0][0]))
                one(input_ids=torch.tensor([[*row.prompt, *row.completion]]), use_cache=False)
            ours, theirs = states[-2].double(), states[-1].double()
            parts.append((ours - theirs).square().sum(-1) / theirs.square().sum(-1))
        assert error == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_of_few_answers_nothing_is_judged(teacher: Any) -> None:
    student = damaged(teacher)
    walked = walk(student, random_text()[:7], healing(teacher, SPOILED), teacher=teacher)
    assert walked.apart is None
    assert not walked.held_back
    assert student.get_parameter(f"{SPOILED}.weight").equal(-teacher.get_parameter(f"{SPOILED}.weight"))
