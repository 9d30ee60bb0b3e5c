"""Model directories and files of a stranger's: refused quickly, with one message."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import remend
from remend.errors import FileError, InputError, RemendError
from remend.exporting import export
from remend.models.find import find_model, hash_files, weight_files
from remend.models.load import load_config, load_tokenizer
from remend.models.origin import head_of


@pytest.fixture
def model(reference_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference_dir, tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "it holds a list, and an object belongs there; fetch or copy it again"),
        ('{"weight_map": 7}', "has no weight_map of tensors and files"),
        ('{"weight_map": {"a": 7}}', "names the file '7'"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names the file '../model\.safetensors'; .* lie beside"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the file '/etc/passwd'"),
    ],
)
def test_an_index_that_leads_out(index: str, message: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match=message):
        weight_files(model)


@pytest.mark.parametrize("layers", [10**5, 10**9])
def test_more_layers_than_the_files_hold(layers: int, model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=layers)
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"config.json asks for {layers} layers .*, and its files name 2; correct"):
        load_config(find_model(str(model)))
    assert time.monotonic() - began < 5


def test_other_texts_of_a_configuration_are_looked_at(model: Path) -> None:
    edit(model / "config.json", vision_config={"num_hidden_layers": 10**6})
    with pytest.raises(InputError, match=r"1000000 layers \(vision_config.num_hidden_layers\)"):
        load_config(find_model(str(model)))


@pytest.mark.parametrize("text", ["[1]", "7", "null", '"x"', "{", "[" * 100_000])
def test_a_configuration_of_another_type(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(FileError, match=r"config\.json can't be read: .*; fetch or copy it again"):
        load_config(find_model(str(model)))


def test_a_tokenizer_that_can_not_be_used(model: Path) -> None:
    edit(model / "tokenizer_config.json", model_max_length={"a": 1})
    with pytest.raises(FileError, match=r"the tokenizer of .* can't be read"):
        load_tokenizer(find_model(str(model)))


def test_everything_that_is_read_is_hashed(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ a }}")
    (model / "vocab.tiktoken").write_text("")
    assert {"additional_chat_templates/tools.jinja", "vocab.tiktoken"} <= hash_files(find_model(str(model))).keys()


def test_damaged_gguf_files(reference_dir: Path, tmp_path: Path) -> None:
    export(str(reference_dir), tmp_path / "gguf", format="gguf")
    content = next((tmp_path / "gguf").glob("*.gguf")).read_bytes()
    damaged, rng = tmp_path / "m.gguf", random.Random(0)
    for number in range(24):
        mutated = bytearray(content)
        at = rng.randrange(4, 2000)
        mutated[at] ^= 1 << rng.randrange(8)
        damaged.write_bytes(mutated if number % 3 else mutated[: rng.randrange(8, len(mutated))])
        source = find_model(str(damaged))
        with contextlib.suppress(RemendError):  # a changed number of the header may be a good one
            load_config(source)
            load_tokenizer(source)


def test_a_card_of_a_stranger(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\na: " + "[" * 10_000 + "\n---\n")
    assert head_of(card) == {}


def test_an_id_of_the_hub_is_told_before_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from remend.models.find import fetch_model

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(FileError, match="as a hub id it can't be fetched"):
        fetch_model(find_model("nobody-m/student"), weights=False)
    assert "nobody-m/student is no local path; asking the hub for it" in capsys.readouterr().err


def test_tensors_are_those_of_the_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    with safe_open(model / "model-00001-of-00001.safetensors", framework="pt") as tensors:
        names = dict.fromkeys(tensors.keys(), "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert weight_files(model) == [model / "model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "generation_config.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_told_at_once(
    name: str, reference_dir: Path, tmp_path: Path
) -> None:
    pipe, device = (shutil.copytree(reference_dir, tmp_path / kind) for kind in ("pipe", "device"))
    for model in (pipe, device):
        (model / name).unlink(missing_ok=True)
    os.mkfifo(pipe / name)
    (device / name).symlink_to("/dev/zero")
    for model, kind in ((pipe, "pipe or socket"), (device, "device")):
        with pytest.raises(FileError, match=f"{name} can't be read: it is a {kind}; give a file"):
            remend.quantize(str(model), tmp_path / "out", format="int4-g32-sym", probe=False, device="cpu")
        with pytest.raises(RemendError, match=f"{name} can't be read: it is a {kind}; give a file"):
            remend.recover(student=str(model), teacher=str(model), data="self", out=tmp_path / "run", device="cpu")
