"""Keep the memory that tensors free, so that the next ones need not be given to the process page by page."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Names of malloc.h."""

GROWTH = 64 * 2**20
"""Bytes by which the process grows at a time."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let the C library reuse large blocks instead of returning each to the system when it is freed.

    glibc maps every block above 32 MiB anew, and the system clears it page by page when it is first written (what that
    costs: docs/speed.md). What was freed stays with the process instead, and its holes are not all of a size that is
    asked for again, so the peak may grow.

    Args:
        environment: where malloc is set up there already (MALLOC_…, GLIBC_TUNABLES), nothing is changed.

    Returns:
        Whether it was done. Elsewhere than on Linux with glibc it is not.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # -1 as a size is the largest there is: memory on top is never given back
    return all(mallopt(name, value) == 1 for name, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, GROWTH)))
