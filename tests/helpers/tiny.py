"""A tiny model and its tokenizer, built in the test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


TOPICS = ["rain", "bread", "trains", "cats", "maps", "music", "tea", "stars"]


def prompts(count: int = 40) -> list[str]:
    return [f"Tell me about {TOPICS[i % len(TOPICS)]} number {i}." for i in range(count)]


def build_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(prompts(200), trainer)
    core.add_tokens(list(extra))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def build_model(
    vocabulary: int, seed: int = 0, *, width: int = 64, layers: int = 2, tied: bool = True
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


SKIPPED = "model.layers.1.mlp.up_proj"
"""Left off the grid by `on_grid`, so that a plain layer stands among packed ones."""


def put_on_grid(model: Any, name: str) -> Any:
    """All linear layers but the head and SKIPPED, as a stored grid; the model's weights are moved onto it."""
    from remend.compression.grids import GridFormat, decode, quantize
    from remend.compression.stored_grid import StoredGrid

    fmt, matrices = GridFormat.parse(name), {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer_name not in ("lm_head", SKIPPED):
            codes, grid = quantize(layer.weight.detach(), fmt)
            layer.weight.data.copy_(decode(codes, grid, fmt))
            matrices[f"{layer_name}.weight"] = (codes, grid)
    return StoredGrid(fmt, matrices)


def small_recipe(student: Path, teacher: Path, data: Path, out: Path) -> dict[str, Any]:
    """Settings of a small, quick recovery."""
    return {
        "student": str(student),
        "teacher": str(teacher),
        "data": str(data),
        "out": str(out),
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "max_new_tokens": 8,
        "held_out": 6,
        "save_every": 2,
        "device": "cpu",
        "dtype": "float32",
        "repair": False,
    }
