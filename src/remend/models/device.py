"""Choose device and dtype, and tell what memory a GPU has left."""

from __future__ import annotations

import psutil
import torch

from remend.errors import InputError


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: a CUDA device has what its driver has left and what torch's allocator
    keeps without using it, elsewhere it is what the system has.

    The driver counts blocks that the allocator holds for reuse as used, so its own figure shrinks over a run in which
    nothing grows.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def choose_device(name: str) -> torch.device:
    """'auto' is a CUDA GPU where there is one, else the CPU. Raises InputError for a device that this machine lacks.

    Apple's mps has no float64, in which losses are summed and calibration is solved, so 'auto' never takes it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(
            f'device "{name}" can\'t be used here ({reason}); allowed: auto, cpu, cuda, cuda:N, mps'
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware multiplies in it, else float32.

    On a CPU without AMX or AVX512-BF16 bfloat16 was measured 7 times slower forward and 25 times slower backward than
    float32; with AVX512-BF16 the demo's training took 0.71 of float32's time (docs/speed.md).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def mixed_precision(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a float32 model computes in `dtype`; it can be entered again and again."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
