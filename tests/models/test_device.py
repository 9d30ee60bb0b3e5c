"""How many positions a chunk of logits has."""

from __future__ import annotations

import pytest
import torch

from remend.models import device
from remend.models.device import CHUNK_BYTES, chunk_rows


def test_a_chunk_of_logits_fits_its_bytes() -> None:
    cpu = torch.device("cpu")
    for vocabulary in (1000, 49152, 151936):
        rows = chunk_rows(vocabulary, cpu)
        assert rows * vocabulary * 4 <= CHUNK_BYTES < (rows + 1) * vocabulary * 4
    assert chunk_rows(10**7, cpu) == 16


def test_a_chunk_on_a_gpu_follows_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, rows = 0, {}
    monkeypatch.setattr(device, "free_bytes", lambda device: free)
    for free in (0, 2**30, 10 * 2**30, 80 * 2**30):
        rows[free // 2**30] = chunk_rows(151936, torch.device("cuda"))
    assert rows == {0: 27, 1: 35, 10: 353, 80: 883}  # 16 MiB at least, then 2%, 512 MiB at most
