"""Parameters that hold several matrices: each is laid out as the model's own code multiplies it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from remend.errors import InputError
from remend.models.activations.walk import Sites, walk
from remend.models.matrices import account, matrices
from remend.models.sampling.rollout import Rollout

PLAIN: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE: dict[str, Any] = {**PLAIN, "intermediate_size": 64, "num_key_value_heads": 1, "num_experts_per_tok": 2}
TEXT = [Rollout("a", (5, 9, 33, 2, 7), (), False), Rollout("b", (8, 1, 60), (), False)]
"""Fewer tokens than any matrix has inputs, so that the inputs don't span all that there is."""


def llama4() -> Any:
    config = tf.Llama4TextConfig(**MOE, head_dim=16, num_local_experts=3, intermediate_size_mlp=48)
    return tf.Llama4ForCausalLM(config)


def jetmoe() -> Any:
    sizes = {k: MOE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    return tf.JetMoeForCausalLM(
        tf.JetMoeConfig(**sizes, num_key_value_heads=1, kv_channels=16, num_local_experts=3, num_experts_per_tok=2)
    )


def inkling() -> Any:
    sizes = {"moe_intermediate_size": 32, "d_rel": 8, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1}
    shapes = {"head_dim": 8, "swa_head_dim": 8, "mlp_layer_types": ["sparse"] * 2}
    return tf.InklingForCausalLM(tf.InklingTextConfig(**MOE, **sizes, **shapes, n_routed_experts=4, n_shared_experts=2))


def longcat() -> Any:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    more = {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2, "num_layers": 1, "head_dim": 8}
    config = tf.LongcatFlashConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=2,
        **sizes,
        **more,
        n_routed_experts=3,
        zero_expert_num=1,
        zero_expert_type="identity",
        num_hidden_layers=2,
    )
    return tf.LongcatFlashForCausalLM(config)


def dbrx() -> Any:
    attention = {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}
    ffn = {"moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32}
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64}
    return tf.DbrxForCausalLM(tf.DbrxConfig(**sizes, attn_config=attention, ffn_config={**ffn, "ffn_hidden_size": 32}))


def recurrent_gemma() -> Any:
    sizes = {"intermediate_size": 64, "lru_width": 32, "attention_window_size": 8}
    return tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**PLAIN, **sizes))


def zamba() -> Any:
    sizes = {"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "intermediate_size": 64}
    kinds = {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    return tf.ZambaForCausalLM(tf.ZambaConfig(**{**PLAIN, "num_hidden_layers": 6}, **sizes, **kinds))


WALKED = [llama4, jetmoe, inkling, longcat, dbrx, recurrent_gemma]


def made(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = build().float().eval()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.fixture(scope="module", params=WALKED, ids=lambda build: build.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def test_no_weight_is_unknown(model: Any) -> None:
    parts = account(model)
    assert all("rel_logits_proj" in name for name in parts.unknown)
    assert not [name for name in parts.matrices if "rout" in name]


def test_the_walk_gives_what_each_matrix_multiplies(model: Any) -> None:
    """The gradient of a matrix is Σ dy xᵀ: its rows are made of the inputs alone, and zero where there are none."""
    model = copy.deepcopy(model)
    grams: dict[str, Sites] = {}
    walk(model, TEXT, lambda sites: grams.update({matrix.name: sites for matrix in sites.matrices}))
    model.zero_grad()
    for row in TEXT:
        logits = model(input_ids=torch.tensor([row.prompt]), use_cache=False).logits
        (logits * torch.randn(logits.shape)).sum().backward()
    stacked = [m for m in matrices(model).values() if m.expert is not None]
    assert stacked
    for matrix in stacked:
        sites = grams[matrix.name]
        gradient = getattr(matrix.module, matrix.parameter.rpartition(".")[2]).grad
        gradient_OI = matrix.of(gradient) if gradient is not None else torch.zeros_like(matrix.weight_OI)
        values, vectors_II = torch.linalg.eigh(sites.gram_II.double())
        unseen_IK = vectors_II[:, values < 1e-6 * float(values.max())] if sites.rows else vectors_II
        assert unseen_IK.shape[1] > 0, matrix.name
        rest = float((gradient_OI.double() @ unseen_IK).norm())
        assert rest <= 1e-3 * float(gradient_OI.norm()), (matrix.name, rest)
        assert sites.rows == 0 or gradient_OI.any(), matrix.name


def test_a_product_that_is_not_seen_is_a_refusal() -> None:
    model = made(jetmoe)
    module = model.model.layers[1].mlp.output_linear
    forward = module.forward

    def copied(*given: Any) -> Any:
        with torch.no_grad():
            own, module.weight = module.weight, torch.nn.Parameter(module.weight.clone())
        try:
            return forward(*given)
        finally:
            module.weight = own

    module.forward = copied
    with pytest.raises(InputError, match=r"multiplies model\.layers\.1\.mlp\.output_linear\.weight .*rtn"):
        walk(model, TEXT, lambda sites: pytest.fail("visited"))


def test_a_class_of_the_same_name_in_a_models_own_code_is_unknown() -> None:
    model = made(jetmoe)
    kind = type(model.model.layers[0].mlp.input_linear)
    model.model.layers[0].mlp.input_linear.__class__ = type(kind.__name__, (kind,), {"__module__": "their_code"})
    assert list(account(model).unknown) == ["model.layers.0.mlp.input_linear.weight"]


def test_a_shared_weight_is_counted_once_and_never_walked() -> None:
    """Zamba's attention blocks are one, met in several layers."""
    model = made(zamba)
    own = [matrix.weight_OI.data_ptr() for matrix in matrices(model).values()]
    assert len(own) == len(set(own))
    assert not account(model).unknown
    with pytest.raises(InputError, match=r"several times a pass, .*shared_transf.* \(2 times\).*rtn and magnitude"):
        walk(model, TEXT, lambda sites: pytest.fail("visited"))


def test_vectors_of_several_dimensions_are_no_matrices() -> None:
    """RWKV's time_mix is [1, 1, width], and multiplies number by number."""
    parts = account(tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)))
    assert not parts.unknown
    assert not any("time" in name for name in parts.matrices)


def test_a_tower_inside_the_decoder_is_one_all_the_same() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = tf.GitForCausalLM(tf.GitConfig(**PLAIN, intermediate_size=64, vision_config=vision))
    parts = account(model)
    assert any("image_encoder" in name for name in parts.towers)
    assert not any("image_encoder" in name or "visual" in name for name in parts.matrices)


def test_what_stands_in_front_of_the_heads_product_is_no_tower() -> None:
    config = tf.ModernBertDecoderConfig(
        **PLAIN, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    parts = account(tf.ModernBertDecoderForCausalLM(config))
    assert not parts.towers
    assert not any("head" in name for name in parts.matrices)
