"""Load and save models, tokenizers and configurations.

Weights are read from safetensors or GGUF only: nothing is unpickled.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open

from remend.console import warn
from remend.errors import FileError, InputError, RemendError
from remend.files.atomic import write_text
from remend.models import adapters
from remend.models.accounting import LEFT_OUT, Account, account_of_gguf, accounted, patterns, said_of, unfit
from remend.models.blocks import named_weights
from remend.models.depth_check import require_plausible_depth
from remend.models.find import CARD, ModelSource, complete, fetch_model, require_readable, weight_files
from remend.models.frozen_base import narrow
from remend.models.gguf_header import forget, parsed_once
from remend.models.gguf_numbers import apply_numbers
from remend.models.gguf_rope import FACTORS, apply_rope
from remend.models.gguf_tokenizer import build_tokenizer, more_ends
from remend.models.packed_weights import (
    exact_products,
    packing,
    require_compressed_tensors,
    require_fitting,
    require_openable,
    unpacked,
)
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.written import require_as_written

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CARD_OF_PARTS = (
    "The files that this model was read from held parts that transformers' model has no place for. "
    "They are not in this one:"
)


def _location(source: ModelSource) -> tuple[str, dict[str, object]]:
    assert source.path is not None, "fetch_model() comes first"
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no advice from transformers inside: our own output says what happens.

    Where the user asked for what libraries log (--verbose), it is left as it is.
    """
    if os.environ.get("TRANSFORMERS_VERBOSITY"):
        yield
        return
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
    except RemendError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for unreadable models
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not source.trust_remote_code:
            raise FileError(
                f"the {what} of {source.spec} can't be read: it brings Python of its own. Look at it, and if you trust "
                "it, say --trust-remote-code with the command (Python: trust_remote_code=True); a recipe can't"
            ) from error
        unknown = re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)Config'>", reason)
        if unknown:
            raise InputError(
                f"{source.spec} is a {unknown[1]} model, of which transformers has no causal language model "
                "(AutoModelForCausalLM), and remend works with those. Give a model of text, or one of several "
                "modalities that AutoModelForCausalLM opens, such as Gemma 3"
            ) from error
        raise FileError(f"the {what} of {source.spec} can't be read: {type(error).__name__}: {reason[:300]}") from error


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's transformers configuration. Raises InputError for a GGUF file whose numbers can't be applied."""
    source = fetch_model(source, weights=False)
    return _config(source.base or source)[0]


def _config(source: ModelSource) -> tuple[PreTrainedConfig, bool]:
    """The configuration, and whether numbers of a GGUF file's header had to be put into it.

    That of a GGUF file is read once a process: transformers goes through the vocabulary for it, which takes seconds.
    """
    if source.kind != "gguf" or source.path is None:
        return _read_config(source)
    status = source.path.stat()
    kept = (status.st_mtime_ns, status.st_size, source)
    if kept not in _CONFIGS:
        _CONFIGS[kept] = _read_config(source)
    config, changed = _CONFIGS[kept]
    return copy.deepcopy(config), changed


_CONFIGS: dict[tuple[int, int, ModelSource], tuple[PreTrainedConfig, bool]] = {}


def _read_config(source: ModelSource) -> tuple[PreTrainedConfig, bool]:
    import gguf
    from transformers import AutoConfig

    where, extra = _location(source)
    with quietly(), parsed_once(), _explained(source, "configuration"):
        require_plausible_depth(source)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            where, trust_remote_code=source.trust_remote_code, **extra
        )
        changed = False
        if source.kind == "gguf":
            reader = gguf.GGUFReader(source.path)
            changed = apply_numbers(config, reader, source.spec)
            changed = apply_rope(config, reader, source.spec) or changed
    _require_experts(config, source.spec)
    return config, changed


def _require_experts(config: PreTrainedConfig, spec: str) -> None:
    """Raise InputError where a token is to be routed to more experts than there are: such a model can't run."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    try:
        text = config.get_text_config()
        counts = {name: count for name in names if isinstance(count := getattr(text, name, None), int) and count > 1}
        chosen = getattr(text, "num_experts_per_tok", None)
    except (AttributeError, ValueError, RuntimeError):  # of several texts, or of layers that differ
        return
    for name, count in counts.items():
        if isinstance(chosen, int) and chosen > count:
            raise InputError(
                f"{spec}: config.json routes each token to {chosen} experts (num_experts_per_tok), and there are "
                f"{count} ({name}); correct the configuration"
            )


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer. Raises InputError for a GGUF file whose rules are not known here."""
    import gguf
    from transformers import AutoTokenizer

    source = fetch_model(source, weights=False)
    own = source.base is None or bool(source.path and (source.path / "tokenizer_config.json").is_file())
    source = source if own or source.base is None else source.base
    with quietly(), parsed_once(), _explained(source, "tokenizer"):
        if source.kind == "gguf":
            return build_tokenizer(gguf.GGUFReader(source.path), source.spec)
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
        tokenizer.encode("a")  # settings of another type are found out by use alone
    return tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    frozen: bool = False,
    base: CausalLM | None = None,
) -> CausalLM:
    """The model, in evaluation mode.

    Packed tensors (GGUF, compressed-tensors, bitsandbytes) are dequantized, so that the model can be trained and
    saved; their products scale x value are float32 before they become `dtype`. What the files hold and the model does
    without (heads for multi-token prediction, say) is told once, and noted in the configuration.

    An adapter is put into its base; then its parameters alone are trainable.

    Args:
        source: what is loaded.
        dtype: of the weights.
        device: where they go.
        attention: transformers' attn_implementation; None leaves it to transformers.
        frozen: no weight will be trained: linear layers keep the dtype of their files (`frozen_base`), while `dtype`
            is float32.
        base: the model under an adapter, where it is in memory already. The adapter is put into it.

    Raises:
        FileError: the files lack a tensor, hold one that the model has no place for, or a number that is none.
        InputError: weights that are packed in a way that can't be opened.
    """
    source = fetch_model(source, weights=True)
    _require_as_written(source)
    if source.base and source.path:
        model = base or load_model(source.base, dtype=dtype, device=device, attention=attention, frozen=frozen)
        adapters.load_adapter(model, source.path)
        return model
    account, opened = _open(source, dtype, attention=attention)
    assert opened is not None
    if source.kind == "gguf":
        _name_ends(opened, source)
    forget()  # weights come last
    account.require_whole(source.spec, _told_by(source))
    _require_numbers(opened, source)
    if account.left_out:
        _tell(source, account)
        setattr(opened.config, LEFT_OUT, patterns(account.left_out))
    if frozen and dtype == torch.float32:
        narrow(opened, stored_dtype(source))
    ready: CausalLM = opened.to(device).eval()
    return ready


def _name_ends(model: PreTrainedModel, source: ModelSource) -> None:
    """Let answers end at every token that the header of a GGUF file names, of which transformers reads one."""
    import gguf

    with parsed_once(), _explained(source, "tokenizer"):
        more = more_ends(gguf.GGUFReader(source.path))
    own = model.generation_config.eos_token_id
    if more and own is not None:
        ids = list(dict.fromkeys([*([own] if isinstance(own, int) else own), *more]))
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def check_weights(source: ModelSource) -> list[str]:
    """Compare the headers of a model's files with what its configuration needs; no weight is read.

    Returns sentences on what is left out. Files of the hub that were not fetched yet are not looked at.

    Raises what `load_model` raises for names, shapes, types and packings.
    """
    if source.base and source.path:
        adapters.require_floats(source.path)
    source = source.base or source
    if source.path is None or (source.repo and not complete(source.path)):
        return []
    account = account_of_files(source)
    return [_tell(source, account, aloud=False)] if account.left_out else []


def account_of_files(source: ModelSource) -> Account:
    """The account of a local model's files by their headers alone; no weight is read.

    Raises what `load_model` raises for names, shapes, types and packings.
    """
    _require_as_written(source)
    account, _ = _open(source, torch.float32, names_only=True)
    account.require_whole(source.spec, _told_by(source))
    return account


def _require_as_written(source: ModelSource) -> None:
    if source.path and not source.repo:
        require_as_written(source.path if source.path.is_dir() else source.path.parent)


def _require_one_of_each(directory: Path, what: str) -> None:
    """Raises FileError for a tensor that lies in several files with unlike numbers: the last would win, unsaid."""
    files = weight_files(directory)
    first: dict[str, Path] = {}
    for path in files if len(files) > 1 else []:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                other = first.setdefault(name, path)
                if other == path:
                    continue
                with safe_open(other, framework="pt") as file:
                    one, two = file.get_tensor(name), shard.get_tensor(name)
                if (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(_bytes(one), _bytes(two)):
                    continue
                raise FileError(
                    f"the files of {what} hold {name} twice, in {other.name} and {path.name}, with unlike numbers; "
                    "remove the one that is not meant"
                )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _told_by(source: ModelSource) -> str:
    return "the header of the GGUF file" if source.kind == "gguf" else "config.json"


_told: set[str] = set()


def _tell(source: ModelSource, account: Account, *, aloud: bool = True) -> str:
    text = f"{source.spec}: {said_of(patterns(account.left_out))}"
    if aloud and text not in _told:
        warn(text)
    _told.add(text)  # a command opens a model several times
    return text


def _open(
    source: ModelSource, dtype: torch.dtype, *, names_only: bool = False, attention: str | None = None
) -> tuple[Account, PreTrainedModel | None]:
    """The account of a local model's files, and the model as transformers reads them, without `names_only`."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GgufConfig

    where, extra = _location(source)
    extra |= {"attn_implementation": attention} if attention else {}
    by_name: Account | None = None
    method = packing(source.path).get("quant_method") if source.kind == "directory" else None
    if source.kind == "directory" and source.path:
        require_readable(source.path, source.spec)
        _require_one_of_each(source.path, source.spec)
    if source.kind == "gguf":
        extra["quantization_config"] = GgufConfig(dequantize=True)
        config, changed = _config(source)
        by_name = _account_of_gguf(source, config)
        # for names alone the configuration need not be read once more, which takes a second
        extra |= {"config": config} if changed or names_only else {}
    elif method == "compressed-tensors":
        require_compressed_tensors(source.spec)
        assert source.path is not None
        kind = load_config(source).get_text_config().model_type
        with quietly(), _explained(source, "model"):
            require_fitting(packing(source.path), weight_files(source.path), kind, source.spec)
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif method and source.path:
        with quietly():
            require_openable(source.path)
    if by_name and (names_only or by_name.missing or by_name.unread):
        by_name.require_whole(source.spec, _told_by(source))
        return by_name, None
    exactly = exact_products() if method == "compressed-tensors" else nullcontext()
    model: PreTrainedModel | None = None
    with quietly(), parsed_once(), _explained(source, "model"), exactly, accounted(names_only=names_only) as account:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                **extra,
            )
        except RuntimeError:
            account.require_whole(source.spec, _told_by(source))  # says what transformers' message only hints at
            raise
        account.missing = sorted(info["missing_keys"])
        account.shapes = account.shapes or unfit(model)
        if method:
            model = unpacked(model)
    if by_name:
        account.left_out = by_name.left_out
    return account, model


def _account_of_gguf(source: ModelSource, config: PreTrainedConfig) -> Account | None:
    """What the names of a GGUF file's tensors tell; None where transformers itself tells as much."""
    import gguf
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    with quietly(), parsed_once(), _explained(source, "model"):
        reader = gguf.GGUFReader(source.path)
        architecture = str(reader.fields["general.architecture"].contents())
        if is_gguf_arch_supported(architecture):
            return None
        names = [t.name for t in reader.tensors if t.name != FACTORS]  # which is in the configuration
        return account_of_gguf(architecture, names, skeleton(source, config))


def _require_numbers(model: PreTrainedModel, source: ModelSource) -> None:
    """Raises FileError for a weight that is NaN or infinite, or still packed."""
    for name, weight in model.named_parameters():
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise FileError(
                f"the model of {source.spec} can't be unpacked: {name} is still {str(weight.dtype)[6:]}; give the "
                "model before packing, or a GGUF or compressed-tensors version"
            )
        if weight.numel() and not all(edge.isfinite() for edge in weight.detach().aminmax()):
            count = int((~weight.detach().isfinite()).sum())
            raise FileError(
                f"the model of {source.spec} is broken: {count} of {weight.numel()} numbers of {name} are NaN or "
                "infinite; give a version of it from before that happened"
            )


def stored_dtype(source: ModelSource) -> torch.dtype:
    """In what a local model's files hold most of its numbers: float32, bfloat16 or float16.

    It is float32 for files that hold anything else too (packed weights, GGUF), and for an adapter.
    """
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    numbers: dict[str, int] = {}
    for path in weight_files(source.path) if source.kind == "directory" and source.path else []:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                kind = str(part.get_dtype())
                numbers[kind] = numbers.get(kind, 0) + math.prod(part.get_shape())
    if not numbers or any(kind not in known for kind in numbers):
        return torch.float32
    return known[max(numbers, key=lambda kind: numbers[kind])]


def maps_float32(source: ModelSource) -> bool:
    """Whether a CPU maps a local model's weights from its files, which hold float32 and nothing else.

    Such weights take no memory of the process's own before they are written.
    """
    source = source.base or source
    files = weight_files(source.path) if source.kind == "directory" and source.path else []
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            if any(str(tensors.get_slice(name).get_dtype()) != "F32" for name in tensors.keys()):  # noqa: SIM118
                return False
    return bool(files)


def inexact_in(model: CausalLM, dtype: torch.dtype) -> list[str]:
    """Names of the float32 parameters that a dtype rounds."""
    return [name for name, weight in named_weights(model) if not weight.equal(weight.to(dtype).to(weight.dtype))]


def save_model(model: CausalLM, tokenizer: Tokenizer, directory: Path, *, max_shard_size: str | None = None) -> None:
    """Write a plain transformers directory (safetensors, tokenizer, chat template, generation config).

    Of a model with an adapter only the adapter is written, as peft does: it stays apart from its base.

    Args:
        model, tokenizer: what is saved; weights in the dtype that they have.
        directory: an empty one.
        max_shard_size: of one file of weights, such as 5GB; by default transformers' own limit.
    """
    with quietly():
        if adapters.is_adapted(model):
            adapters.save_adapter(model, directory)
        else:
            model.save_pretrained(directory, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
            lacks = getattr(model.config, LEFT_OUT, None)
            if lacks:
                write_text(directory / CARD, f"{CARD_OF_PARTS}\n\n" + "".join(f"- `{name}`\n" for name in lacks))
        tokenizer.save_pretrained(directory)


def skeleton(source: ModelSource, config: PreTrainedConfig) -> CausalLM:
    """The model of `config`, which is the source's, without weights: names and shapes, nothing allocated."""
    from transformers import AutoModelForCausalLM

    with quietly(), _explained(source, "model"), torch.device("meta"):
        model: CausalLM = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    return model


def empty_model(source: ModelSource, config: PreTrainedConfig, attention: str | None = None) -> CausalLM:
    """The model as `load_model` gives it in float32, but without its parameters: these have shapes and no numbers.

    Buffers, which are computed from the configuration, are there; weights are tied as the configuration says.

    Args:
        source: a local directory.
        config: its configuration; it becomes the model's.
        attention: transformers' attn_implementation.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    assert source.path is not None
    extra = {"attn_implementation": attention} if attention else {}
    config._name_or_path = str(source.path)
    with quietly(), _explained(source, "model"), init_empty_weights(include_buffers=False):
        model: CausalLM = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=source.trust_remote_code, **extra
        )
    model.tie_weights()  # inside, each name would get an empty parameter of its own
    if (source.path / "generation_config.json").is_file():
        with quietly(), _explained(source, "configuration"):
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def empty_of(model: CausalLM) -> CausalLM:
    """A model of the same class and configuration, without its parameters; its buffers are on the same device."""
    from accelerate import init_empty_weights

    made = cast("Callable[[PreTrainedConfig], CausalLM]", type(model))
    with quietly(), init_empty_weights(include_buffers=False):
        empty = made(copy.deepcopy(model.config))
    empty.tie_weights()
    for module in empty.modules():
        module._buffers = {n: None if b is None else b.to(model.device) for n, b in module._buffers.items()}
    return empty


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
