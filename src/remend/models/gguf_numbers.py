"""Numbers of a GGUF header that change what a model computes, and that transformers does not read.

transformers takes its own default for them, which is right for the one checkpoint that it was written for. Here they
are put into the model's configuration, so that a saved model keeps them; what transformers can't compute is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from remend.errors import InputError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig

_NORMS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
_READ: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_NORMS, _EPSILONS),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""Fields of the header, and how transformers' configurations call them: each has one of these names, or none."""
_WINDOWS = ("gpt-oss", "phi3")
"""Architectures that look back over a window, whose size transformers does not read."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Blocks of Gemma 27B, which scales its scores by another number; as llama.cpp, which tells it by them too."""

_NEEDED = (("block_count",), ("attention.head_count",), _NORMS)
"""Fields that llama.cpp asks for, one of each; without them transformers takes the numbers of some other model."""

_NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "router_logit_softcapping": (0.0,),
}
"""Fields of which transformers computes nothing in the architectures that it reads, and values that change nothing."""


def apply_numbers(config: PreTrainedConfig, reader: gguf.GGUFReader, what: str) -> bool:
    """Put a header's epsilons, caps, windows and scales into `config`, in place; whether that changed it.

    Raises InputError for a number that transformers' model of this architecture does nothing with, and for
    a header that lacks one of those by which llama.cpp builds a model.
    """
    architecture = str(reader.fields["general.architecture"].contents())
    start = f"{architecture}."
    header = {name.removeprefix(start): f.contents() for name, f in reader.fields.items() if name.startswith(start)}
    lacking = [names for names in _NEEDED if not any(name in header for name in names)]
    if lacking:
        names = " or ".join(start + name for name in lacking[0])
        raise InputError(
            f"the header of {what} lacks {names}, without which its model is not known; fetch or convert the file again"
        )
    for name, neutral in _NEUTRAL.items():
        if header.get(name, neutral[0]) not in neutral:
            raise InputError(_refusal(what, start + name, header[name]))
    given: dict[str, float | int | None] = {}
    for name, called in _READ.items():
        if name not in header:
            continue
        own = next((key for key in called if hasattr(config, key)), None)
        if own is None:
            raise InputError(_refusal(what, start + name, header[name]))
        given[own] = float(str(header[name])) or None
    if architecture in _WINDOWS and "attention.sliding_window" in header:
        given["sliding_window"] = int(str(header["attention.sliding_window"])) or None
    if architecture in _LARGEST:
        largest = config.num_hidden_layers == _LARGEST[architecture]
        given["query_pre_attn_scalar"] = (
            config.hidden_size // config.num_attention_heads if largest else config.head_dim
        )
    changed = {key: value for key, value in given.items() if getattr(config, key, None) != value}
    for key, value in changed.items():
        setattr(config, key, value)
    return bool(changed)


def _refusal(what: str, field: str, value: object) -> str:
    return (
        f"the header of {what} says {field} = {value}, of which transformers computes nothing in this architecture; "
        "without it it would be another model. Give the model as a transformers directory"
    )
