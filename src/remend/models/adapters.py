"""LoRA adapters (arXiv 2106.09685) by peft: add one to a model, load and save one, fold one into dense weights.

peft puts its layers into the model in place, so scorer and sampler go on with the same transformers model. The base's
weights are frozen and never written: what they were bought for (a grid, zeros) stays, and the adapter stays apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject, read_json
from remend.models.protocols import CausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
BASE_PRINT = "remend.base"
"""Metadata of the weights' file: which base the adapter was trained on, see base_print."""

_PREFIX = "base_model.model."
"""peft's files name tensors as its own wrapper sees them."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def is_adapted(model: object) -> bool:
    """Whether a model carries an adapter's layers."""
    return hasattr(model, "peft_config")


def base_of(directory: Path) -> str:
    """What the adapter in `directory` names as its base: a path, a hub id[@revision] or smollm2.

    A path is looked for from the working directory, then from the adapter's own. Raises FileError where none is named.
    """
    settings = _settings(directory)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise FileError(
            f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path, so what is under the adapter is unknown; "
            "write the base's path or hub id there"
        )
    beside = directory / name
    name = str(beside) if beside.exists() and not Path(name).exists() else name
    if is_adapter(Path(name)):
        raise FileError(
            f"the base {name} of adapter {directory} is an adapter itself; merge that one into its own base first"
        )
    return f"{name}@{revision}" if isinstance(revision, str) and revision and not Path(name).exists() else name


def _settings(directory: Path) -> JsonObject:
    path = directory / ADAPTER_CONFIG
    settings = read_json(path)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise FileError(f"{path} describes an adapter of the kind {kind}; remend works with LORA")
    return dict(settings)


def add_lora(
    model: CausalLM,
    *,
    rank: int,
    alpha: int | None = None,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
    base: str | None = None,
) -> None:
    """Put a fresh LoRA adapter into `model`, in place; only its parameters are trainable afterwards.

    Each target becomes x ↦ W x + (alpha / rank) · B A x, A [rank, I] drawn from `seed`, B [O, rank] zero: the model's
    logits don't change until B does. The adapter is float32, or of the base's dtype where that is float64.

    Args:
        model: a transformers causal language model.
        rank: of the update.
        alpha: None is 2 · rank.
        targets: 'all-linear' (every linear layer of the decoder, not the head), or ends of module names.
        seed: of A.
        base: how the adapter's file names its base; None is the model's own name_or_path.

    Raises:
        InputError: the model carries an adapter already, or a target matches no linear layer or the head.
    """
    from peft import LoraConfig

    if is_adapted(model):
        raise InputError("the model carries an adapter already, which is trained as it is; leave lora out")
    named = check_targets(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=named,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or model.name_or_path,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, config)


def check_targets(model: CausalLM, targets: str | Sequence[str]) -> list[str]:
    """The ends of names that `targets` of `add_lora` stand for; weights aren't looked at.

    Raises InputError where one names no linear layer of the decoder.
    """
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    wanted = [] if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    missing = [t for t in wanted if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if missing or not targets:
        raise InputError(
            f"lora.targets: {', '.join(missing) or 'the empty list'} is no linear layer of the decoder (the head can't "
            f"be one); allowed: all-linear, or a list of {', '.join(kinds)}"
        )
    # ends of names, not peft's list of every layer: laid on a deeper base, the adapter is then found to be incomplete
    return kinds if targets == "all-linear" else list(wanted)


def _inject(model: CausalLM, config: LoraConfig) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(config, cast(nn.Module, model), adapter_name=_NAME)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "the adapter changes the model's head, which remend scores apart from it and can't; "
            "merge the adapter into its base first"
        )
    model.eval()


def load_adapter(model: CausalLM, directory: Path) -> None:
    """Put the adapter of `directory` into its base, in place; only its parameters are trainable afterwards.

    Raises:
        FileError: a file is missing or unreadable, or the weights are pickled.
        InputError: the adapter belongs to another base: a module or a shape differs.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    stored = {name.removeprefix(_PREFIX): t for name, t in _tensors(directory).items()}
    settings = _settings(directory)
    config = LoraConfig.from_pretrained(str(directory))
    config.inference_mode = False  # as saved, peft would freeze it
    try:
        _inject(model, config)
    except ValueError as error:  # peft's own words: which target modules it did not find
        if isinstance(error, InputError):
            raise
        raise InputError(_another_base(directory, settings, " ".join(str(error).split())[:200])) from None
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problem = _difference(expected, stored)
    if problem:
        raise InputError(_another_base(directory, settings, problem))
    made_for = _print_in(directory)
    if made_for and made_for != base_print(model):
        raise InputError(_another_base(directory, settings, "the shapes agree, but that base has other weights"))
    set_peft_model_state_dict(model, stored)


def base_print(model: CausalLM) -> str:
    """Tells one base from another of the same shapes: a hash of the first and the last adapted layer's weights.

    In bfloat16, so that a base loaded in it has the same one as a base loaded in float32.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    digest = hashlib.sha256()
    for layer in (layers[0], layers[-1]):
        weight: Tensor = layer.get_parameter("weight").detach()
        weight = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _print_in(directory: Path) -> str | None:
    """What `save_adapter` noted of the base; None for an adapter of another tool."""
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
        noted: str | None = (file.metadata() or {}).get(BASE_PRINT)
    return noted


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        why = "it is missing"
        if any(directory.glob("*.bin")):
            why = "its weights are pickled, and remend never unpickles; save it as safetensors"
        raise FileError(f"adapter {directory} has no {ADAPTER_WEIGHTS}: {why}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"adapter file {path} can't be read: {error}") from None
    return tensors


def _difference(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    for name, tensor in stored.items():
        if name not in expected:
            return f"it has {name}, which the base has no place for"
        if tensor.shape != expected[name].shape:
            return f"{name} is {tuple(tensor.shape)}, and the base needs {tuple(expected[name].shape)}"
    missing = [name for name in expected if name not in stored]
    return f"{missing[0]} is missing in it" if missing else None


def _another_base(directory: Path, settings: JsonObject, reason: str) -> str:
    return (
        f"adapter {directory} does not fit its base {settings.get('base_model_name_or_path')}: {reason}. "
        f"It was made for another model; name that one as base_model_name_or_path in {ADAPTER_CONFIG}"
    )


def save_adapter(model: CausalLM, directory: Path) -> None:
    """Write a model's adapter as peft does: adapter_config.json and adapter_model.safetensors, float32."""
    from peft import get_peft_model_state_dict

    config: LoraConfig = vars(model)["peft_config"][_NAME]
    settings: JsonObject = {**config.to_dict(), "inference_mode": True}  # type: ignore[no-untyped-call]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(
        {f"{_PREFIX}{name}": t.detach().cpu().contiguous() for name, t in tensors.items()},
        directory / ADAPTER_WEIGHTS,
        metadata={"format": "pt", BASE_PRINT: base_print(model)},
    )


@contextmanager
def without_adapter(model: CausalLM) -> Iterator[None]:
    """A context in which the model computes as if it carried no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Fold the adapter into the weights under it, W + (alpha / rank) · B A, in place: a plain model again.

    For dense weights only: on a quantization grid or under a mask the sum would no longer lie.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    delattr(model, "peft_config")
