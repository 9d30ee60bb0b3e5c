"""Whether the processes of a run still hold the same weights.

Each repairs and updates its own copy, from the same numbers; nothing would ever tell if one of them came off, and the
files are those of the first. So they compare hashes before training and at every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from remend.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def require_alike(accelerator: Accelerator, tensors: Mapping[str, Tensor], when: str) -> None:
    """Compare tensors with those of the other processes, bit for bit; all of them must call this.

    Args:
        accelerator: the processes.
        tensors: by name, in the same order everywhere.
        when: for the message, such as "after step 8".

    Raises:
        TrainingError: in every process, with the first one that differs from process 0, and in what.
    """
    if accelerator.num_processes == 1:
        return
    held = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    # the exclusive or of all elements' bits, in one pass on the tensor's own device
    hashes_T = torch.stack([torch.hash_tensor(tensor) for tensor in held.values()]).view(torch.int64)
    all_PT = cast(Tensor, accelerator.gather(hashes_T.to(accelerator.device)[None])).cpu()
    for process, own_T in enumerate(all_PT):
        others = [name for name, differs in zip(held, (own_T != all_PT[0]).tolist(), strict=True) if differs]
        if others:
            raise TrainingError(
                f"process {process} holds other weights than process 0 {when}: {others[0]}"
                f"{f' and {len(others) - 1} more' if others[1:] else ''} of {len(held)} tensors. Nothing of this is "
                "saved. Processes come off where their machines, GPUs or libraries are not alike: make them so and go "
                "on with remend recover --resume, or launch one process"
            )
