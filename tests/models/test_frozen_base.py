"""A base under an adapter: narrow weights give float32's results, and several models read one copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import architectures
from helpers.tiny import build_model
from remend.data.templates import Encoded
from remend.models import adapters
from remend.models.frozen_base import held_in, narrow, over_the_same_weights, widen
from remend.models.frozen_linear import NarrowLinear
from remend.models.matrices import matrices
from remend.models.sampling.transformers_engine import TransformersSampler

TOKENS = torch.arange(3, 23).reshape(2, 10)


def in_bfloat16() -> Any:
    """A tiny model in float32 whose numbers bfloat16 holds."""
    model = build_model(72)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model.requires_grad_(False)


def gradients(model: Any) -> dict[str, Tensor]:
    """Of an adapter that does something, by a loss of all logits."""
    # without Mamba's out_proj, which peft refuses, and Gemma 3n's lists of layers, whose numbers name blocks too
    known = adapters.check_targets(model, "all-linear")
    kinds = [kind for kind in known if kind != "out_proj" and not kind.isdigit()]
    adapters.add_lora(model, rank=2, seed=1, targets=kinds)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    model(input_ids=TOKENS, use_cache=False).logits.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_and_gradients_are_those_of_float32_bit_for_bit(mixed: bool) -> None:
    plain, held = in_bfloat16(), in_bfloat16()
    narrow(held, torch.bfloat16)
    assert (held_in(held), held_in(plain)) == ("bfloat16", "float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert plain(TOKENS).logits.equal(held(TOKENS).logits)
        wanted, got = gradients(plain), gradients(held)
    assert wanted.keys() == got.keys()
    assert len(wanted) == 28
    assert all(wanted[name].equal(got[name]) for name in wanted)


@pytest.mark.parametrize("name", architectures.MODELS)
def test_other_architectures_give_the_same_too(name: str) -> None:
    plain = architectures.build(name).eval().requires_grad_(False)
    for p in plain.parameters():
        p.data = p.data.bfloat16().float()
    held = over_the_same_weights(plain)
    narrow(held, torch.bfloat16)
    plain_layers = [m for m in matrices(plain).values() if type(m.module) is nn.Linear]
    assert sum(isinstance(m, NarrowLinear) for m in held.modules()) == len(plain_layers)
    assert list(matrices(held)) == list(matrices(plain))
    assert plain(input_ids=TOKENS, use_cache=False).logits.equal(held(input_ids=TOKENS, use_cache=False).logits)
    wanted, got = gradients(plain), gradients(held)
    assert wanted.keys() == got.keys()
    assert all(wanted[part].equal(got[part]) for part in wanted)


def test_samples_are_those_of_float32() -> None:
    plain, held = in_bfloat16(), in_bfloat16()
    narrow(held, torch.bfloat16)
    asked = [Encoded(str(i), tuple(range(3 + i, 9 + i)), "") for i in range(5)]
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seeds": range(5)}
    assert TransformersSampler(plain, 72, (2,))(asked, **how) == TransformersSampler(held, 72, (2,))(asked, **how)


def test_no_wide_weight_is_kept_for_the_backward_pass() -> None:
    held = in_bfloat16()
    narrow(held, torch.bfloat16)
    shapes = {tuple(m.weight_OI.shape) for m in matrices(held).values()}
    adapters.add_lora(held, rank=2)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held(TOKENS).logits.sum()
    assert kept
    assert not shapes & {*kept, *(shape[::-1] for shape in kept)}


def test_what_a_narrow_dtype_would_round_stays_float32() -> None:
    model = in_bfloat16()
    odd = model.model.layers[0].mlp.up_proj
    odd.weight.data[0, 0] = 1 / 3
    wanted = model(TOKENS).logits
    narrow(model, torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, NarrowLinear)
    assert held_in(model) == "bfloat16 and float32"
    assert model(TOKENS).logits.equal(wanted)


def test_another_model_reads_the_same_memory_and_has_modules_of_its_own() -> None:
    model = in_bfloat16()
    narrow(model, torch.bfloat16)
    wanted = model(TOKENS).logits
    other = over_the_same_weights(model)
    both = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, other)]
    assert both[0].keys() == both[1].keys()
    shared = {name for name in both[0] if both[0][name].data_ptr() == both[1][name].data_ptr()}
    assert {name for name in both[0] if name not in shared} == {n for n, p in model.named_parameters() if p.ndim == 1}
    assert other.lm_head.weight is other.model.embed_tokens.weight is not model.lm_head.weight
    adapters.add_lora(other, rank=2)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    assert not adapters.is_adapted(model)
    assert not other(TOKENS).logits.equal(wanted)
    adapters.merge(other)
    assert all(type(m.module) is nn.Linear and m.module.weight.dtype == torch.float32 for m in matrices(other).values())
    assert model(TOKENS).logits.equal(wanted)  # merging wrote into weights of its own


def test_in_another_dtype_frozen_layers_are_shared_and_the_rest_is_copied(tmp_path: Path) -> None:
    model = in_bfloat16()
    model.save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(TOKENS).logits
    narrow(model, torch.bfloat16)
    other = over_the_same_weights(model, torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert other.model.layers[0].mlp.up_proj.held.data_ptr() == model.model.layers[0].mlp.up_proj.held.data_ptr()
    assert other(TOKENS).logits.equal(wanted)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_wide_again_it_is_a_plain_model() -> None:
    model, plain = in_bfloat16(), in_bfloat16()
    narrow(model, torch.bfloat16)
    widen(model)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
