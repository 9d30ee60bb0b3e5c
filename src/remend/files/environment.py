"""What a manifest says of the machine and of the versions that ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remend.plugins import asked_for


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory_mib(device: torch.device) -> dict[str, int]:
    """Memory of this process now, `rss_mib`; of a CUDA device also the most that it held so far, `gpu_mib`."""
    import psutil

    memory = {"rss_mib": round(psutil.Process().memory_info().rss / 2**20)}
    if device.type == "cuda":
        memory["gpu_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return memory


def environment() -> dict[str, Any]:
    """Versions and hardware, for the manifest; and the modules that the command named with --import."""
    import importlib.metadata
    import platform
    import sys

    import psutil

    names = ("remend", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "datasets", "gguf")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "hardware": hardware,
        "git_commit": _git_commit(),
        "command": sys.argv,
        **({"imports": list(asked_for)} if asked_for else {}),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may move a figure between two manifests, as 'torch 2.12.0 to 2.13.0'; what either lacks is left out."""
    moved = []
    for part in ("versions", "hardware"):
        old, new = before.get(part), now.get(part)
        old, new = old if isinstance(old, Mapping) else {}, new if isinstance(new, Mapping) else {}
        names = [n for n in old if n in new] if part == "versions" else ["processor", "threads", "gpus"]
        moved += [f"{n} {old[n]} to {new[n]}" for n in names if n in old and n in new and old[n] != new[n]]
    return moved + [
        f"{n} {before[n]} to {now[n]}"
        for n in ("dtype", "device", "processes")
        if n in before and n in now and before[n] != now[n]
    ]


def processor() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git_commit() -> str | None:
    """Commit of the source tree that runs, with '-dirty' where it differs; None for an installed package."""
    import subprocess

    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
