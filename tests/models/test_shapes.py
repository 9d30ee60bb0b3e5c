"""Shapes of known models, against transformers' own classes built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from remend.errors import InputError
from remend.models.shapes import SHAPES, Shape, shape_named, shape_of
from remend.models.sizes import size_of

PUBLISHED: Mapping[str, int] = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Gemma-3-270m": 268_098_176,
    "Gemma-3-1b": 999_885_952,
}
"""Parameters as the models' pages count them."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_is_its_model(shape: Shape) -> None:
    """All that depends on a size, counted from the parameters of one and of two layers; the rest is a line."""
    counted = []
    for layers in (1, 2):
        cut = replace(shape, num_hidden_layers=layers)
        config = AutoConfig.for_model(**cut.config())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert asdict(size_of(model, config)) == asdict(cut.size)
        counted.append(sum(p.numel() for p in model.parameters()))
    whole = counted[0] + (shape.num_hidden_layers - 1) * (counted[1] - counted[0])
    assert shape.size.parameters == whole == PUBLISHED.get(shape.name, whole)


def test_names_are_found_as_people_write_them() -> None:
    for name in ("Qwen2.5-7B", "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct@main"):
        assert shape_named(name).name == "Qwen2.5-7B"
    assert shape_named("meta-llama/Meta-Llama-3-8B-Instruct").name == "Llama-3.1-8B"
    assert shape_named("google/gemma-3-4b-it").name == "Gemma-3-4b"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as error:
        shape_named("Qwen2.5-8B")
    for shape in SHAPES:
        assert shape.name in str(error.value)
    assert 'Did you mean "Qwen' in str(error.value)


def test_a_number_takes_the_nearest_shape_and_says_which() -> None:
    shape, said = shape_of(7_000_000_000)
    assert shape.name == "Qwen2.5-7B"
    assert said == "taken for Qwen2.5-7B, which has 7.62 billion parameters"
    between, said = shape_of(150_000_000_000)
    assert abs(between.size.parameters / 150e9 - 1) < 0.02
    assert "with" in said
    assert between.name in said
    assert between.hidden_size == shape_named(between.name).hidden_size


def test_a_number_far_off_still_gives_a_model() -> None:
    tiny, _ = shape_of(1_000_000)
    assert tiny.num_hidden_layers == 1
    huge, _ = shape_of(10**13)
    assert 0.9 < huge.size.parameters / 1e13 < 1.1
