"""How many positions a chunk of logits has."""

from __future__ import annotations

import pytest
import torch

from remend.models import device
from remend.models.device import CHUNK_BYTES, choose_device, chunk_rows, device_problem


def test_a_chunk_of_logits_fits_its_bytes() -> None:
    cpu = torch.device("cpu")
    for vocabulary in (1000, 49152):
        rows = chunk_rows(vocabulary, cpu)
        assert rows * vocabulary * 4 <= CHUNK_BYTES < (rows + 1) * vocabulary * 4
    assert chunk_rows(151936, cpu) == 64
    assert chunk_rows(10**7, cpu) == 16


def test_a_chunk_on_a_gpu_follows_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, rows = 0, {}
    monkeypatch.setattr(device, "free_bytes", lambda device: free)
    for free in (0, 2**30, 10 * 2**30, 80 * 2**30):
        rows[free // 2**30] = chunk_rows(151936, torch.device("cuda"))
    assert rows == {0: 64, 1: 64, 10: 353, 80: 883}  # 64 rows at least, then 2%, 512 MiB at most


def test_each_of_several_processes_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = {}
    for count in (1, 2, 3):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        said[count] = [device_problem(torch.device(name)) for name in ("cpu", "cuda", "cuda:1", "mps")]
    assert said[1] == [None] * 4
    assert said[2][:2] == [None, None]
    assert "device cuda:1 is one GPU, and each of 2 processes takes one of its own; give device: cuda" in str(
        said[2][2]
    )
    assert "device mps can't be shared by 2 processes" in str(said[2][3])
    assert "3 processes on this machine take a GPU each, and torch sees 2" in str(said[3][1])


def test_accelerate_may_be_told_to_use_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert choose_device("auto").type == "cpu"
