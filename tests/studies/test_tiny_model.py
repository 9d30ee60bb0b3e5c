"""The model that a study trains itself: its rows are split, and it is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from remend.data.examples import load_examples
from remend.data.tasks import form
from remend.errors import InputError
from remend.studies import tiny_model


def test_held_out_rows_are_asked_nowhere_else() -> None:
    for rows in (tiny_model.general_rows, tiny_model.story_rows, tiny_model.task_rows):
        train, held_out = ({row["prompt"] for row in rows(side)} for side in (False, True))
        assert not train & held_out
        assert 0.05 < len(held_out) / len(train) < 0.2
    known, new = (tiny_model.task_rows(False, known=side) for side in (True, False))
    assert len(known) + len(new) == len(tiny_model.task_rows(False))
    for row in known[:3]:
        form("science").check(row, "row")


def test_it_is_made_once_and_told_stories_where_it_is_no_llama(tmp_path: Path) -> None:
    made = tiny_model.make(tmp_path / "tiny", architecture="gpt-neox", steps=1)
    assert AutoConfig.from_pretrained(made["model"]).model_type == "gpt_neox"
    rows = len(tiny_model.general_rows(True)) + len(tiny_model.story_rows(True))
    assert len(load_examples(made["held_out"])) == rows
    weights = Path(made["model"]) / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert tiny_model.make(tmp_path / "tiny", architecture="gpt-neox", steps=1) == made
    assert weights.stat().st_mtime_ns == first
    assert not tiny_model.is_made(tmp_path / "tiny", "gpt-neox", 2)
    assert not tiny_model.is_made(tmp_path / "tiny", steps=1)


@pytest.mark.parametrize("name", [name for name in tiny_model.SHAPES if name != tiny_model.LLAMA])
def test_the_others_have_two_to_five_million_parameters_and_eight_layers(name: str) -> None:
    shape = tiny_model.shape_of(name)
    config = AutoConfig.for_model(shape.model_type, vocab_size=tiny_model.VOCABULARY, **shape.settings)
    model = AutoModelForCausalLM.from_config(config)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert config.num_hidden_layers == 8


def test_an_architecture_that_is_not_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tiny model of architecture bert is made; allowed: llama, gemma3"):
        tiny_model.make(tmp_path / "tiny", architecture="bert")
    assert not (tmp_path / "tiny").exists()
