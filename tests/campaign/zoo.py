"""The zoo: tiny models with random weights, one for each way in which architectures differ, and their tokenizer.

No model here computes anything of use. What counts is that each has the parts of its family: experts, shared experts,
latent attention, windows, soft caps, positions that are learned or added to the scores, states in place of keys.
Nothing keeps its initial value, since a bias of zeros or a norm of ones could be dropped unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.tiny import SPECIAL, TEMPLATE

ROWS = 400
"""Rows of the embeddings; the tokenizer knows fewer tokens, as in many models that are in use."""
TOKENS = 381

ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    **ENDS,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
"""Two query heads share a key-value head."""
FOUR: dict[str, Any] = {**GROUPED, "num_hidden_layers": 4}
"""For models whose layers come in kinds."""
SHORT: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    **ENDS,
}
"""For families that name the rest in words of their own."""
GPT2: dict[str, Any] = {"vocab_size": ROWS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, **ENDS}
OPT: dict[str, Any] = {**SHORT, "ffn_dim": 128, "max_position_embeddings": 1024, "pad_token_id": 0}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {  # attention of DeepSeek: keys and values from a narrow state
    **SMALL,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
CHOSEN_BY_GROUP: dict[str, Any] = {"q_lora_rank": 32, "n_group": 2, "topk_group": 1}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
GEMMA3N: dict[str, Any] = {
    **GROUPED,
    "num_hidden_layers": 5,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size_per_layer_input": 16,
    "head_dim": 16,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 5,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
GEMMA3_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN3_NEXT: dict[str, Any] = {
    **FOUR,
    **EXPERTS,
    "head_dim": 16,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FALCON_H1: dict[str, Any] = {
    **GROUPED,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.5,
}
JAMBA: dict[str, Any] = {  # a layer with attention after three with a state; every other one has experts
    **FOUR,
    **EXPERTS,
    "attn_layer_period": 4,
    "attn_layer_offset": 3,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
STATES: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 0, **ENDS}
IMAGE_IDS: dict[str, Any] = {
    "image_token_id": 390,
    "video_token_id": 391,
    "vision_start_token_id": 392,
    "vision_end_token_id": 393,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama-bias": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
    "llama-rope3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE)),
    "qwen2-tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen2-window": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=32, tie_word_embeddings=True)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=32)),
    "gemma1": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=32)),
    "gemma3-text": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**{**GROUPED, "num_hidden_layers": 7}, head_dim=16, sliding_window=32)
    ),
    "gemma3n": lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**GEMMA3N)),
    "gemma3-mm": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config={**GROUPED, "head_dim": 16, "sliding_window": 32},
            vision_config=GEMMA3_EYES,
            mm_tokens_per_image=4,
            image_token_index=390,
            boi_token_index=391,
            eoi_token_index=392,
        )
    ),
    "qwen2-vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config={
                **GROUPED,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            },
            vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
            **IMAGE_IDS,
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, partial_rotary_factor=0.5)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "stablelm": lambda: hf.StableLmForCausalLM(
        hf.StableLmConfig(**GROUPED, partial_rotary_factor=0.25, use_qkv_bias=True)
    ),
    "glm4": lambda: hf.Glm4ForCausalLM(
        hf.Glm4Config(**GROUPED, head_dim=16, partial_rotary_factor=0.5, attention_bias=True)
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**FOUR, no_rope_layer_interval=2)),
    "nemotron": lambda: hf.NemotronForCausalLM(hf.NemotronConfig(**GROUPED, head_dim=16)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GROUPED, sliding_window=32)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **GROUPED,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0625,
        )
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED, logit_scale=0.0625)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**FOUR, logit_scale=0.0625, sliding_window=32)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, rotary_pct=0.25)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2, rotary_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2-scaled": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=64)),
    "opt-proj": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=32)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**SHORT, num_kv_heads=2, new_decoder_architecture=True, alibi=False)
    ),
    "falcon-alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**SHORT, new_decoder_architecture=False, multi_query=True, parallel_attn=False, alibi=True)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=ROWS, hidden_size=64, n_layer=3, n_head=4, pad_token_id=0, **ENDS)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=16, moe_intermediate_size=64)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**GROUPED, **EXPERTS)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**FOUR, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32)
    ),
    "deepseek-v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**LATENT, q_lora_rank=None, first_k_dense_replace=1)
    ),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**LATENT, **CHOSEN_BY_GROUP, first_k_dense_replace=1)
    ),
    "deepseek-dense": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**LATENT, **CHOSEN_BY_GROUP, first_k_dense_replace=3)
    ),
    "jamba": lambda: hf.JambaForCausalLM(hf.JambaConfig(**JAMBA)),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**QWEN3_NEXT)),
    "falcon-h1": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**FALCON_H1)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**STATES, state_size=8)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**STATES, num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16)
    ),
}


def make(name: str, directory: Path) -> None:
    """Write the model of that name, in float32 and the same at every call, with its tokenizer."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    _disturb(model)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def _disturb(model: PreTrainedModel) -> None:
    """Vectors get noise, and what has more dimensions is made larger, so that answers have favourites."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(3.0)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and merges of some questions, TOKENS in all, with a token that begins a text."""
    things = "a volcano,the moon,a bridge,bread,a violin,the tides,a bee,snow,a map,an engine,glass,a river,chess,salt"
    questions = (
        "Explain {} to a child.|Why do people like {}?|Write two sentences about {}.|What would happen without {}?|"
        "List 3 facts about {}.|How is {} made or found?|Compare {} with something else.|Where does one meet {}?"
    )
    texts = [question.format(thing) for thing in things.split(",") for question in questions.split("|")]
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    assert core.get_vocab_size() == TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
