"""A degradation with one block in memory writes what the whole model would have given, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import remend
from helpers.tiny import build_model
from remend.errors import FileError, InputError, RemendError
from remend.files.atomic import UNFINISHED
from remend.models.blocks import files as block_files
from remend.models.blocks import writing


@pytest.fixture(params=["float32-tied", "bfloat16-untied"])
def healthy(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    """A model of three blocks in several files."""
    dtype, tied = request.param.split("-")
    model = build_model(320, layers=3, tied=tied == "tied").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "healthy", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "healthy")
    return tmp_path / "healthy"


def content(directory: Path) -> dict[str, bytes]:
    """Every file."""
    paths = [p for p in directory.rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


def assert_same(one: Path, other: Path) -> None:
    assert content(one) == content(other)
    records = [json.loads((path / "degradation.json").read_text()) for path in (one, other)]
    assert len(records[0]["files"]) > 3
    assert records[0] == records[1]


@pytest.mark.parametrize("name", ["int3-g32", "int4-g64-sym", "gguf:q4_0", "nvfp4", "mxfp4"])
def test_a_grid_made_block_by_block_is_the_same(healthy: Path, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"format": name, "skip": ["*.1.mlp.up_proj"], "probe": name == "int3-g32"}
    remend.quantize(healthy, tmp_path / "whole", **options)
    record = remend.quantize(healthy, tmp_path / "parts", placement="disk", **options)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert record["matrices"] == 20
    assert ("probe" in record) == options["probe"]


@pytest.mark.parametrize("sparsity", ["2:4", "0.4"])
def test_zeros_set_block_by_block_are_the_same(healthy: Path, tmp_path: Path, sparsity: str) -> None:
    remend.prune(healthy, tmp_path / "whole", sparsity=sparsity, probe=False)
    remend.prune(healthy, tmp_path / "parts", sparsity=sparsity, placement="disk", probe=False)
    assert_same(tmp_path / "whole", tmp_path / "parts")


KILLED = """
import os, signal, sys
import remend
from remend.models.blocks.writing import PartByPart

whole = PartByPart.write
def write(self, tensors, about):
    if len(self._done) == int(sys.argv[3]):
        self._files.write({name: tensor for name, tensor in list(tensors.items())[:2]})  # half of the part is there
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, tensors, about)
PartByPart.write = write
remend.quantize(sys.argv[1], sys.argv[2], format="int3-g32", placement="disk", probe=False)
"""


@pytest.mark.parametrize("part", [0, 2, 3])
def test_a_killed_one_is_gone_on_with(
    healthy: Path, tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    remend.quantize(healthy, tmp_path / "whole", format="int3-g32", probe=False)
    command = [sys.executable, "-c", KILLED, str(healthy), str(tmp_path / "parts"), str(part)]
    died = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (tmp_path / "parts").exists()
    written: list[int] = []
    whole = writing.PartByPart.write
    monkeypatch.setattr(writing.PartByPart, "write", lambda self, t, a: (written.append(len(t)), whole(self, t, a)))
    remend.quantize(healthy, tmp_path / "parts", format="int3-g32", placement="disk", probe=False)
    assert len(written) == 4 - part  # three blocks and the rest
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert not list(tmp_path.glob(f"{UNFINISHED}*"))


def test_what_was_begun_for_another_format_or_damaged_is_made_anew(healthy: Path, tmp_path: Path) -> None:
    remend.quantize(healthy, tmp_path / "whole", format="int3-g32", probe=False)

    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    unfinished = tmp_path / f"{UNFINISHED}parts"
    for damage, name in ((False, "int4-g32"), (True, "int3-g32")):
        patched = pytest.MonkeyPatch()
        patched.setattr(writing.PartByPart, "end", stop)
        with pytest.raises(KeyboardInterrupt):
            remend.quantize(healthy, tmp_path / "parts", format=name, placement="disk", probe=False)
        patched.undo()
        if damage:
            path = sorted(unfinished.glob("model*.safetensors"))[0]
            held = bytearray(path.read_bytes())
            held[-3] ^= 1
            path.write_bytes(held)
    remend.quantize(healthy, tmp_path / "parts", format="int3-g32", placement="disk", probe=False)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_file_that_changes_between_blocks_is_one_message(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, done = block_files.TensorFiles.read, []

    def read(self: Any, name: str) -> Any:
        if ".layers.2." in name and not done:
            done.append(name)
            path = self.places[name]
            path.with_name("other").write_bytes(path.read_bytes())
            path.with_name("other").replace(path)
        return whole(self, name)

    monkeypatch.setattr(block_files.TensorFiles, "read", read)
    with pytest.raises(FileError, match="changed while it was being read block by block"):
        remend.quantize(healthy, tmp_path / "parts", placement="disk", format="int3-g32", probe=False)
    assert done
    assert not (tmp_path / "parts").exists()


def test_a_disk_that_is_too_small_is_known_before_the_first_block(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=100_000))
    with pytest.raises(FileError, match=r"files of weights take 0\.\d MiB, and 0\.1 MiB are free in .*another disk"):
        remend.quantize(healthy, tmp_path / "parts", placement="disk", format="int3-g32", probe=False)
    assert not list(tmp_path.glob(".remend-unfinished*/**/*.safetensors"))
    assert not (tmp_path / "parts").exists()


def test_a_number_that_is_none_is_named(healthy: Path, tmp_path: Path) -> None:
    model = build_model(320, layers=3)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for file in healthy.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileError, match=r"1 of 8192 numbers of model\.layers\.1\.mlp\.up_proj\.weight are NaN"):
        remend.quantize(tmp_path / "broken", tmp_path / "parts", placement="disk", format="int3-g32", probe=False)


def test_placements_that_cannot_be(healthy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the whole model in memory"):
        remend.quantize(healthy, tmp_path / "a", method="gptq", placement="disk")
    with pytest.raises(RemendError, match="smollm2: it is a GGUF file"):
        remend.quantize("smollm2", tmp_path / "a", placement="disk")
    assert not (tmp_path / "a").exists()


def test_auto_reads_from_the_disk_where_memory_is_short(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remend.quantize(healthy, tmp_path / "whole", format="int3-g32", probe=False)
    assert "placement" not in capsys.readouterr().err
    monkeypatch.setattr("remend.models.blocks.placement.free_bytes", lambda device: 10**6)
    remend.quantize(healthy, tmp_path / "parts", format="int3-g32", probe=False)
    assert "placement: disk for" in capsys.readouterr().err.replace("\n", " ")
    assert_same(tmp_path / "whole", tmp_path / "parts")
