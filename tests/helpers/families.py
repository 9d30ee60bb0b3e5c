"""Tiny models of several families, whose files are unlike in names and in what lies fused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from helpers.tiny import build_tokenizer

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama, biased": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_bias=True)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2)
    ),
    "phi3": lambda: AutoModelForCausalLM.from_config(Phi3Config(**SMALL)),
    "gemma3": lambda: AutoModelForCausalLM.from_config(Gemma3TextConfig(**SMALL, head_dim=8)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen3-moe": lambda: AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL, **EXPERTS)),
    "deepseek-v3": lambda: AutoModelForCausalLM.from_config(
        DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4}, **DEEPSEEK)
    ),
}


def made(name: str, directory: Path) -> Path:
    """`directory` with a model of a family, written by transformers, and a tokenizer."""
    torch.manual_seed(0)
    FAMILIES[name]().eval().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory with one file."""
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def with_tensors(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    """`target`, as `source` with other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
