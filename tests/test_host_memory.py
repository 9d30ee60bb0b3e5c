"""Freed memory is reused: counted in page faults, not in seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from remend.host_memory import keep_freed_memory

CHURN = """
import resource, sys
from remend.host_memory import keep_freed_memory
import torch
if "keep" in sys.argv: assert keep_freed_memory({})
for _ in range(60): torch.empty(12 * 2**20).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(*words: str) -> int:
    """Page faults of a process in which 60 tensors of 48 MiB come and go."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", CHURN, *words], env=plain, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_tensors_reuse_what_was_freed() -> None:
    pages = 60 * 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    plain = faults()
    if plain < pages:
        pytest.skip("this system gives large pages by itself")
    assert faults("keep") < 0.4 * plain


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_set_up_is_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1", "PATH": "/bin"})


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory({})
