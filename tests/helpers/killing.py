"""Kill a recovery in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

WORKER = str(Path(__file__).with_name("worker.py"))


def kill_at(values: dict[str, object], step: int) -> None:
    done = subprocess.run(
        [sys.executable, WORKER, "kill", json.dumps(values), str(step)], capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
