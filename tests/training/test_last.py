"""Training the head and the last layers alone: what moves, what a checkpoint must keep, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.grid_training import VOCABULARY, train
from helpers.tiny import build_model, put_on_grid
from remend.compression.recognise import PLAIN, Recognised
from remend.training.constraints import CONSTRAINTS, Start, StudentFacts, kind_of
from remend.training.constraints.last import end_of

FREE = StudentFacts(Recognised("plain", None, False, PLAIN), layer_map=[0, 1, 2, 3, 5], train="last")
ZEROS = Recognised("plain", None, True, "half of them are zero", 0.5, "2:4")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_and_the_last_three_layers_move_and_nothing_else(tied: bool) -> None:
    student = build_model(VOCABULARY, layers=5, tied=tied)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    constraint = kind_of(FREE).hold(student, FREE, origin=None, start=None, rate=1e-3)
    train(student, constraint, 2)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    layers = {name for name in before if name.startswith(tuple(f"model.layers.{at}." for at in (2, 3, 4)))}
    assert moved == layers | {head} == set(constraint.masters())
    assert "model.norm.weight" not in moved
    assert constraint.kept() == {}  # the student's own files have the rest


def test_a_checkpoint_keeps_what_repair_changed_elsewhere() -> None:
    student = build_model(VOCABULARY, layers=5)
    fresh = copy.deepcopy(student)
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight += 1  # as a repair does
    constraint = kind_of(FREE).hold(student, FREE, origin=None, start=Start(), rate=1e-3)
    kept = {name: tensor.clone() for name, tensor in constraint.kept().items()}
    assert set(kept) == {name for name, _ in student.named_parameters()} - end_of(student)
    resumed = kind_of(FREE).hold(fresh, FREE, origin=None, start=None, rate=1e-3)
    resumed.take_kept(kept)
    assert all(torch.equal(p, dict(fresh.named_parameters())[name]) for name, p in student.named_parameters())


def test_words_and_what_is_refused() -> None:
    last = CONSTRAINTS.get("last")
    assert kind_of(FREE) is last
    assert last.describe(FREE) == "none; the head and the last 3 layers alone move"
    assert last.learning_rate(FREE, repaired=True) == CONSTRAINTS.get("free").learning_rate(FREE, repaired=True)
    assert last.lost(FREE) is None
    stored = put_on_grid(build_model(VOCABULARY), "int3-g64")
    on_grid = StudentFacts(Recognised("remend", stored, False, "it lies on a grid"), train="last")
    assert "held to int3-g64-asym; take train: all" in str(last.lost(on_grid))
    assert "held to a mask" in str(last.lost(StudentFacts(ZEROS, train="last")))
    assert last.lost(StudentFacts(ZEROS)) is None
