"""A tiny Llama and a tokenizer, built here: no network, no files from elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

if WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # before torch reads it: workers that all take every core wait for one another (and so would their subprocesses)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import pytest
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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def reference_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A healthy tiny model."""
    path = tmp_path_factory.mktemp("models") / "reference"
    build_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def student_dir(reference_dir: Path) -> Path:
    """The same model on a 3-bit grid."""
    from remend.degrade.quantize import quantize

    path = reference_dir.parent / "student"
    quantize(str(reference_dir), path, format="int3-g64", probe=False)
    return path


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, dequantized once for all slow tests."""
    from remend import models
    from remend.errors import FileError

    try:
        source = models.resolve("smollm2")
    except FileError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("real") / "smollm2"
    model = models.load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    models.save_model(model, models.load_tokenizer(source), path)
    return path


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts()), encoding="utf-8")
    return path


@pytest.fixture
def recipe(reference_dir: Path, student_dir: Path, prompt_file: Path, tmp_path: Path) -> dict[str, object]:
    """Settings of a small, quick recovery."""
    return {
        "student": str(student_dir),
        "teacher": str(reference_dir),
        "data": str(prompt_file),
        "out": str(tmp_path / "run"),
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


SKIPPED = "model.layers.1.mlp.up_proj"
"""Left off the grid by `on_grid`, so that a plain layer stands among packed ones."""


def put_on_grid(model: Any, name: str) -> Any:
    """All linear layers but the head and SKIPPED, as a stored grid; the model's weights are moved onto it."""
    from remend.constraints import StoredGrid
    from remend.grids import GridFormat, decode, quantize

    fmt, matrices = GridFormat.parse(name), {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer_name not in ("lm_head", SKIPPED):
            codes, grid = quantize(layer.weight.detach(), fmt)
            layer.weight.data.copy_(decode(codes, grid, fmt))
            matrices[f"{layer_name}.weight"] = (codes, grid)
    return StoredGrid(fmt, matrices)


@pytest.fixture
def on_grid(tmp_path: Path, tokenizer: Any) -> Any:
    """Makes a directory with the tiny model on the grid of that name."""
    from remend import models, run

    def make(name: str) -> Path:
        directory = tmp_path / f"student-{name.replace(':', '-')}"
        model = build_model(len(tokenizer), width=256 if name == "gguf:tq2_0" else 64)
        stored = put_on_grid(model, name)
        models.save_model(model, tokenizer, directory)
        stored.write(directory)
        run.write_json(directory / "degradation.json", {"kind": "quantization", "format": name})
        return directory

    return make
