"""Rotary positions of a GGUF file: what its header and `rope_freqs.weight` say, and transformers does not read.

llama.cpp keeps a linear or YaRN scaling (arXiv 2309.00071) as numbers in the header, and Llama 3's as one factor a
frequency in a tensor. Both are put into the model's configuration, so that a saved model keeps them. What can't be
shown to compute the same is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from remend.errors import InputError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig

FACTORS = "rope_freqs.weight"
LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
_PARTIAL = ("stablelm", "phi3", "nemotron")
"""Architectures that turn a share of a head's dimensions, which transformers does not read from the file."""
_TOLERANCE = 1e-5
_OURS = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def apply_rope(config: PreTrainedConfig, reader: gguf.GGUFReader, what: str) -> bool:
    """Put a file's rotary positions into its configuration, in place; whether anything was changed.

    Raises InputError for a scaling that transformers does not compute, or whose numbers can't be had from the file.
    """
    architecture = str(reader.fields["general.architecture"].contents())
    start = f"{architecture}.rope."
    header = {name.removeprefix(start): f.contents() for name, f in reader.fields.items() if name.startswith(start)}
    tensors = {t.name: t for t in reader.tensors if t.name in (FACTORS, *LONG)}
    ropes = getattr(config, "rope_parameters", None)
    scaling = _scaling(header, config, what)
    if any(name in tensors for name in LONG):
        raise InputError(_refusal(what, f"{LONG[0]} and {LONG[1]}, frequencies that depend on a text's length"))
    if not isinstance(ropes, dict):
        if scaling or tensors:
            raise InputError(_refusal(what, "scaled positions, and its architecture in transformers has no rope"))
        return False
    nested = next((key for key in ("full_attention",) if isinstance(ropes.get(key), dict)), None)
    rope = dict(ropes[nested] if nested else ropes)
    before = dict(rope)
    if "freq_base" in header and architecture != "gemma4":
        rope["rope_theta"] = float(header["freq_base"])
    if architecture in _PARTIAL and "dimension_count" in header:
        rope["partial_rotary_factor"] = int(header["dimension_count"]) / _head(config)
    if scaling:
        if nested and architecture != "gemma3":
            raise InputError(_refusal(what, "scaled positions in an architecture whose layers have several kinds"))
        rope = {**rope, **scaling}
    if FACTORS in tensors:
        factors = torch.from_numpy(np.array(tensors[FACTORS].data, dtype=np.float32)).flatten()
        turned = int(_head(config) * float(rope.get("partial_rotary_factor") or 1.0))
        rope = _by_factors(rope, factors, turned, architecture, what)
    if all(_alike(before.get(key), value) for key, value in rope.items()):
        return False
    config.rope_parameters = {**ropes, nested: rope} if nested else rope
    return True


def _alike(old: object, new: object) -> bool:
    if isinstance(old, float | int) and isinstance(new, float | int):
        return math.isclose(old, new, rel_tol=1e-6)  # the header's numbers are float32
    return old == new


def _head(config: PreTrainedConfig) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _refusal(what: str, reason: str) -> str:
    return (
        f"{what} has {reason}; read without them it would be another model. Give the model as a transformers directory "
        "(its config.json tells of the scaling)"
    )


def _scaling(header: Mapping[str, object], config: PreTrainedConfig, what: str) -> dict[str, object]:
    """transformers' parameters for the header's `rope.scaling.*`; empty where nothing is scaled.

    As llama.cpp reads it: a factor without a type is linear, and scale_linear is the factor's older name.
    """
    given = {name.removeprefix("scaling."): v for name, v in header.items() if name.startswith("scaling.")}
    kind = str(given.get("type", "linear"))
    factor = float(str(given.get("factor") or header.get("scale_linear") or 1.0))
    neutral = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0, "alpha": 0.0}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise InputError(_refusal(what, f"positions scaled by {kind}, and remend applies linear and yarn"))
    for name in given.keys() - _OURS:
        allowed = (-1.0, 1.0) if name == "yarn_ext_factor" else (neutral.get(name),)
        if given[name] not in allowed:
            raise InputError(
                _refusal(what, f"rope.scaling.{name} = {given[name]}, which transformers does not compute")
            )
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    whole = int(str(given.get("original_context_length") or config.max_position_embeddings))
    betas = {key: given[f"yarn_{key}"] for key in ("beta_fast", "beta_slow") if f"yarn_{key}" in given}
    own = {"truncate": False} if config.model_type == "gpt_oss" else {}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": whole, **betas, **own}


def _by_factors(
    rope: dict[str, object], factors: Tensor, turned: int, architecture: str, what: str
) -> dict[str, object]:
    """The rope whose frequencies are the plain ones, each divided by its factor; `turned` dimensions are rotated."""
    if torch.equal(factors, torch.ones_like(factors)):
        return rope
    if architecture == "gemma4":  # which turns a share of the dimensions, and has an endless factor for the rest
        kept = (factors == 1).float().mean().item()
        if kept == rope.get("partial_rotary_factor") and bool(((factors == 1) | (factors > 1e20)).all()):
            return rope
    width, theta = 2 * len(factors), float(str(rope["rope_theta"]))
    plain = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    if rope.get("rope_type", "default") == "default" and width == turned:
        for candidate in _llama3(plain, factors):
            if torch.allclose(plain / _slowed({**candidate, "rope_theta": theta}, width), factors, rtol=_TOLERANCE):
                return {**rope, **candidate}
    raise InputError(
        _refusal(what, f"{FACTORS}, a factor for each frequency, which are none that Llama 3's rule gives")
    )


def _slowed(rope: Mapping[str, float | int | str], width: int) -> Tensor:
    """Llama 3's frequencies, as transformers computes them from its parameters."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=width, num_attention_heads=1, head_dim=width, rope_parameters=dict(rope))
    slowed: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    return slowed


def _llama3(plain: Tensor, factors: Tensor) -> Iterator[dict[str, float | int | str]]:
    """Parameters of Llama 3's rule that may have made these factors.

    A frequency of t turns in the original length is divided by `factor` up to low_freq_factor turns, and kept from
    high_freq_factor on. In between the share that is kept rises linearly with t. The three numbers have one of them
    to spare, so the low one is 1, as in all of Llama 3.
    """
    factor = round(float(factors.max()), 4)
    between = (factors > 1 + _TOLERANCE) & (factors < factor - _TOLERANCE * factor)
    turns = (plain[between] / (2 * math.pi)).double()
    kept = (1 / factors[between].double() - 1 / factor) / (1 - 1 / factor) if factor > 1 else turns
    lengths: list[tuple[float, float]] = [(4.0, 8192.0), *((4.0, 2.0**k) for k in range(5, 24))]
    if len(turns):  # a single frequency in between leaves the sharpness open
        lengths[:0] = [(high, float(((kept * (high - 1) + 1) / turns).mean())) for high in (4.0, 3.0, 2.0, 8.0)]
    if len(turns) > 1:
        slope, offset = np.polyfit(turns.numpy(), kept.numpy(), 1)
        if offset < 0:
            high = round(1 - 1 / float(offset), 3)
            lengths.insert(0, (high, float(slope) * (high - 1)))
    for high, length in lengths:
        yield {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(length),
        }
