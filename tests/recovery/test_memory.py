"""Whether layers are recomputed is settled by what a micro-batch keeps and what is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from helpers.architectures import build
from remend.models.device import free_bytes
from remend.recovery.memory import activation_bytes, must_recompute


@pytest.fixture
def config() -> Any:
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )


def test_activations_are_counted_by_tensor(config: Any) -> None:
    """Per token and layer: of 2 norms what goes in, what is multiplied and what comes out; q and output 64 each, k and
    v 32 each, a number for each of 4 heads, four of 128; 4 bytes each."""
    assert activation_bytes(config, 1, 1) == 4 * 3 * (6 * 64 + 2 * 64 + 2 * 32 + 4 + 4 * 128)
    assert activation_bytes(config, 8, 100) == 800 * activation_bytes(config, 1, 1)
    # products in bfloat16; what norms are given and what they multiply stays float32
    half = 3 * (4 * 4 * 64 + 2 * (2 * 64 + 2 * 64 + 2 * 32 + 4 + 4 * 128))
    assert activation_bytes(config, 1, 1, itemsize=2) == half


def test_a_model_keeps_no_more_than_the_estimate(config: Any) -> None:
    """What autograd saves beside the weights themselves, summed over distinct tensors of a real block."""
    from transformers import LlamaForCausalLM

    model, kept = LlamaForCausalLM(config), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(torch.arange(40).reshape(2, 20), use_cache=False)
    estimate = activation_bytes(config, 2, 20)
    assert 0.85 * estimate < sum(kept.values()) < 1.15 * estimate


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_of_known_families_it_is_what_is_kept(kind: str) -> None:
    """What a third layer adds to two: the ends of a model, and masks, are not counted."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    kept: list[int] = []
    for layers in (2, 3):
        more = {"layer_types": ["full_attention"] * layers} if kind == "gemma3_text" else {}
        config = AutoConfig.for_model(
            kind, **sizes, head_dim=16, vocab_size=80, num_hidden_layers=layers, pad_token_id=0, **more
        )
        kept.append(_kept(AutoModelForCausalLM.from_config(config), torch.arange(60).reshape(2, 30)))
    config.num_hidden_layers = 1
    assert activation_bytes(config, 2, 30) == pytest.approx(kept[1] - kept[0], rel=0.02)


def _kept(model: Any, tokens_BT: torch.Tensor) -> int:
    """Bytes that autograd keeps beside the weights."""
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(tokens_BT, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_recomputation_follows_free_memory(config: Any) -> None:
    needed, state = activation_bytes(config, 8, 100), 12 * 1000
    assert not must_recompute(config, 8, 100, 1000, free=2 * needed + state)
    assert must_recompute(config, 8, 100, 1000, free=2 * needed + state - 2)
    assert free_bytes(torch.device("cpu")) > 0


def test_copies_that_teachers_keep_count(config: Any) -> None:
    needed, state = activation_bytes(config, 8, 100), 12 * 1000
    assert not must_recompute(config, 8, 100, 1000, free=2 * needed + state + 2 * 4000, copies=2)
    assert must_recompute(config, 8, 100, 1000, free=2 * needed + state + 4000, copies=2)


def test_what_the_allocator_holds_for_reuse_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 50}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 120


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("gemma3n", 0.4, 1.5), ("gpt2", 0.4, 1.5), ("mamba", 0.4, 1.5), ("mamba2", 0.4, 4.0)]
    + [(name, 0.4, 2.0) for name in ("mixtral", "jamba", "falcon-h1", "deepseek")],
)
def test_configurations_of_another_shape_are_counted_too(name: str, least: float, most: float) -> None:
    """Sizes per layer (Gemma 3n), by other names (GPT-2), and blocks without heads (Mamba), hybrids and experts."""
    model, kept = build(name), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(torch.arange(64).reshape(2, 32), use_cache=False)
    estimate = activation_bytes(model.config, 2, 32)
    assert least < estimate / sum(size for size, _ in kept.values()) < most
