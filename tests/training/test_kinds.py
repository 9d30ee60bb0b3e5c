"""Which kind of constraint a student is, and what the kind says of it before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import build_model, put_on_grid
from remend.compression.recognise import PLAIN, Recognised
from remend.errors import InputError
from remend.files.atomic import write_json
from remend.models.adapters import add_lora
from remend.training.constraints import CONSTRAINTS, Adapter, Free, Masked, OnGrid, StudentFacts, kind_of

VOCABULARY = 64
NOTHING = Recognised("plain", None, False, PLAIN)
ZEROS = Recognised("plain", None, True, "half of them are zero", 0.5, "2:4")
SHAPES, OTHER = {"layer": torch.Size([4, 4])}, {"layer": torch.Size([4, 8])}


def on_grid(name: str) -> Recognised:
    return Recognised("remend", put_on_grid(build_model(VOCABULARY), name), False, "it lies on a grid")


FREE, MASK = StudentFacts(NOTHING), StudentFacts(ZEROS)
CUT = StudentFacts(NOTHING, record={"kind": "pruning", "method": "depth:list"}, layer_map=[0, 2])
NARROW = StudentFacts(NOTHING, record={"kind": "pruning", "method": "width"})
COARSE, FINE = StudentFacts(on_grid("int3-g64")), StudentFacts(on_grid("int4-g32-sym"))
ADAPTED = StudentFacts(COARSE.recognised, adapted=True)


@pytest.mark.parametrize(
    ("facts", "name", "words", "rate", "repaired"),
    [
        (FREE, "free", "none", 2e-4, 1e-4),
        (CUT, "free", "none", 2e-4, 2e-4),
        (NARROW, "free", "none", 2e-4, 1e-4),
        (MASK, "mask", "mask, 50.0% zeros (2:4)", 2e-4, 2e-4),
        (COARSE, "grid", "int3-g64-asym", 2e-4, 1e-4),
        (FINE, "grid", "int4-g32-sym", 2e-4, 5e-5),
        (ADAPTED, "adapter", "int3-g64-asym", 2e-3, 2e-3),
        (StudentFacts(NOTHING, adapted=True), "adapter", "none", 2e-3, 2e-3),
    ],
)
def test_kind_words_and_rates(facts: StudentFacts, name: str, words: str, rate: float, repaired: float) -> None:
    kind = kind_of(facts)
    assert kind is CONSTRAINTS.get(name)
    assert kind.describe(facts) == words
    assert (kind.learning_rate(facts, repaired=False), kind.learning_rate(facts, repaired=True)) == (rate, repaired)


def test_a_fine_grid_is_fitted_to_fewer_answers() -> None:
    for part in ("all", "norms"):
        facts = [replace(facts, train=part) for facts in (FREE, MASK, COARSE, FINE)]
        assert [kind_of(f).repair_answers(f) for f in facts] == [600, 600, 600, 400]


def test_what_a_student_lost_counts_as_compressed() -> None:
    assert [f.compressed for f in (FREE, CUT, NARROW, MASK, COARSE, ADAPTED)] == [False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("facts", "theirs", "why"),
    [
        (ADAPTED, None, "an adapter is trained, and the weights under it stay"),
        *((facts, None, "repair needs the teacher's weights, and a cache holds none") for facts in (CUT, MASK, COARSE)),
        *((facts, OTHER, "its matrices and the teacher's have other shapes") for facts in (MASK, COARSE)),
        *((facts, SHAPES, None) for facts in (MASK, COARSE)),
        (CUT, OTHER, None),
        (CUT, SHAPES, "none of its layers is missing or narrower than the teacher's"),
    ],
)
def test_why_there_is_no_repair(facts: StudentFacts, theirs: Any, why: str | None) -> None:
    assert kind_of(facts).no_repair(facts, SHAPES, theirs) == why


def test_what_the_record_promises_and_the_files_lost(tmp_path: Path) -> None:
    def lost(record: dict[str, Any], **facts: Any) -> list[str]:
        write_json(tmp_path / "degradation.json", record)
        student = StudentFacts(**{"recognised": NOTHING, "directory": tmp_path, "record": record, **facts})
        return [what for kind in CONSTRAINTS.entries.values() if (what := kind.lost(student))]

    pruned = {"kind": "pruning", "method": "wanda", "sparsity": 0.5}
    quantized = {"kind": "quantization", "format": "int3-g64-asym"}
    (no_zeros,) = lost(pruned)
    assert "says that 50.0% of the weights are zero, and the files hold no zeros" in no_zeros
    (no_grid,) = lost(quantized)
    assert "lies on the grid int3-g64-asym, and remend/grid.safetensors is missing there" in no_grid
    assert lost(pruned, recognised=ZEROS) == lost(quantized, recognised=COARSE.recognised) == []
    assert lost(pruned, as_dense=True) == lost(quantized, as_dense=True) == []
    assert lost(dict(CUT.record)) == lost({}) == []


def test_each_kind_holds_a_model_as_its_own_constraint() -> None:
    def held(facts: StudentFacts, model: Any) -> Any:
        kind_of(facts).check(model, facts)
        return kind_of(facts).hold(model, facts, origin=None, start=None, rate=1e-4)

    model = build_model(VOCABULARY)
    assert isinstance(held(FREE, model), Free)
    with pytest.raises(InputError, match="does not lie on its grid"):
        held(ADAPTED, build_model(VOCABULARY))
    with pytest.raises(InputError, match="does not lie on its grid"):
        OnGrid(build_model(VOCABULARY), COARSE.recognised.stored)
    put_on_grid(model, "int3-g64")
    assert isinstance(held(COARSE, model), OnGrid)
    add_lora(model, rank=2)
    assert isinstance(held(ADAPTED, model), Adapter)
    sparse = build_model(VOCABULARY)
    with pytest.raises(InputError, match="no sparsity mask to keep"):
        held(MASK, sparse)
    with torch.no_grad():
        sparse.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    assert isinstance(held(MASK, sparse), Masked)
