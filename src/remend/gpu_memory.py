"""How much memory of a GPU this process may still take."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """What the driver has left on a CUDA device, and what torch's allocator keeps without using it.

    The driver counts blocks that the allocator holds for reuse as used, so its own figure shrinks over a run in which
    nothing grows.
    """
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
