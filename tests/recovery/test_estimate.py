"""What a run is expected to ask for, by numbers that are worked out here by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.facts import FACTS, SMALL, STREAM
from helpers.tiny import build_model
from remend.models.sizes import size_of
from remend.recovery.estimate import (
    BATCH,
    COST,
    KINDS,
    READING,
    decoding,
    disk,
    disk_of,
    scoring,
    seconds_of,
    solving,
    tokens_of,
    walking,
    work_by_phase,
)


def test_size_of_a_tiny_model() -> None:
    """Two layers of width 64: q and o 64 x 64, k and v 32 x 64, three of 128 x 64; 320 tied rows of the vocabulary."""
    size = size_of(build_model(320), build_model(320).config)
    each = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert (size.matrices, size.active, size.embeddings) == (2 * each, 2 * each, 320 * 64)
    assert size.parameters == 2 * each + 320 * 64 + 5 * 64
    assert (size.vocabulary, size.width, size.layers) == (320, 64, 2)
    assert size.cached == 2 * 2 * 2 * 16
    assert size.grams == 2 * (6 * 64**2 + 128**2)
    assert size.groups == ((64, 64), (64, 128), (128, 64), (256, 64))  # o, down, q with k and v, gate with up
    assert size.largest == 256 * 64
    assert size.sides == 2 * (2 * 128 + 2 * 96 + 3 * 192)
    inputs = [(64, 64), (64, 64), (32, 64), (32, 64), (128, 64), (128, 64), (64, 128)]
    assert size.fits == 2 * sum(i**3 + o * i * i for o, i in inputs)


def test_of_experts_a_token_meets_some() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    size = size_of(MixtralForCausalLM(config), config)
    assert size.matrices - size.active == 2 * 3 * 32 * 48


def test_tokens() -> None:
    tokens = tokens_of(FACTS)
    assert (tokens.answers, tokens.step, tokens.total, tokens.longest) == (8, 80, 480, 40)
    skipped = tokens_of(replace(FACTS, streams=[replace(STREAM, skipped=3), replace(STREAM, rows=2, longest=50)]))
    assert (skipped.answers, skipped.step, skipped.longest) == (10, 8 * 7 + 2 * 10, 60)


def test_disk() -> None:
    """12 bytes a trained parameter in a checkpoint, 16 with a teacher's average; the model in float32, and its grid."""
    assert disk(100, 80, checkpoints=3, averages=False, best=False, grid=0).total == 400 + 3 * 12 * 80
    assert disk(100, 80, checkpoints=2, averages=True, best=True, grid=30).total == 430 + 2 * 16 * 80 + 4 * 80
    assert disk_of(replace(FACTS, saved_itemsize=2)).model == 2 * 2_000_000 + 1_000_000 + 160_000


def test_sampling_and_scoring_by_hand() -> None:
    """A pass multiplies every weight that a token meets and the head, for each row and as many more as READING says."""
    assert BATCH == 64
    each = 1_500_000 + 5_000 * 100
    assert decoding(SMALL, 8, 10, 20, "cpu") == pytest.approx(2e-9 * (10 * each * (8 + 16) + 8 * 20 * 1_500_000))
    assert decoding(SMALL, 65, 10, 0, "cpu") == pytest.approx(2e-9 * 10 * each * (65 + 2 * READING["cpu"]))
    assert decoding(None, 8, 10, 20, "cpu") == decoding(SMALL, 0, 10, 20, "cpu") == 0
    assert scoring(SMALL, 8, 20, 10) == pytest.approx(2e-9 * 8 * (30 * 1_500_000 + 10 * 500_000))
    assert walking(SMALL, SMALL, 100) == pytest.approx(2e-9 * 100 * (6 * 1_500_000 + 40_000 + 1_500_000))
    assert solving(SMALL) == pytest.approx(9e-3)


def test_phases_and_what_they_hold() -> None:
    work = work_by_phase(FACTS)
    assert list(work) == ["loading", "baseline", "training", "saving", "measuring"]
    assert work["loading"] == {"start": 1.0, "load": 4.0}
    once = scoring(SMALL, 16, 20, 10)
    assert work["baseline"]["judge"] == pytest.approx(4 * once)
    answers = 2 * decoding(SMALL, 16, 10, 20, "cpu") + decoding(SMALL, 4, 10, 20, "cpu")
    assert work["baseline"]["answer"] == pytest.approx(answers)
    step = scoring(SMALL, 8, 20, 10)
    assert work["training"]["decode"] == pytest.approx(3 * decoding(SMALL, 16, 10, 20, "cpu"))  # two steps a round
    assert work["training"]["forward"] == pytest.approx(6 * 2 * step)
    assert work["training"]["backward"] == pytest.approx(6 * 2 * step)
    assert work["training"]["update"] == pytest.approx(6 * 1.5)
    assert work["training"]["save"] == pytest.approx(3 * 18.0)
    assert work["saving"] == {"save": 8.0}
    assert set(KINDS) == set(COST) >= {kind for units in work.values() for kind in units}
    assert seconds_of({"save": 2.0, "start": 1.0}, {"save": 3.0, "start": 4.0}) == 10.0


def test_what_adds_work() -> None:
    def training(**changes: Any) -> dict[str, float]:
        return work_by_phase(replace(FACTS, **changes))["training"]

    plain, step = training(), scoring(SMALL, 8, 20, 10)
    assert training(evaluations=2)["judge"] - plain["judge"] == pytest.approx(2 * scoring(SMALL, 16, 20, 10))
    assert training(recomputes=True)["backward"] == pytest.approx(6 * 3 * step)
    off = training(streams=[replace(STREAM, on_policy=0.0, pool=24)])
    assert off["answer"] == pytest.approx(decoding(SMALL, 24, 10, 20, "cpu"))
    stored = training(reference=None, streams=[replace(STREAM, on_policy=0.0, scored=False)])
    assert (stored["decode"], stored["forward"]) == (0, pytest.approx(6 * step))
    assert list(work_by_phase(replace(FACTS, written=64, repair=24)))[1:4] == ["prompts", "baseline", "repair"]
    assert training()["forward"] > work_by_phase(FACTS, answered=0.5)["training"]["forward"]


def test_calibration_text_has_a_limit() -> None:
    work = work_by_phase(replace(FACTS, repair=10_000))["repair"]
    assert work["walk"] == pytest.approx(walking(SMALL, SMALL, 65_536))
    assert work["solve"] == pytest.approx(solving(SMALL))
