"""What fits where: by hand, against `check`, and what is said of bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import remend
from helpers.tiny import build_model
from remend.errors import InputError
from remend.models.shapes import Shape, shape_named
from remend.recovery.footprint import moments_of
from remend.recovery.forecast import facts_of
from remend.recovery.job import settings
from remend.recovery.preflight import preflight
from remend.recovery.what_fits import GB, LEFT, WhatFits, plan

KEYS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)


def way(found: WhatFits, train: str, *, asked: bool = True) -> Any:
    return next(one for one in (found.asked if asked else found.found) if one.train == train)


def test_seven_billion_on_one_gpu() -> None:
    """The student in float32 and the teacher in bfloat16; masters, gradients and moments of what moves."""
    size = shape_named("Qwen2.5-7B").size
    found = plan(shape="Qwen2.5-7B", gpu=80)
    whole = way(found, "all")
    held = whole.by_phase["training"]
    assert held["student"] == 4 * size.parameters
    assert held["teacher"] == 2 * size.parameters
    assert held["masters"] == 4 * size.matrices
    assert held["moments"] == 8 * (size.parameters - size.embeddings)
    assert whole.by_phase["repair"]["teacher"] == 6 * size.parameters
    assert not whole.fits
    adapter = way(found, "adapter", asked=False)
    # under the adapter four bits, scale and zero of two bytes for 64 numbers, embeddings in float32, vectors twice
    base = size.matrices // 2 + 4 * size.matrices // 64
    rest = 4 * (size.parameters - size.matrices) + 4 * size.vectors
    assert adapter.by_phase["loading"]["student"] == base + rest
    assert adapter.fits
    assert adapter.peak <= 80 * GB * (1 - LEFT)
    assert adapter.by_phase["training"]["moments"] == 8 * 16 * size.sides
    assert found.fits
    assert found.advice == []


def test_settings_make_it_fit_only_where_they_are_needed() -> None:
    roomy = plan(shape="Qwen2.5-0.5B", gpu=80)
    assert all(one.fits and one.settings == [] for one in roomy.found)
    tight = plan(shape="Qwen2.5-7B", gpu=80)
    scales = way(tight, "scales", asked=False)
    assert "repair: false" in scales.settings
    assert "repair_samples: 64" not in scales.settings
    assert not way(tight, "scales").fits
    long = plan(shape="Llama-3.2-1B", gpu=24, prompt_tokens=8000)
    assert any("gradient_checkpointing: true" in one.settings for one in long.found)


def test_moments_on_the_host_are_told_of() -> None:
    """A dense student's moments are eight bytes a parameter, which a GPU need not have."""
    size = shape_named("Qwen2.5-1.5B").size
    whole = way(plan(shape="Qwen2.5-1.5B", gpu=24, format="dense"), "all", asked=False)
    assert whole.fits
    assert "optimizer: adamw-host" in whole.settings
    assert whole.host == 8 * size.parameters
    assert "moments" not in whole.by_phase["training"]


def test_a_repair_alone_comes_block_by_block() -> None:
    """Where both models are too large for a GPU, embeddings and a few blocks may not be."""
    size = shape_named("Qwen2.5-7B").size
    found = plan(shape="Qwen2.5-7B", gpu=40)
    alone = found.repair
    assert alone is not None
    assert alone.fits
    assert list(alone.settings) == ["steps: 0", "placement: disk", "repair_samples: 64"]
    assert alone.by_phase["loading"]["student"] == 4 * (size.embeddings + size.width)
    assert "masters" not in alone.by_phase["repair"]
    assert not way(found, "all", asked=False).fits
    assert plan(shape="Qwen2.5-7B", gpu=40, format="dense").repair is None


def test_what_fits_nowhere_says_what_would() -> None:
    found = plan(params="405b", gpu=80, gpus=8)
    assert not found.fits
    needed, cpu, stored, smaller = found.advice
    assert "GB of one GPU, with" in needed
    assert "a CPU with" in cpu
    assert "cache-teacher" in stored
    assert "does not fit either" in stored
    assert "is the largest that fits" in smaller
    name = smaller.split("known shapes ")[1].split(" is")[0]
    assert plan(shape=name, gpu=80, gpus=8).fits
    enough = float(needed.split(" GB")[0])
    assert plan(params="405b", gpu=enough, gpus=8).fits
    assert not plan(params="405b", gpu=0.98 * enough, gpus=8).fits


def test_memory_of_a_cpu() -> None:
    found = plan(shape="Qwen2.5-1.5B", memory=24)
    size = shape_named("Qwen2.5-1.5B").size
    held = way(found, "norms").by_phase["training"]
    assert held["student"] == held["teacher"] == 4 * size.parameters
    assert held["program"] > 0
    assert found.wish.device == "cpu"


def test_a_dense_student_is_trained_whole() -> None:
    found = plan(shape="Qwen2.5-0.5B", gpu=80, format="dense")
    assert [one.train for one in found.asked] == ["all", "norms", "adapter"]
    size = shape_named("Qwen2.5-0.5B").size
    held = way(found, "all").by_phase["training"]
    assert held["moments"] == 8 * size.parameters
    assert "masters" not in held
    assert "repair" not in way(found, "all").phases


def test_more_gpus_share_the_prompts_alone() -> None:
    one, eight = (plan(shape="Qwen2.5-7B", gpu=80, gpus=count) for count in (1, 8))
    assert way(eight, "norms").phases["loading"] == way(one, "norms").phases["loading"]
    assert way(eight, "norms").phases["sampling"] < way(one, "norms").phases["sampling"]


def test_it_is_the_arithmetic_of_check(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's facts and those of its shape give the same bytes, as far as one knows what the other does."""
    model = build_model(320)
    config = {name: getattr(model.config, name) for name in KEYS}
    shape = Shape("tiny", "llama", **config, tie_word_embeddings=True)
    monkeypatch.setattr("remend.recovery.what_fits.shape_named", lambda name: shape)
    words = {**recipe, "repair": True, "repair_samples": 12, "batch_size": 8, "held_out": 6, "updates_per_rollout": 2}
    checked = preflight(settings(overrides=words))
    assert checked.plan is not None
    facts = replace(facts_of(checked.plan), mapped=False, reference_mapped=False, recomputes=False)
    stream = facts.streams[0]
    longest = round(stream.longest)
    stream = replace(stream, prompt=float(longest), held_out=64, opening=0)
    facts = replace(facts, streams=[stream], repair_prompt=stream.prompt)
    stored = checked.plan.facts.recognised.stored
    assert stored is not None
    found = plan(
        shape="tiny",
        memory=1,
        format=stored.format.name,
        prompt_tokens=longest,
        max_new_tokens=stream.answer,
        repair_samples=12,
    )
    assert way(found, "all").by_phase == moments_of(facts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either by --shape"),
        ({"shape": "Qwen2.5-7B", "params": "7b", "gpu": 80}, "either by --shape"),
        ({"shape": "Qwen2.5-7B"}, "either --gpu"),
        ({"shape": "Qwen2.5-7B", "gpu": 80, "memory": 24}, "either --gpu"),
        ({"shape": "Qwen9-7B", "gpu": 80}, "is not known; allowed: Qwen2.5-0.5B, "),
        ({"params": "seven", "gpu": 80}, "such as 135m, 1.5b, 7b"),
        ({"params": "0b", "gpu": 80}, "from 1m to 10t"),
        ({"params": "-7b", "gpu": 80}, "from 1m to 10t"),
        ({"params": "1e9b", "gpu": 80}, "from 1m to 10t"),
        ({"params": "9" * 400, "gpu": 80}, "from 1m to 10t"),
        ({"params": "7b", "gpu": 0}, "--gpu is 0; allowed is a number of GB above 0"),
        ({"params": "7b", "gpu": -1}, "--gpu is -1"),
        ({"params": "7b", "gpu": float("nan")}, "--gpu is nan"),
        ({"params": "7b", "memory": float("inf")}, "--memory is inf"),
        ({"params": "7b", "gpu": 80, "gpus": 0}, "--gpus is 0; allowed is a whole number from 1"),
        ({"params": "7b", "gpu": 80, "gpus": 9}, "give --gpus 8"),
        ({"params": "7b", "memory": 24, "gpus": 2}, "--gpus counts GPUs"),
        ({"params": "7b", "gpu": 80, "batch_size": 0}, "--batch-size is 0"),
        ({"params": "7b", "gpu": 80, "format": "int9"}, 'unknown format "int9"'),
    ],
)
def test_bad_input_is_one_message(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        plan(**given)
    assert said in str(error.value)


def test_it_is_a_public_name() -> None:
    assert remend.plan is plan
