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
from safetensors.torch import load_file, save
from torch import Tensor, nn

from remend.errors import FileError, InputError
from remend.files.atomic import JsonObject
from remend.files.reading import read_object
from remend.models.accounting import FLOATS
from remend.models.frozen_base import widen
from remend.models.frozen_linear import FrozenLinear
from remend.models.matrices import matrices
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
    settings = read_object(path)
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
    dropout: float = 0.0,
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
        targets: 'all-linear' (every linear layer of the decoder, not the head, routers or experts), or ends of module
            names.
        dropout: of A's inputs, in passes inside `dropping` alone.
        seed: of A.
        base: how the adapter's file names its base; None is the model's own name_or_path.

    Raises:
        InputError: the model carries an adapter already, or a target matches no linear layer or the head.
    """
    from peft import LoraConfig

    if is_adapted(model):
        raise InputError("the model carries an adapter already, which is trained as it is; leave lora out")
    named = check_targets(model, targets)
    layers = matrices(model)
    ends = tuple(f".{end}" for end in named)
    outside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=named,
        exclude_modules=[name for name in outside if f".{name}".endswith(ends)] or None,
        fan_in_fan_out=any(m.transposed and m.expert is None for m in layers.values()),
        lora_dropout=dropout,
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
    linear = [name for name, matrix in matrices(model).items() if matrix.expert is None]
    wanted = [] if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    missing = [t for t in wanted if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if missing or not targets:
        raise InputError(
            f"lora.targets: {', '.join(missing) or 'the empty list'} is no linear layer of the decoder (the head and "
            f"experts can't be one); allowed: all-linear, or a list of {', '.join(kinds)}"
        )
    # ends of names, not peft's list of every layer: laid on a deeper base, the adapter is then found to be incomplete
    return kinds if targets == "all-linear" else list(wanted)


def untouched_experts(model: CausalLM) -> str | None:
    """What to say of a model whose experts an adapter leaves as they are; None where it has none."""
    known = matrices(model).values()
    names = sorted({m.parameter.rpartition(".")[2] for m in known if m.expert is not None})
    if not names:
        return None
    sizes = [(m.in_features * m.out_features, m.expert is not None) for m in known]
    share = sum(size for size, expert in sizes if expert) / sum(size for size, _ in sizes)
    return (
        f"the adapter leaves {share:.0%} of the decoder's matrix weights as they are: it is laid on linear layers, and "
        f"experts and other matrices in one parameter ({', '.join(names)}) are none"
    )


def unmergeable(directory: Path, base: CausalLM) -> str | None:
    """Why the adapter in `directory` can't be folded into `base`, whose weights aren't looked at; None where it can."""
    settings, tensors = _settings(directory), _tensors(directory)
    replaced = [key for key in ("modules_to_save", "trainable_token_indices") if settings.get(key)]
    if replaced:
        return f"it has {' and '.join(replaced)}, which replaces parts of the base instead of being added to them"
    if base.config.get_text_config().tie_word_embeddings and any("lora_embedding_A" in name for name in tensors):
        return "it changes the embedding, which is the head too"
    modules = dict(base.named_modules())
    for name in tensors:
        layer, _, bias = name.removeprefix(_PREFIX).partition(".lora_B.bias")
        if layer != name.removeprefix(_PREFIX) and not bias and getattr(modules.get(layer), "bias", None) is None:
            return f"it adds a bias to {layer}, which has none"
    return None


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
    _drop_copies(model, expected, stored, directory)
    problem = _difference(expected, stored)
    if problem:
        raise InputError(_another_base(directory, settings, problem))
    made_for = _print_in(directory)
    if made_for and made_for != base_print(model):
        raise InputError(_another_base(directory, settings, "the shapes agree, but that base has other weights"))
    set_peft_model_state_dict(model, stored)


def _drop_copies(model: CausalLM, expected: Mapping[str, Tensor], stored: dict[str, Tensor], directory: Path) -> None:
    """Leave out embeddings that peft stores beside an adapter although they are the base's own.

    Raises InputError where they have other rows or other values than the base.
    """
    base, ends = model.state_dict(), (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = tuple(f"{name}." for name, module in model.named_modules() if module in ends)
    for name in [name for name in stored if name.startswith(vocabulary)]:
        part = name if name in base else name.replace(".weight", ".base_layer.weight")
        kept = expected.get(name, base.get(part))
        if kept is not None and stored[name].shape[1:] == kept.shape[1:] and len(stored[name]) != len(kept):
            raise InputError(
                f"adapter {directory} does not fit its base: {name} has {len(stored[name])} rows and the base's "
                f"vocabulary {len(kept)}, so it was trained after the vocabulary was resized. Resize the base likewise "
                "(resize_token_embeddings), save it, and name that as base_model_name_or_path in "
                f"{ADAPTER_CONFIG}"
            )
        if name in expected or kept is None:
            continue
        if not torch.equal(stored[name].to(kept), kept):
            raise InputError(
                f"adapter {directory} does not fit its base: it brings {name} of its own, which differs from the "
                "base's. Merge it with peft into the base that it was trained on, and use the result"
            )
        del stored[name]


def base_print(model: CausalLM) -> str:
    """Tells one base from another of the same shapes: a hash of the first and the last adapted layer's weights.

    In bfloat16, so that a base loaded in it has the same one as a base loaded in float32.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    digest = hashlib.sha256()
    for layer in (layers[0], layers[-1]):
        held = layer.weight if isinstance(layer, FrozenLinear) else next(layer.parameters())
        weight: Tensor = held.detach()
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
    require_floats(directory)
    tensors: dict[str, Tensor] = load_file(path)
    for name, tensor in tensors.items():
        count = int((~tensor.isfinite()).sum())
        if count:
            raise FileError(
                f"adapter {directory} is broken: {count} of {tensor.numel()} numbers of {name} are NaN or infinite; "
                "give a version of it from before that happened"
            )
    return tensors


def require_floats(directory: Path) -> None:
    """Raises FileError for a tensor of an adapter that is stored as anything but plain floating-point numbers.

    Only the header is read. An adapter whose weights are not there yet is not looked at.
    """
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"adapter file {path} can't be read: {error}") from None
    for name, kind in kinds.items():
        if kind not in FLOATS:
            raise FileError(
                f"adapter {directory} can't be read: {name} is stored as {kind}, and nothing says how that is "
                "unpacked; save the adapter in float32, float16 or bfloat16"
            )


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
    content = save(
        {f"{_PREFIX}{name}": t.detach().cpu().contiguous() for name, t in tensors.items()},
        metadata={"format": "pt", BASE_PRINT: base_print(model)},
    )
    (directory / ADAPTER_WEIGHTS).write_bytes(_with_sorted_header(content))


def _with_sorted_header(content: bytes) -> bytes:
    """A safetensors file whose metadata stands in one order; safetensors writes several entries in a random one."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@contextmanager
def dropping(model: CausalLM) -> Iterator[None]:
    """A context in which the adapter's dropout is on. Nothing else of the model is in training mode."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    parts = [d for layer in layers for d in getattr(layer, "lora_dropout", {}).values() if isinstance(d, nn.Dropout)]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part in parts:
            part.training = False


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

    Raises InputError where the plain model gives other logits than the adapted one, or holds what can't be folded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    rows = model.get_input_embeddings().weight.shape[0]
    probe_1T = torch.arange(1, 17, device=model.device).remainder(rows).unsqueeze(0)
    wanted = model(input_ids=probe_1T, use_cache=False).logits
    kept = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if kept:
        raise InputError(f"an adapter that replaces {kept[0]} can't be folded into its base; leave merge out")
    widen(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for module in layers.values():
        module.merge(safe_merge=True)  # into a weight of its own: others may read the base's
    for name, module in layers.items():
        if name.rpartition(".base_layer")[0] not in layers:  # one around two parameters of a module is inside another
            model.set_submodule(name, module.get_base_layer())
    delattr(model, "peft_config")
    got = model(input_ids=probe_1T, use_cache=False).logits
    if not torch.allclose(got, wanted, atol=1e-2 * float(wanted.abs().max()), rtol=0, equal_nan=True):
        raise InputError(
            f"folded into its base the adapter gives other logits (by {float((got - wanted).abs().max()):.3g}); leave "
            "merge out, and it is saved apart"
        )
