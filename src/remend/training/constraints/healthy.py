"""What the damage has not touched needs no training."""

from __future__ import annotations

import torch

from remend.models.protocols import CausalLM


def freeze_healthy_embeddings(model: CausalLM, origin: CausalLM | None) -> list[str]:
    """Stop training token embeddings and head where they are the teacher's still, bit for bit.

    Of a step on a small model they are the dearest part: their gradient is a product of the size of the vocabulary, and
    the words of a few thousand tokens say little about the others. Compare docs/measurements/degradations.md.

    Args:
        model: the student; its parameters' `requires_grad` is what changes.
        origin: the teacher's model, in float32 or rounded to a narrower dtype; or None, which freezes nothing.

    Returns:
        The names of the parameters that are trained no more.
    """
    theirs = {} if origin is None else dict(origin.named_parameters())
    outer = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    parameters = {id(p) for module in outer for p in module.parameters()}
    frozen = []
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        if id(parameter) not in parameters or other is None or other.shape != parameter.shape:
            continue
        if parameter.requires_grad and torch.equal(parameter.detach().to(other.dtype), other.detach()):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
