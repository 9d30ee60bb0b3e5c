"""Choose device and dtype, and tell what memory a GPU has left."""

from __future__ import annotations

import psutil
import torch

from remend.errors import InputError
from remend.files.launch import on_cpu, on_this_machine, processes

CHUNK_BYTES, CHUNK_LIMIT = 16 * 2**20, 512 * 2**20
"""Least and largest size of one [chunk, V] float32 tensor. The least leaves no mark on a CPU's peak memory."""

CHUNK_ROWS = 64
"""Positions of a chunk at least: a product with fewer reads the head for so little that a CPU waits for its memory. At
a vocabulary of 152k, CHUNK_BYTES alone would make it 27."""

CHUNK_SHARE = 0.02
"""Of a GPU's free memory that one such tensor takes: about six of them are alive at once."""


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


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Positions a chunk, so that one float32 [chunk, V] tensor takes CHUNK_BYTES, on a GPU more where more is free.

    Sums over chunks of other sizes differ by rounding, so a CPU's size is constant: its runs repeat to the byte.
    """
    return rows_within(vocabulary, free_bytes(device) if device.type == "cuda" else 0)


def rows_within(vocabulary: int, free: int) -> int:
    """`chunk_rows` of a GPU with so many free bytes; 0 stands for a CPU."""
    share, row = int(CHUNK_SHARE * free), 4 * vocabulary
    least = max(16, min(CHUNK_ROWS, CHUNK_LIMIT // row))
    return max(least, min(CHUNK_LIMIT, max(CHUNK_BYTES, share)) // row)


def choose_device(name: str) -> torch.device:
    """'auto' is a CUDA GPU where there is one and accelerate was not told to use none, else the CPU.

    Raises InputError for a device that this machine lacks.

    Apple's mps has no float64, in which losses are summed and calibration is solved, so 'auto' never takes it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not on_cpu() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(
            f'device "{name}" can\'t be used here ({reason}); allowed: auto, cpu, cuda, cuda:N, mps'
        ) from None
    return device


def device_problem(device: torch.device) -> str | None:
    """What stands against several processes on this device, each of which takes the GPU of its number; else None."""
    count = on_this_machine()
    if processes() == 1 or device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device} can't be shared by {processes()} processes; give cpu or cuda, or launch one process"
    if device.index is not None:
        return (
            f"device {device} is one GPU, and each of {processes()} processes takes one of its own; give device: cuda, "
            "and let CUDA_VISIBLE_DEVICES choose the GPUs"
        )
    if count > torch.cuda.device_count():
        return (
            f"{count} processes on this machine take a GPU each, and torch sees {torch.cuda.device_count()}; launch "
            "as many as there are GPUs, or give device: cpu"
        )
    return None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware multiplies in it, else float32.

    On a CPU without AMX or AVX512-BF16 bfloat16 was measured 7 times slower forward and 25 times slower backward than
    float32; with AVX512-BF16 the demo's training took 0.71 of float32's time (docs/measurements/speed.md).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    has = {"cuda": gpu_has_bfloat16, "cpu": _cpu_multiplies_bfloat16}.get(device.type, lambda: False)
    return torch.bfloat16 if has() else torch.float32


def gpu_has_bfloat16() -> bool:
    """Whether the GPU multiplies in bfloat16. Those before Ampere (T4, V100) emulate it, slower than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def mixed_precision(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a float32 model computes in `dtype`; it can be entered again and again."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
