"""A tiny Llama and a tokenizer, built here: no network, no files from elsewhere."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # before torch reads it: workers that all take every core wait for one another (and so would their subprocesses)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers import strangers
from helpers.tiny import build_model, build_tokenizer, prompts, put_on_grid, small_recipe

# no test, nor any process that it starts, reads or writes the user's cache
os.environ["REMEND_CACHE"] = tempfile.mkdtemp(prefix="remend-cache-")
atexit.register(shutil.rmtree, os.environ["REMEND_CACHE"], ignore_errors=True)


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
    from remend.errors import FileError
    from remend.models.find import find_model
    from remend.models.load import load_model, load_tokenizer, save_model

    try:
        source = find_model("smollm2")
    except FileError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("real") / "smollm2"
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    save_model(model, load_tokenizer(source), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def short_cuts() -> Iterator[dict[str, Any]]:
    """Strangers read an export in this process and at one dtype, and no file waits for the disk.

    What a power cut leaves is the campaign's to show: it watches what is flushed. What was in the place of the
    strangers is given.
    """
    from remend.exporting import check

    theirs = {"DTYPES": check.DTYPES, "ask_stranger": check.ask_stranger}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "DTYPES", ("auto",))
        patch.setattr(check, "ask_stranger", strangers.ask)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield theirs


@pytest.fixture
def own_process(short_cuts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers run as they do for users."""
    for name, value in short_cuts.items():
        monkeypatch.setattr(f"remend.exporting.check.{name}", value)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    from remend import cli

    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["remend", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return command


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts()), encoding="utf-8")
    return path


@pytest.fixture
def recipe(reference_dir: Path, student_dir: Path, prompt_file: Path, tmp_path: Path) -> dict[str, object]:
    return small_recipe(student_dir, reference_dir, prompt_file, tmp_path / "run")


@pytest.fixture
def on_grid(tmp_path: Path, tokenizer: Any) -> Any:
    """Makes a directory with the tiny model on the grid of that name."""
    from remend.files.atomic import write_json
    from remend.models.load import save_model

    def make(name: str) -> Path:
        directory = tmp_path / f"student-{name.replace(':', '-')}"
        model = build_model(len(tokenizer), width=256 if name == "gguf:tq2_0" else 64)
        stored = put_on_grid(model, name)
        save_model(model, tokenizer, directory)
        stored.write(directory)
        write_json(directory / "degradation.json", {"kind": "quantization", "format": name})
        return directory

    return make
