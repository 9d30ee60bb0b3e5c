"""Every weight of a decoder belongs somewhere, and a matrix is one wherever it is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch.nn import functional as F

from remend.models.matrices import account, by_key, decoder_of, matrices

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MOE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}


def mixtral() -> Any:
    return T.MixtralForCausalLM(T.MixtralConfig(**MOE, num_local_experts=3, num_experts_per_tok=2))


def gpt_oss() -> Any:
    return T.GptOssForCausalLM(T.GptOssConfig(**MOE, head_dim=8, num_local_experts=3, num_experts_per_tok=2))


def qwen2_moe() -> Any:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**MOE, **sizes, num_experts=3, num_experts_per_tok=2))


def gpt2() -> Any:
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def gemma3() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = T.Gemma3Config(
        text_config={**MOE, "head_dim": 8}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    return T.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [mixtral, gpt_oss, qwen2_moe, gpt2, gemma3])
def test_every_matrix_of_the_decoder_is_found(build: Any) -> None:
    model = build()
    parts, head = account(model), model.get_output_embeddings().weight
    assert not parts.unknown
    covered = {matrix.parameter for matrix in parts.matrices.values()}
    for name, parameter in model.named_parameters():
        small = parameter.ndim < 2 or name.endswith("bias")
        if parameter is head or small or "embed" in name or ".wte." in name or ".wpe." in name:
            continue
        assert (name in covered) + (name in parts.routers) + (name in parts.towers) == 1, name


def test_routers_and_the_gate_of_a_shared_expert_stand_apart() -> None:
    names = {name.partition(".mlp.")[2] for name in account(qwen2_moe()).routers}
    assert names == {"gate.weight", "shared_expert_gate.weight"}
    assert not any("gate.weight" in name for name in matrices(qwen2_moe()))


def inkling() -> Any:
    sizes = {"moe_intermediate_size": 8, "d_rel": 8, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1}
    shapes = {"head_dim": 8, "swa_head_dim": 8, "mlp_layer_types": ["sparse"] * 2}
    config = T.InklingTextConfig(
        **MOE, **sizes, **shapes, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2
    )
    return T.InklingForCausalLM(config)


def test_shared_experts_in_one_parameter_are_no_routers() -> None:
    """The router has a row for the shared expert too; the shared expert's products have one matrix each."""
    parts = account(inkling())
    assert {name.partition(".mlp.")[2] for name in parts.routers} == {"gate.weight"}
    known = {name.partition(".mlp.")[2] for name in parts.matrices}
    assert {f"shared_experts.{name}_proj.0" for name in ("gate", "up", "down")} <= known


def test_a_head_called_the_decoder_is_not_taken_for_it() -> None:
    model: Any = T.ModernBertDecoderForCausalLM(
        T.ModernBertDecoderConfig(**SMALL, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    assert decoder_of(model) is model.model
    assert "model.layers.0.mlp.Wi" in matrices(model)
    assert "decoder" not in matrices(model)


def test_a_vision_tower_is_no_part_of_the_decoder() -> None:
    parts = account(gemma3())
    assert any("vision_tower" in name for name in parts.towers)
    assert parts.matrices
    assert not any("vision" in name or "projector" in name for name in parts.matrices)


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_an_expert_is_a_matrix_from_inputs_to_outputs(build: Any) -> None:
    """What the module itself computes for one token that is sent to one expert."""
    model = build()
    first = next(m for name, m in matrices(model).items() if name.endswith("experts.gate_up_proj.1"))
    second = next(m for name, m in matrices(model).items() if name.endswith("experts.down_proj.1"))
    experts: Any = first.module
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x_ND = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    given_N1, whole_N1 = torch.tensor([[1]]), torch.ones(1, 1)
    inner_NI = experts._apply_gate(F.linear(x_ND, first.weight_OI, first.bias_O))
    assert torch.allclose(F.linear(inner_NI, second.weight_OI, second.bias_O), experts(x_ND, given_N1, whole_N1))


def test_what_is_written_into_a_matrix_is_in_the_model() -> None:
    for build in (mixtral, gpt_oss, gpt2):
        model = build()
        for matrix in matrices(model).values():
            matrix.weight_OI.fill_(0.5)
        for name in {matrix.parameter for matrix in matrices(model).values()}:
            assert bool((model.get_parameter(name) == 0.5).all())


def test_codes_may_describe_the_head_too() -> None:
    assert by_key(mixtral())["lm_head.weight"].weight_OI.shape == (32, 16)
