from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from helpers.architectures import build
from helpers.tiny import build_model
from remend.degrade.depth import prune_depth
from remend.degrade.making.blocks import cosines, least_influence, nearest_ends, without_blocks
from remend.errors import InputError
from remend.files.reading import read_object
from remend.files.signed import signed
from remend.models.layers import decoder_layers

TOKENS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))


@contextmanager
def passing(model: Any, blocks: list[int]) -> Iterator[None]:
    """The slow reference: these blocks hand on what they get."""
    for i in blocks:
        model.model.layers[i].forward = lambda states, **_: states
    try:
        yield
    finally:
        for i in blocks:
            del model.model.layers[i].forward


@pytest.fixture
def deep_dir(tmp_path: Path, tokenizer: Any) -> Path:
    build_model(len(tokenizer), layers=5).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def points(seed: int = 0, blocks: int = 6) -> list[torch.Tensor]:
    """A stream that each block turns by another angle."""
    generator = torch.Generator().manual_seed(seed)
    stream, result = torch.randn(7, 16, generator=generator), []
    for turn in torch.rand(blocks + 1, generator=generator).tolist():
        result.append(stream)
        stream = stream + 2 * turn * torch.randn(7, 16, generator=generator)
    return result


def slow_cosine(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    result = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        result.append(dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y)))
    return result


@pytest.mark.parametrize("distance", [1, 2, 6])
def test_cosines_are_those_of_the_stream_that_many_blocks_apart(distance: int) -> None:
    found, stream = cosines(iter(points()), distance), points()
    assert found.shape == (7 - distance, 7)
    for start in range(7 - distance):
        assert found[start].tolist() == pytest.approx(slow_cosine(stream[start], stream[start + distance]), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_block_influence_removes_the_blocks_that_turn_the_stream_least(seed: int) -> None:
    stream = points(seed)
    influence = [1 - sum(slow_cosine(stream[i], stream[i + 1])) / 7 for i in range(6)]
    expected = sorted(sorted(range(6), key=lambda i: influence[i])[:2])
    assert least_influence(iter(stream), 2) == expected


@pytest.mark.parametrize("seed", range(4))
def test_angular_distance_removes_neighbours_with_like_ends(seed: int) -> None:
    stream = points(seed)
    angle = [sum(map(math.acos, slow_cosine(stream[i], stream[i + 3]))) for i in range(4)]
    first = angle.index(min(angle))
    assert nearest_ends(iter(stream), 3) == [first, first + 1, first + 2]


def test_a_model_without_blocks_computes_what_the_others_compute(deep_dir: Path, tmp_path: Path) -> None:
    record = prune_depth(str(deep_dir), tmp_path / "out", layers=[3, 1], method="list", probe=False)
    reference = AutoModelForCausalLM.from_pretrained(deep_dir)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), passing(reference, [1, 3]):
        assert torch.equal(student(TOKENS).logits, reference(TOKENS).logits)
    assert record["layer_map"] == [0, 2, 4]
    assert record["removed_layers"] == [1, 3]
    assert record["packed_bytes"] == 2 * student.num_parameters()
    assert read_object(tmp_path / "out" / "degradation.json") == signed(record)


def test_the_cache_works_in_the_shallower_model(deep_dir: Path, tmp_path: Path) -> None:
    prune_depth(str(deep_dir), tmp_path / "out", layers=[0, 2], method="list", probe=False)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (student.generate(TOKENS[:1], use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_lists_with_one_value_a_block_are_cut_with_the_blocks() -> None:
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layer_interval=2,
        initializer_range=0.15,
        pad_token_id=0,
    )
    reference = SmolLM3ForCausalLM(config).eval()
    student, kept = without_blocks(reference, [0, 3])
    assert kept == [1, 2]
    assert student.config.no_rope_layers == [reference.config.no_rope_layers[i] for i in kept] == [0, 1]
    assert len(student.config.layer_types) == 2
    with torch.no_grad(), passing(reference, [0, 3]):
        assert torch.equal(student(TOKENS).logits, reference(TOKENS).logits)


def test_a_configuration_that_numbers_blocks_otherwise_is_refused() -> None:
    reference = build_model(320, layers=3)
    reference.config.sparse_layers = [0, 2]
    with pytest.raises(InputError, match="sparse_layers lists something about blocks that remend can't renumber"):
        without_blocks(reference, [1])


@pytest.mark.parametrize("name", ["deepseek", "falcon-h1", "gpt2", "gpt2-scaled", "mamba2", "opt"])
def test_the_other_blocks_of_other_architectures_compute_the_same_too(name: str) -> None:
    """DeepSeek's first block has no experts; the last block of a scaled GPT-2 leaves the others' numbers."""
    reference = build(name)
    gone = [1] if name == "gpt2-scaled" else [0]
    student, _ = without_blocks(reference, gone)
    (block,) = (decoder_layers(reference)[i] for i in gone)
    tokens = torch.arange(5, 20)[None]

    def pass_by(_block: nn.Module, args: Any, given: Any, output: Any) -> Any:
        states = args[0] if args else given["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with torch.no_grad(), block.register_forward_hook(pass_by, with_kwargs=True):
        wanted = reference(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        assert torch.allclose(student(input_ids=tokens, use_cache=False).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2-scaled", "minicpm3"])
def test_blocks_whose_number_is_part_of_what_they_compute_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"a block's number is part .* without blocks 0 .*other blocks with --layers"):
        without_blocks(build(name), [0])


def test_blocks_that_are_not_alike_are_named() -> None:
    with pytest.raises(InputError, match=r"its weights would be others \(model.layers.0.mamba"):
        without_blocks(build("jamba"), [0])


def gemma4() -> Any:
    """Every third block has wider heads."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        pad_token_id=0,
    )
    return Gemma4ForCausalLM(config).eval()


def test_what_a_configuration_numbers_by_block_is_renumbered(tmp_path: Path) -> None:
    reference = gemma4()
    student, _ = without_blocks(reference, [1, 3])
    student.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "config.json").read_text())["per_layer_config"]) == ["1", "3"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(TOKENS).logits, student(TOKENS).logits)


def test_a_configuration_that_would_be_read_as_another_is_refused() -> None:
    """A Gemma 4 whose last block is a sliding one is read with a full one in its place."""
    with pytest.raises(InputError, match=r"can.t have num_hidden_layers 5"):
        without_blocks(gemma4(), [5])


def test_the_reference_stays_as_it_is() -> None:
    reference = build_model(320, layers=3)
    before = reference(TOKENS).logits
    student, _ = without_blocks(reference, [1])
    student.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert torch.equal(before, reference(TOKENS).logits)
    assert reference.config.num_hidden_layers == 3


@pytest.mark.parametrize("method", ["block-influence", "angular"])
def test_a_block_that_does_nothing_is_found_and_removed(deep_dir: Path, tmp_path: Path, method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(deep_dir)
    for projection in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
        projection.weight.data.mul_(1e-3)
    model.save_pretrained(deep_dir)
    record = prune_depth(str(deep_dir), tmp_path / "out", layers=1, method=method, samples=3)
    assert record["removed_layers"] == [3]
    assert record["calibration"]["prompts"] == 3
    assert record["probe"]["kl"] < 1e-3
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 4


@pytest.mark.parametrize(
    ("layers", "method", "message"),
    [
        (5, "block-influence", "can't remove 5 of 5 blocks; allowed is 1 to 4"),
        (0, "angular", "can't remove 0 of 5 blocks"),
        ([], "list", "can't remove 0 of 5 blocks"),
        ([0, 1, 2, 3, 4], "list", "can't remove 5 of 5 blocks"),
        ([2, 5], "list", "no such block: 5; the model has blocks 0 to 4"),
        ([-1], "list", "no such block: -1"),
        ([2, 2], "list", "blocks given twice: 2"),
        (2, "list", 'method "list" needs the blocks themselves'),
        ([2], "angular", 'a list of blocks goes with method "list"'),
        (2, "entropy", 'unknown way to choose blocks "entropy"; known: angular, block-influence'),
    ],
)
def test_blocks_that_can_not_be_removed_are_refused(
    deep_dir: Path, tmp_path: Path, layers: Any, method: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune_depth(str(deep_dir), tmp_path / "out", layers=layers, method=method, probe=False)
    assert not (tmp_path / "out").exists()
