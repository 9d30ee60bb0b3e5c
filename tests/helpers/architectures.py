"""Tiny random models of other architectures than the Llama that most tests take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCABULARY = 64
_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **_IDS}
_ATTENTION: dict[str, Any] = {
    **_PLAIN,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, **_IDS}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SCAN = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2, **_IDS)
    ),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**_ATTENTION, "num_key_value_heads": 2},
            **_EXPERTS,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "falcon-h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**_ATTENTION, **_SCAN, mamba_d_ssm=64, lm_head_multiplier=0.5, key_multiplier=0.5)
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_ATTENTION, head_dim=16, sliding_window=8)),
    "gemma3-images": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config={**_ATTENTION, "head_dim": 16, "sliding_window": 8},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
    ),
    "gemma3n": lambda: tf.Gemma3nForCausalLM(
        tf.Gemma3nTextConfig(
            **{**_ATTENTION, "num_hidden_layers": 4},
            head_dim=16,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)),
    "gpt2-scaled": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT, scale_attn_by_inverse_layer_idx=True)),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **_ATTENTION,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        )
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **_ATTENTION,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=64,
            attention_chunk_size=64,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**_PLAIN, state_size=8)),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(**_PLAIN, state_size=8, expand=2, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
    ),
    "minicpm3": lambda: tf.MiniCPM3ForCausalLM(
        tf.MiniCPM3Config(
            **{**_ATTENTION, "num_key_value_heads": 2},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            dim_model_base=16,
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_ATTENTION, num_local_experts=4)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_PLAIN, ffn_dim=64, num_attention_heads=2, max_position_embeddings=256, word_embed_proj_dim=32)
    ),
    "qwen3-next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **_ATTENTION,
            **_EXPERTS,
            **_DELTA,
            head_dim=16,
            num_experts=4,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "recurrent-gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **{**_PLAIN, "num_hidden_layers": 3},
            intermediate_size=64,
            num_attention_heads=2,
            lru_width=32,
            attention_window_size=8,
            logits_soft_cap=2.0,
        )
    ),
    "rwkv": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**_PLAIN, attention_hidden_size=32, context_length=256)),
}


def build(name: str, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A model of MODELS, none of whose weights stands at its initial value."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    if vocabulary != VOCABULARY:
        config = model.config
        config.vocab_size = vocabulary
        if hasattr(config, "vocab_size_per_layer_input"):
            config.vocab_size_per_layer_input = vocabulary
        model = type(model)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3.0)
    return model
