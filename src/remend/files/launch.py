"""How this process was started: by itself, or as one of several that do one command together.

Launchers (torchrun, accelerate launch, mpirun) say so in the environment, before anything is imported. accelerate reads
the same variables when it joins the processes, so what is asked here is known before that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
HERE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
OTHERS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

HOW = "torchrun --nproc-per-node"
"""How several processes are launched, as messages name it."""

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism",
}
"""Variables by which accelerate's configuration cuts a model over the processes, and what it then asks for."""


def processes() -> int:
    """How many there are, 1 for a command by itself."""
    return _number(SIZE, 1)


def rank() -> int:
    """Which of them this is; the one of number 0 measures, writes and prints."""
    return _number(RANK, 0)


def on_this_machine() -> int:
    """How many of them share this machine."""
    return _number(HERE, processes())


def go_alone() -> None:
    """Leave the others: whatever asks the environment from now on is told that this process is by itself."""
    for name in (*SIZE, *RANK, *HERE, *OTHERS):
        os.environ.pop(name, None)


def on_cpu() -> bool:
    """Whether accelerate was told to use no GPU (accelerate launch --cpu)."""
    return _said("ACCELERATE_USE_CPU")


def mixed_precision() -> str:
    """What accelerate was told of it: no, bf16, fp16 or fp8. The recipe's dtype decides in any case."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def alone_among_several() -> bool:
    """Whether accelerate launch was asked for several processes and started this one by itself, as it does on a CPU.

    It then names the address at which they would meet, and nobody's number.
    """
    told = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    return told and not any(name in os.environ for name in (*SIZE, *RANK))


def refusals() -> Iterator[str]:
    """What accelerate's configuration asks for that this loop does not do, a sentence each."""
    plain = f"launch without it, by {HOW} N -m remend … or by accelerate launch --multi_gpu --mixed_precision no"
    for name, what in SHARDED.items():
        if _said(name):
            yield f"accelerate's configuration asks for {what}, and a model is not sharded over processes yet; {plain}"
    if mixed_precision() in ("fp16", "fp8"):
        yield (
            f"accelerate's configuration asks for mixed_precision {mixed_precision()}, whose scaled gradients this "
            f"loop does not take; the recipe's dtype chooses the arithmetic (auto, float32, bfloat16): {plain}"
        )


def _said(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _number(names: Sequence[str], otherwise: int) -> int:
    """The first of the variables that is a whole number from 0."""
    texts = (os.environ.get(name, "") for name in names)
    return next((int(text) for text in texts if text.isdecimal()), otherwise)
