"""Load and save models, tokenizers and configurations.

Weights are read from safetensors or GGUF only: nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from remend.errors import FileError
from remend.models import adapters
from remend.models.find import ModelSource, fetch_model
from remend.models.gguf_header import forget, parsed_once
from remend.models.packed_weights import exact_products, packing, require_compressed_tensors, unpacked
from remend.models.protocols import CausalLM, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _location(source: ModelSource) -> tuple[str, dict[str, object]]:
    assert source.path is not None, "fetch_model() comes first"
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no advice from transformers inside: our own output says what happens."""
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as gguf_loading
    from transformers.utils import logging

    level, bars, tqdm = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_loading.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_loading.tqdm = partial(tqdm, disable=True)  # it does not ask the logging setting
    try:
        yield
    finally:
        gguf_loading.tqdm = tqdm
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for unreadable models
        reason = " ".join(str(error).split())[:300]
        raise FileError(f"the {what} of {source.spec} can't be read: {type(error).__name__}: {reason}") from error


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's transformers configuration."""
    from transformers import AutoConfig

    source = fetch_model(source, weights=False)
    where, extra = _location(source.base or source)
    with _quietly(), parsed_once(), _explained(source, "configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            where, trust_remote_code=source.trust_remote_code, **extra
        )
    return config


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    source = fetch_model(source, weights=False)
    own = source.base is None or bool(source.path and (source.path / "tokenizer_config.json").is_file())
    where, extra = _location(source if own or source.base is None else source.base)
    with _quietly(), parsed_once(), _explained(source, "tokenizer"):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=source.trust_remote_code, **extra)
    return tokenizer


def load_model(source: ModelSource, *, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model, in evaluation mode.

    Packed tensors (GGUF, compressed-tensors, bitsandbytes) are dequantized, so that the model can be trained and
    saved; their products scale x value are float32 before they become `dtype`.

    An adapter is put into its base; then its parameters alone are trainable.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GgufConfig

    source = fetch_model(source, weights=True)
    if source.base and source.path:
        model = load_model(source.base, dtype=dtype, device=device)
        adapters.load_adapter(model, source.path)
        return model
    where, extra = _location(source)
    method = packing(source.path).get("quant_method") if source.kind == "directory" else None
    if source.kind == "gguf":
        extra["quantization_config"] = GgufConfig(dequantize=True)
    elif method == "compressed-tensors":
        require_compressed_tensors(source.spec)
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    exactly = exact_products() if method == "compressed-tensors" else nullcontext()
    with _quietly(), parsed_once(), _explained(source, "model"), exactly:
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
        if method:
            model = unpacked(model)
    forget()  # weights come last
    if info["missing_keys"] and source.kind == "directory":
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise FileError(
            f"the model of {source.spec} is incomplete: {len(info['missing_keys'])} tensors are missing ({names}, …)"
        )
    ready: CausalLM = model.to(device).eval()
    return ready


def save_model(model: CausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a plain transformers directory (safetensors, tokenizer, chat template, generation config).

    Of a model with an adapter only the adapter is written, as peft does: it stays apart from its base.
    """
    with _quietly():
        if adapters.is_adapted(model):
            adapters.save_adapter(model, directory)
        else:
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def skeleton(source: ModelSource, config: PreTrainedConfig) -> CausalLM:
    """The model of `config`, which is the source's, without weights: names and shapes, nothing allocated."""
    from transformers import AutoModelForCausalLM

    with _quietly(), torch.device("meta"):
        model: CausalLM = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    return model


def eos_ids(model_or_config: CausalLM | PreTrainedConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    generation = getattr(model_or_config, "generation_config", None)
    ids: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(v) for v in value)
    return tuple(sorted(ids))
