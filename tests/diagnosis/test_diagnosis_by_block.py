"""A diagnosis whose models are read block by block says the same, but for the anchor of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import remend
from helpers.tiny import build_model


def without(content: Any, *keys: str) -> Any:
    """The same without some keys, however deep they lie."""
    if isinstance(content, dict):
        return {key: without(value, *keys) for key, value in content.items() if key not in keys}
    return [without(item, *keys) for item in content] if isinstance(content, list) else content


def values_of(content: Any, key: str) -> list[Any]:
    if isinstance(content, dict):
        return [value for k, v in content.items() for value in ([v] if k == key else values_of(v, key))]
    return [value for item in content for value in values_of(item, key)] if isinstance(content, list) else []


def test_a_diagnosis_block_by_block_is_the_same(tmp_path: Path, tokenizer: Any) -> None:
    build_model(320, layers=3).save_pretrained(tmp_path / "healthy")
    tokenizer.save_pretrained(tmp_path / "healthy")
    remend.quantize(tmp_path / "healthy", tmp_path / "grid", format="int3-g32", probe=False)
    remend.prune_depth(tmp_path / "healthy", tmp_path / "short", layers=[1], probe=False)
    students = [tmp_path / "grid", tmp_path / "short"]
    whole, parts = (
        remend.diagnose(
            tmp_path / "healthy",
            students,
            tmp_path / place,
            rows=16,
            cache=str(tmp_path / f"c-{place}"),
            placement=place,
        )
        for place in ("device", "disk")
    )
    assert without(parts, "random", "seconds") == without(whole, "random", "seconds")
    anchors = [values_of(content, "random") for content in (whole, parts)]
    assert len(anchors[0]) == len(anchors[1]) == 5
    assert all(abs(value) < 0.5 for value in anchors[1])


def test_the_anchor_of_random_weights_repeats(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    from remend.diagnosis.reference import random_model
    from remend.models.blocks.opening import from_disk
    from remend.models.find import find_model

    build_model(320, layers=3, tied=False).save_pretrained(tmp_path / "healthy")
    tokenizer.save_pretrained(tmp_path / "healthy")
    model = from_disk(find_model(str(tmp_path / "healthy")), device=torch.device("cpu"))
    ids = torch.arange(1, 20)[None]
    one, other, again = (random_model(model, seed)(input_ids=ids).logits for seed in (0, 1, 0))
    assert one.equal(again)
    assert not one.equal(other)
    deviation = float(next(iter(random_model(model, 0).get_input_embeddings().parameters())).std())
    assert deviation == pytest.approx(model.config.initializer_range, rel=0.05)
