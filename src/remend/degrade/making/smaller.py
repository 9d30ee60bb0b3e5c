"""A smaller model of the same architecture: a changed configuration, and the weights that remain.

The model is built anew from its configuration instead of being cut in place, so that everything transformers derives
from the configuration (cache indices, head counts, rotary tables) is right, and a strict load proves that the
configuration describes exactly the weights that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.errors import InputError
from remend.models.protocols import CausalLM


def rebuild(reference: CausalLM, changes: Mapping[str, object], state: Mapping[str, Tensor]) -> CausalLM:
    """A model like `reference` with another configuration and these weights.

    Args:
        reference: a transformers causal language model; stays as it is.
        changes: attributes of its (text) configuration and their new values.
        state: the new model's state dict.

    Returns:
        The new model in evaluation mode, on the reference's device, in its dtype, with its generation configuration.

    Raises:
        InputError: the architecture can't have that configuration, or its weights are not those in `state`.
    """
    whole = cast(PreTrainedModel, reference)
    kind = type(whole)
    asked = ", ".join(f"{name} {value}" for name, value in changes.items() if isinstance(value, int))
    config = copy.deepcopy(reference.config)
    text = config.get_text_config()
    for name, value in changes.items():
        setattr(text, name, value)
    try:
        if hasattr(config, "validate"):
            config.validate()
        model = kind(config).to(device=reference.device, dtype=whole.dtype)
        model.load_state_dict(dict(state), strict=True)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:240]
        raise InputError(f"{kind.__name__} can't have {asked}: {reason}") from error
    model.tie_weights()
    model.generation_config = copy.deepcopy(whole.generation_config)
    return cast(CausalLM, model.eval())


def path_of(model: CausalLM, module: nn.Module) -> str:
    """The name of a module inside a model, e.g. 'model.layers'."""
    return next(str(name) for name, part in model.named_modules() if part is module)
