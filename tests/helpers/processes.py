"""Start helpers/worker.py in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKER = str(Path(__file__).with_name("worker.py"))


def kill_at(recipe: dict[str, Any], step: int) -> None:
    """A recovery that is killed right after it has logged a step."""
    command = [sys.executable, WORKER, "kill", json.dumps(recipe), str(step)]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def two_processes(*jobs: tuple[str, dict[str, Any]], environment: Mapping[str, str] | None = None) -> None:
    """Do jobs one after another, each shared by the same two processes: (what the worker calls it, its values)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER]
    words = [word for what, values in jobs for word in (what, json.dumps(values))]
    told = {**os.environ, **(environment or {})}
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, env=told)
    assert done.returncode == 0, done.stderr[-3000:]
