"""remend push: a complete model only, private unless asked, into a repository that one may write to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.hub import Hub, serving
from remend.errors import InputError
from remend.exporting.push import PushError, push


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    running.repos.clear()
    running.files.clear()
    monkeypatch.setenv("HF_ENDPOINT", running.address)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "README.md").write_text("---\ntags:\n- remend\n---\n")
    (path / ".hidden").write_text("x")
    (path / "remend").mkdir()
    save_file({"x": torch.zeros(2)}, path / "model.safetensors")
    save_file({"x": torch.zeros(2)}, path / "remend" / "grid.safetensors")
    return path


def test_a_model_goes_up_privately_and_its_address_is_said(hub: Hub, model: Path) -> None:
    assert push(model, "me/mine") == f"{hub.address}/me/mine"
    assert hub.repos == {"me/mine": True}
    names = {name.removeprefix("me/mine/") for name in hub.files}
    assert names == {"config.json", "tokenizer.json", "README.md", "model.safetensors", "remend/grid.safetensors"}
    assert hub.files["me/mine/model.safetensors"] == (model / "model.safetensors").read_bytes()
    (model / "config.json").write_text('{"a": 1}')
    push(model, "mine")  # again, by its short name
    assert hub.files["me/mine/config.json"] == b'{"a": 1}'


def test_a_run_gives_its_model_and_public_is_asked_for(hub: Hub, model: Path, tmp_path: Path, run: Any) -> None:
    place = tmp_path / "run"
    place.mkdir()
    model.rename(place / "model")
    (place / "manifest.json").write_text("{}")
    code, _, error = run("push", place, "me/run", "--public")
    assert code == 2
    assert "is not complete" in error
    assert not hub.repos
    (place / "summary.json").write_text("{}")
    code, out, _ = run("push", place, "me/run", "--public")
    assert (code, out.splitlines()[-1]) == (0, f"{hub.address}/me/run")
    assert hub.repos == {"me/run": False}
    with pytest.raises(InputError, match=r"me/run exists and is public.*say --public"):
        push(place, "me/run")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "are missing")],
)
def test_what_is_no_complete_model_is_refused(hub: Hub, model: Path, missing: str, said: str) -> None:
    (model / missing).unlink()
    with pytest.raises(InputError, match=said):
        push(model, "me/mine")
    assert not hub.repos


def test_weights_that_were_cut_short_are_refused(hub: Hub, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="can't be read"):
        push(model, "me/mine")
    with pytest.raises(InputError, match="no such directory"):
        push(model / "nothing", "me/mine")


def test_adapters_and_gguf_files_are_models_too(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="no adapter_model"):
        push(tmp_path, "me/a")
    (tmp_path / "adapter_model.safetensors").write_text("x")
    push(tmp_path, "me/a")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model.gguf").write_bytes(b"GGUF....")
    push(tmp_path / "g", "me/g")
    assert set(hub.repos) == {"me/a", "me/g"}


def test_errors_say_what_to_do(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PushError, match=r"may not write to other/mine.*another's"):
        push(model, "other/mine")
    with pytest.raises(InputError, match="write ORG/NAME"):
        push(model, "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(PushError, match=r"does not know your login.*hf auth login"):
        push(model, "me/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(PushError, match=r"not logged in|does not know your login"):
        push(model, "mine")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with pytest.raises(PushError, match="can't be reached"):
        push(model, "me/mine")
    assert not hub.files
