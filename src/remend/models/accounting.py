"""Every tensor of a model's files against every tensor of the model: none is invented, and none is lost unsaid.

transformers fills what the files lack with random numbers, and drops what it has no place for. Here its own loading is
watched, and what it renames is counted once more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from remend.errors import FileError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEFT_OUT = "remend_left_out"
"""In config.json: names of tensors that a model's files once had and transformers' model has no place for."""

_HARMLESS = re.compile(r"inv_freq$|\.attn_rot_embd\.weight$|rotary_emb\.(cos|sin)_cached$|(^|\.)position_ids$")
"""What a model computes from its configuration."""
_CAUSAL_MASK = re.compile(r"(attn|attention)\.(bias|masked_bias)$")
"""So too, where it has the shape of a mask: [1, 1, T, T], or a single number. Else it is a bias that is learned."""

_NO_DECODER = re.compile(
    r"(^|\.)(mtp\w*|nextn)\."
    r"|^(model\.)?(vision_tower|vision_model|visual|audio_tower|audio_model|multi_modal_projector|embed_vision"
    r"|embed_audio)\."
)
"""Heads for multi-token prediction, and towers for images and sound: the decoder computes the same without them."""
_ACTIVATIONS = re.compile(r"\.((input|output)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point))$")
"""How an engine rounds activations and the key-value cache, in the files of compressed-tensors."""

_SCALE = re.compile(r"(_scale\w*|\.scales|zero_points?|qzeros|absmax)$")
"""Without it packed weights are other weights, whatever transformers' broad patterns let go."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Types that need no unpacking, as the header of a safetensors file names them."""


@dataclass
class Account:
    """What does not fit between the tensors of the files and those of the model, by name.

    Attributes:
        missing: the model needs it, and no file has it.
        unread: a file has it, and the model has no place for it.
        left_out: so too, but known as a part that the decoder does without.
        clashes: files that hold several tensors for one place, or gaps in a run of experts.
        shapes: name, the file's shape, the model's shape.
        types: name and type of weights that are no floating-point numbers, and that nothing unpacks.
        packed: config.json says how weights are unpacked, so that `types` are those whose scales no file has.
        failed: what transformers could not put together, with its reason.
        sources: the files' tensors of which each tensor of the model is made.
    """

    missing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    shapes: list[tuple[str, Sequence[int], Sequence[int]]] = field(default_factory=list)
    types: list[tuple[str, str]] = field(default_factory=list)
    packed: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def sort_out(self, names: Mapping[str, str], shapes: Mapping[str, Sequence[int]], model: PreTrainedModel) -> None:
        """Put file names without a place (each with the model's name for it) where they belong."""
        table = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        expected = [re.compile(pattern) for pattern in table]
        config = model.config.get_text_config()
        layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        more = range(layers, layers + int(getattr(config, "num_nextn_predict_layers", 0) or 0))
        packed = getattr(model, "is_quantized", False) or hasattr(model.config, "quantization_config")
        for name, target in names.items():
            mask = len(shapes.get(name, (0,))) in (0, 4) and _CAUSAL_MASK.search(name)
            layer = re.search(r"(?:layers|blk)\.(\d+)\.", name)
            if mask or _HARMLESS.search(name):
                continue
            known = any(pattern.search(either) for pattern in expected for either in (name, target))
            known = known and not _SCALE.search(name) and not _CAUSAL_MASK.search(name)
            known = known or bool(_NO_DECODER.search(name)) or bool(layer and int(layer[1]) in more)
            known = known or bool(packed and _ACTIVATIONS.search(name))
            (self.left_out if known else self.unread).append(name)

    def require_whole(self, what: str, told_by: str) -> None:
        """Raises FileError with the names when a tensor is missing, of another shape or type, or has no place.

        `told_by` is the file that says which tensors there should be.
        """
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            parts = Counter(pattern for source in self.sources.get(name, []) for pattern in patterns([source]))
            made = " and ".join(f"{count} x {pattern}" for pattern, count in parts.items())
            why = f"is made of {made}, which don't fit each other" if parts else _last(reason)
            raise FileError(f"the model of {what} can't be put together: {name} {why}")
        if self.missing:
            raise FileError(
                f"the model of {what} is incomplete: {len(self.missing)} tensors are missing ({_some(self.missing)})"
            )
        if self.shapes:
            name, got, needed = self.shapes[0]
            more = f" (and {len(self.shapes) - 1} more)" if len(self.shapes) > 1 else ""
            raise FileError(
                f"the model of {what} does not fit its configuration: {name} is {list(got)} in the files, and "
                f"{list(needed)} by {told_by}{more}; give the configuration that belongs to these weights"
            )
        if self.types:
            name, kind = self.types[0]
            why = f"{told_by} does not say how they are unpacked"
            if self.packed:
                why = f"the files hold no scales for them, by which {told_by} says that they are unpacked"
            raise FileError(
                f"the model of {what} has {len(self.types)} weights that are no floating-point numbers ({name} is "
                f"{kind}), and {why}; give the model before packing, or a "
                "GGUF or compressed-tensors version"
            )
        if self.clashes:
            raise FileError(f"the model of {what} can't be put together: {'; '.join(self.clashes[:3])}")
        if self.unread:
            raise FileError(
                f"the files of {what} hold {len(self.unread)} tensors that its model has no place for "
                f"({_some(self.unread)}): without them it would be another model. Correct {told_by} where it does not "
                "describe these weights, or remove the tensors from the files if the model does not need them"
            )


def said_of(names: Sequence[str]) -> str:
    """A sentence on what a model lacks; `names` as `patterns` gives them."""
    scales = [name for name in names if _CACHE_SCALE.search(name)]
    rest = [name for name in names if name not in scales]
    said = []
    if rest:
        said = [
            f"parts of its files have no place in transformers' model, which does without them, and are left out: "
            f"{_some(rest)}"
        ]
    if scales:
        said += [
            "scales of its key/value cache are neither trained nor measured; of a model that is held on its grid an "
            f"export to compressed-tensors keeps them, and nothing else does: {_some(scales)}"
        ]
    return "; ".join(said)


_CACHE_SCALE = re.compile(r"[.][qkv]_(scale|global_scale|zero_point)$")


def patterns(names: Iterable[str]) -> list[str]:
    """Names with every number after the first as a star: one for all experts of a layer."""
    cut = [re.match(r"(\D*\d*)(.*)", name) for name in names]
    return sorted({m[1] + re.sub(r"\.\d+\.", ".*.", m[2]) for m in cut if m})


def _some(names: Iterable[str]) -> str:
    """The first three names, sorted."""
    first = sorted(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")


def _last(reason: str) -> str:
    """What went wrong, of a traceback and what transformers adds."""
    said = [line for line in reason.splitlines() if re.match(r"\w+(Error|Exception): ", line)]
    return " ".join((said or reason.splitlines() or [""])[-1].split())[:200]


class _SeenEnough(Exception):
    """Ends a loading that was begun for its names alone."""


@contextmanager
def accounted(*, names_only: bool = False) -> Iterator[Account]:
    """The account of the model that transformers loads inside.

    With `names_only` its loading ends, without an error, before weights are read: headers tell names and shapes.
    """
    from transformers import modeling_utils

    account, convert = Account(), modeling_utils.convert_and_load_state_dict_in_model

    def watched(*, model: PreTrainedModel, state_dict: dict[str, Any], load_config: Any, **more: Any) -> Any:
        _count(account, model, state_dict, load_config)
        if not names_only:
            loaded = convert(model=model, state_dict=state_dict, load_config=load_config, **more)
            _add(account, loaded[0])
            return loaded
        if load_config.hf_quantizer is None:
            empty = {name: torch.empty(_shape(t), device="meta") for name, t in state_dict.items()}
            nowhere = replace(load_config, device_map={"": torch.device("meta")})
            info = convert(model=model, state_dict=empty, load_config=nowhere, **more)[0]
            account.missing = _needed(model, info.missing_keys)
            _add(account, info)
        raise _SeenEnough

    modeling_utils.convert_and_load_state_dict_in_model = watched
    try:
        yield account
    except _SeenEnough:
        pass
    finally:
        modeling_utils.convert_and_load_state_dict_in_model = convert


def unfit(model: PreTrainedModel) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """Weights of linear layers whose shape is not their layer's, as Account.shapes has them.

    Some releases of transformers put a GGUF file's tensor in the place of one of another shape, and don't say it.
    """
    return [
        (f"{name}.weight", list(layer.weight.shape), [layer.out_features, layer.in_features])
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and tuple(layer.weight.shape) != (layer.out_features, layer.in_features)
    ]


def _add(account: Account, info: Any) -> None:
    """What transformers itself noticed."""
    account.failed = dict(info.conversion_errors)
    account.shapes = sorted((name, list(got), list(needed)) for name, got, needed in info.mismatched_keys)


def _needed(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Of the names that no file has those that can't be had from a tied one, nor are computed."""
    missing = set(missing)
    tied = {t for pair in getattr(model, "all_tied_weights_keys", {}).items() if set(pair) - missing for t in pair}
    table = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return sorted(name for name in missing - tied if not any(pattern.search(name) for pattern in table))


def _shape(tensor: Any) -> Sequence[int]:
    return cast(Sequence[int], tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def _count(account: Account, model: PreTrainedModel, tensors: Mapping[str, Any], load_config: Any) -> None:
    """Name every tensor of the files as transformers will, and see where it goes."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    account.packed = load_config.hf_quantizer is not None
    mapping = deepcopy(load_config.weight_mapping or [])  # a transform that is asked changes
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    needed = model.state_dict()
    places: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    unread: dict[str, str] = {}
    # tensors of a layer but its bias: a scale may be named beside the weight, or below it
    parents = [name.rpartition(".")[0] for name in tensors if not name.endswith(".bias")]
    members = Counter(above for parent in parents for above in (parent, parent.rpartition(".")[0]))
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, needed)
        if target not in needed and name in needed:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, needed)
        if target not in needed:
            unread[name] = target
            continue
        places[target, pattern].append(name)
        kind = tensors[name].get_dtype() if hasattr(tensors[name], "get_dtype") else "F32"
        alone = load_config.hf_quantizer is None or members[name.rpartition(".")[0]] == 1
        if alone and kind not in FLOATS and needed[target].is_floating_point():
            account.types.append((name, kind))
    for (target, _), names in places.items():
        account.sources[target] += names
        if len(names) > 1 and not _in_a_row(names):
            account.clashes.append(f"{target} is to be made of {_some(names)}, which are no run of numbers from 0")
    account.sort_out(unread, {name: _shape(tensors[name]) for name in unread}, model)
    if load_config.hf_quantizer is not None:  # else transformers is asked
        made = {key: entry.target_patterns for entry in converters for key in entry.source_patterns}
        taken = {
            target.replace(made[pattern][0], other) if pattern else target
            for target, pattern in places
            for other in (made[pattern] if pattern else [target])
        }
        account.missing = _needed(model, set(needed) - taken)


def _in_a_row(names: Sequence[str]) -> bool:
    """Whether names differ in one number alone, which counts from 0, as those of experts do."""
    if len({re.sub(r"\d+", "#", name) for name in names}) > 1:
        return False
    columns = [sorted(map(int, column)) for column in zip(*(re.findall(r"\d+", n) for n in names), strict=True)]
    moving = [column for column in columns if column[0] != column[-1]]
    return len(moving) == 1 and moving[0] == list(range(len(names)))


def account_of_gguf(architecture: str, tensors: Iterable[str], model: PreTrainedModel) -> Account:
    """The account of a GGUF file by its tensors' names, for `model`, whose weights are not looked at.

    For the architectures that transformers reads by names of its own list: what it can't name it drops, and where one
    half of fused experts is missing it puts zeros, and it says neither.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    places = {name.removesuffix(".weight"): to for name, to in get_gguf_hf_weights_map(model, processor).items()}
    if architecture == "gpt2":
        places["output"] = "lm_head.weight"  # which its processor names itself
    there = {name.removesuffix(".weight"): name for name in tensors}
    sources: dict[str, list[str]] = defaultdict(list)
    for name, target in places.items():
        sources[target].append(name)
    account = Account()
    lacking = {
        target
        for target in model.state_dict()
        # gate and up projections of experts are one parameter, made of both
        if not (all if "_exps" in "".join(sources[target]) else any)(name in there for name in sources[target])
        or not sources[target]
    }
    account.missing = _needed(model, lacking)
    account.sort_out({there[name]: there[name] for name in there if name not in places}, {}, model)
    return account
