"""The decoding cache gives a model what transformers' own cache does, without copying what is there."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from helpers.tiny import build_model
from remend.models.sampling import kv_cache
from remend.models.sampling.kv_cache import decoding_cache

VOCABULARY = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_model(VOCABULARY, seed=1)


@torch.no_grad()
def decoded(model: LlamaForCausalLM, cache: DynamicCache) -> torch.Tensor:
    """Logits of a prompt of 5 tokens and 6 more, after rows left and changed places."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, VOCABULARY, (4, 11), generator=generator)
    rows = torch.arange(4)
    found = [model(input_ids=tokens_BT[:, :5], past_key_values=cache).logits[:, -1].flatten()]
    for at in range(5, 11):
        if at == 7:
            rows = torch.tensor([3, 0, 1])
            cache.batch_select_indices(rows)
        found.append(model(input_ids=tokens_BT[rows, at : at + 1], past_key_values=cache).logits[:, -1].flatten())
    return torch.cat(found)


@pytest.mark.parametrize("room", [0, 2, 40])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_equals_transformers_cache(
    model: LlamaForCausalLM, room: int, precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", room)  # 0 and 2: it is full before the end, and grows
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        ours, theirs = (decoded(model, cache) for cache in (decoding_cache(model.config), DynamicCache()))
    assert torch.equal(ours, theirs)


def test_writes_in_place_in_the_dtype_of_attention(model: LlamaForCausalLM) -> None:
    cache = decoding_cache(model.config)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache)
        before = cache.layers[0].keys.data_ptr()
        model(input_ids=torch.tensor([[6]]), past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
    assert layer.keys.data_ptr() == before
    assert cache.get_seq_length() == layer.keys.shape[-2] == 4


def test_other_layers_keep_the_cache_that_transformers_gives_them() -> None:
    config = MistralConfig(sliding_window=4, num_hidden_layers=2)
    cache = decoding_cache(config)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2
