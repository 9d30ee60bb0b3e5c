"""Which of transformers' implementations of attention a model can be loaded with."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from remend.models.find import ModelSource
from remend.models.load import load_config, quietly

COMMON = ("eager", "sdpa", "flex_attention")
"""Those that need no package of their own."""


def attention_problem(source: ModelSource, name: str) -> str | None:
    """Why a model can't have its attention computed by the implementation of this name, or None.

    transformers itself is asked, of the model without weights: whether it knows the name, whether the model's class
    allows it, and whether the package is there.
    """
    why = (
        "its kernels compute in half precision alone, and the trained weights are float32, in which they are measured; "
        "sdpa takes torch's own flash kernel where the arithmetic is bfloat16"
        if "flash" in name
        else _refused(source, name)
    )
    if why is None:
        return None
    usable = [other for other in COMMON if other != name and _refused(source, other) is None]
    return (
        f"attn_implementation {name} can't be used for {source.spec}: {why}. Usable here: {', '.join(usable)}; or "
        "leave it out, and transformers chooses"
    )


def _refused(source: ModelSource, name: str) -> str | None:
    config = load_config(source)
    try:
        with quietly(), torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, trust_remote_code=source.trust_remote_code, attn_implementation=name
            )
    except (ImportError, ValueError, RuntimeError, OSError) as error:  # as its checks and loaders of kernels raise
        return " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:200]
    return None
