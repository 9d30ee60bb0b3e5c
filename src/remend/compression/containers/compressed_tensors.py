"""compressed-tensors, the directory of vLLM and llm-compressor: packed weights beside plain ones.

Codes, scales and zeros are read as they lie in its files. The library that reads them writes them: its own compressor
packs the codes and describes them in config.json.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from remend.compression.containers import CONTAINERS, Container, Measured, Recognised, held_as_dense, packed_by
from remend.compression.grids import Grid, GridFormat, decode, fit, restore
from remend.compression.stored_grid import Carried, StoredGrid
from remend.errors import InputError
from remend.files.atomic import JsonObject, write_json
from remend.files.reading import read_object
from remend.models.blocks.files import TensorFiles
from remend.models.blocks.opening import from_disk
from remend.models.blocks.saving import planned_shell
from remend.models.blocks.writing import PlannedFiles, write_parts
from remend.models.find import ModelSource, weight_files
from remend.models.load import empty_of, save_model
from remend.models.matrices import by_key
from remend.models.packed_weights import merges_experts, packing, require_compressed_tensors
from remend.models.protocols import CausalLM

_AN_EXPERT = re.compile(r"[.]experts[.]\d+[.]")
_OF_THE_GROUP = ("input_activations", "output_activations")
_NO_WEIGHTS_SCALE = re.compile(r"[.](input|output|q|k|v)_(scale|global_scale|zero_point)$")
_INT = re.compile(r"int(\d)-g(\d+)-(sym|zp)")


def _reads(source: ModelSource) -> bool:
    return packed_by(source) == "compressed-tensors"


def _recognise(source: ModelSource, as_dense: bool) -> Recognised:
    assert source.path is not None
    config = packing(source.path)
    _refuse_sparse(config, source.spec)
    _refuse_plain_experts(source.path)
    try:
        stored, why = _grid_of(source.path, config)
    except InputError as reason:
        return held_as_dense("compressed-tensors", source, reason, as_dense)
    return Recognised("compressed-tensors", stored, False, why)


def _grid_of(directory: Path, config: JsonObject) -> tuple[StoredGrid, str]:
    """The grid, and in one sentence what it is. Raises InputError for a scheme that no grid here describes."""
    require_compressed_tensors(str(directory))
    groups = list(config.get("config_groups", {}).values())
    if not groups and config.get("kv_cache_scheme"):
        raise InputError("its weights are not quantized, only its key/value cache, which is no grid to hold")
    if len(groups) != 1:
        raise InputError(f"it mixes {len(groups)} quantization schemes, and one grid a model is held")
    args, form = groups[0].get("weights"), groups[0].get("format") or config.get("format")
    if not args:
        raise InputError("its weights are not quantized, only its activations")
    modules = _modules(directory)
    if not modules:
        raise InputError("its config.json tells of packed weights, but its files hold none")
    if merges_experts(_model_type(directory)) and (one := next(filter(_AN_EXPERT.search, modules), None)):
        raise InputError(
            f"its experts are packed one by one ({one}), and a model in transformers has one tensor for all of a layer"
        )
    if args["type"] == "int":
        fmt, repeats = _integer_format(args, modules)
        matrices = {f"{n}.weight": _integer(m, fmt, args, repeats[n]) for n, m in modules.items()}
    else:
        fmt = _float_format(args)
        matrices = {f"{n}.weight": _float(m, fmt) for n, m in modules.items()}
    carried = _carried(directory, config, groups[0])
    also = (
        f"; its {' and '.join(carried.settings)} are not trained or measured, and go into an export to "
        "compressed-tensors as they are"
    )
    why = f"compressed-tensors ({form}): the grid {fmt.name}"
    return StoredGrid(fmt, matrices, carried), why + (also if carried.settings else "")


def _carried(directory: Path, config: JsonObject, group: JsonObject) -> Carried:
    """How activations and the KV cache are to be quantized, with the scales of those that have some."""
    asked = {"kv_cache_scheme": config.get("kv_cache_scheme"), **{key: group.get(key) for key in _OF_THE_GROUP}}
    settings = {key: value for key, value in asked.items() if value}
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")) if settings else []:
        with safe_open(file, framework="pt") as stored:
            names = [name for name in stored.keys() if _NO_WEIGHTS_SCALE.search(name)]  # noqa: SIM118
            tensors |= {name: stored.get_tensor(name) for name in names}
    return Carried(settings, tensors)


def _refuse_plain_experts(directory: Path) -> None:
    """Raise InputError for experts that were left plain where others of the model's layers are packed.

    transformers looks for packed experts alone where it makes one tensor of them, and fails.
    """
    if not merges_experts(_model_type(directory)):
        return
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            plain = [n for n in tensors.keys() if _AN_EXPERT.search(n) and n.endswith(".weight")]  # noqa: SIM118
        if plain:
            raise InputError(
                f"{directory} has plain experts ({plain[0]}) beside packed layers, which transformers can't read; give "
                "the model before packing"
            )


def _model_type(directory: Path) -> str:
    config = read_object(directory / "config.json")
    text: JsonObject = config.get("text_config") or config
    return str(text.get("model_type"))


def _refuse_sparse(config: JsonObject, what: str) -> None:
    """Raise InputError for weights whose zeros compressed-tensors left out: what is installed can't put them back.

    Zeros of plain weights that a config only tells of (format dense) are found once it is quiet about them.
    """
    form = (config.get("sparsity_config") or {}).get("format", "dense")
    if form != "dense":
        raise InputError(
            f"{what} is stored sparse ({form}), a legacy format for which compressed-tensors has no compressor "
            "left; save it as plain weights with the release that wrote it: its zeros are then found and held"
        )
    if "sparsity_config" in config and not config.get("config_groups"):
        raise InputError(
            f"{what} has plain weights with zeros, and its config.json calls them compressed; take quantization_config "
            "out of that file: its zeros are then found and held"
        )


def _modules(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every packed module by their local name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                module, _, local = name.rpartition(".")
                if local.startswith("weight"):
                    modules.setdefault(module, {})[local] = tensors.get_tensor(name)
    return {n: m for n, m in modules.items() if "weight_scale" in m}


def _integer_format(args: JsonObject, modules: dict[str, dict[str, Tensor]]) -> tuple[GridFormat, dict[str, int]]:
    """The grid, and how often each module's scale is repeated to fill it: a whole row's scale serves its groups."""
    bits, strategy = args["num_bits"], args["strategy"]
    if bits not in (4, 8):
        raise InputError(f"its integers have {bits} bits; held are 4 and 8")
    if strategy not in ("group", "channel"):
        raise InputError(f"its scales are shared by a {strategy}; held are those of groups of a row, and of whole rows")
    if any("weight_g_idx" in m for m in modules.values()):
        raise InputError("its columns are reordered (actorder=group), so a group is no run of neighbours")
    widths = {n: _shape(m)[1] for n, m in modules.items()}
    if strategy == "group":
        group = int(args["group_size"])
    else:
        group = next((g for g in (128, 64, 32) if not any(w % g for w in widths.values())), 0)
    if group not in (32, 64, 128):
        raise InputError(f"its groups are {group or 'whole rows that no group of 32 divides'}; held are 32, 64 and 128")
    fmt = GridFormat.parse(f"int{bits}-g{group}-{'sym' if args.get('symmetric', True) else 'zp'}")
    return fmt, {n: w // group // modules[n]["weight_scale"].shape[1] for n, w in widths.items()}


def _shape(module: dict[str, Tensor]) -> tuple[int, int]:
    rows, columns = module["weight_shape"].tolist() if "weight_shape" in module else module["weight"].shape
    return int(rows), int(columns)


def _integer(module: dict[str, Tensor], fmt: GridFormat, args: JsonObject, repeat: int) -> tuple[Tensor, Grid]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    half, scale = 2 ** (fmt.bits - 1), module["weight_scale"]
    rows, columns = _shape(module)
    if "weight_packed" in module:
        values = unpack_from_int32(module["weight_packed"], fmt.bits, torch.Size((rows, columns)))
    else:
        values = module["weight"]
    zeros = None
    if not args.get("symmetric", True):
        zeros = module["weight_zero_point"]
        if zeros.dtype == torch.int32:
            zeros = unpack_from_int32(zeros, fmt.bits, torch.Size((rows, scale.shape[1])), packed_dim=0)
        zeros = (zeros.float() + half).repeat_interleave(repeat, 1)
    stored = scale.to(fmt.scale)
    if not torch.equal(stored.float(), scale.float()):
        raise InputError(f"its scales ({str(scale.dtype).removeprefix('torch.')}) are not all exact in float16")
    codes = (values.to(torch.int16) + half).to(torch.uint8)
    return codes, Grid(stored.float().repeat_interleave(repeat, 1).contiguous(), zeros)


def _float_format(args: JsonObject) -> GridFormat:
    kind = (args["num_bits"], args["strategy"], args.get("group_size"))
    if kind[:2] in ((8, "channel"), (8, "tensor")):
        return GridFormat.parse("fp8-e4m3")
    if kind == (4, "tensor_group", 16):
        return GridFormat.parse("nvfp4")
    if kind == (4, "group", 32):
        return GridFormat.parse("mxfp4")
    raise InputError(
        f"its {kind[0]}-bit floats share scales by {kind[1]}; held are fp8 by row or matrix, nvfp4 and mxfp4"
    )


def _float(module: dict[str, Tensor], fmt: GridFormat) -> tuple[Tensor, Grid]:
    scale = module["weight_scale"]
    if fmt.bits == 8:
        codes = module["weight"].view(torch.uint8)
        return codes, Grid(scale.float().reshape(-1, 1).expand(codes.shape[0], 1).contiguous())
    packed = module["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)
    stored = {"scales": scale}
    if "weight_global_scale" in module:
        stored["outer"] = module["weight_global_scale"].float().reshape(())
    return codes, restore(stored, fmt)


def _scheme_of(grid: str) -> JsonObject | None:
    """The library's QuantizationArgs for a grid, or None."""
    match = _INT.fullmatch(grid)
    if match and match[1] in "48":
        return {
            "num_bits": int(match[1]),
            "type": "int",
            "strategy": "group",
            "group_size": int(match[2]),
            "symmetric": match[3] == "sym",
        }
    if grid == "fp8-e4m3":
        return {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    if grid == "nvfp4":
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
                "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}  # fmt: skip
    if grid in ("mxfp4", "gguf:mxfp4"):
        return {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}  # fmt: skip
    return None


def _fits(grid: str, kind: str) -> str | None:
    if kind:
        return f'format "compressed-tensors:{kind}" is unknown; the grid decides, write compressed-tensors'
    if _scheme_of(grid):
        return None
    return f"{_why_not(grid)}; use --format dense"


def _why_not(grid: str) -> str:
    if grid == "none":
        return "the model lies on no grid, so there is nothing to pack"
    if grid.endswith("-asym"):
        return f"{grid} fits no compressed-tensors format: its zero is a real number, and theirs is an integer"
    if re.match("int[23]-", grid):
        return f"{grid} fits no compressed-tensors format that engines read: pack-quantized holds 4 or 8 bits there"
    return f"{grid} fits no compressed-tensors format: none has its values and groups"


def _write(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    """Packed safetensors, and `quantization_config` in config.json."""
    require_compressed_tensors("--format compressed-tensors")
    model, stored = measured.model, measured.stored
    assert stored is not None
    _require_writable(model, stored)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        compressor = _compress(model, {name: grid for name, (_, grid) in stored.matrices.items()}, stored.format)
        for name, tensor in stored.carried.tensors.items():
            owner, _, local = name.rpartition(".")
            setattr(model.get_submodule(owner), local, nn.Parameter(tensor, requires_grad=False))
        save_model(model, measured.tokenizer, target, max_shard_size=measured.max_shard_size)
        compressor.update_config(str(target))
    _complete_config(target, stored.carried.settings)
    return {"container": f"compressed-tensors ({compressor.quantization_config.format.value})"}


def _require_writable(model: CausalLM, stored: StoredGrid) -> None:
    """Raise InputError for a grid on matrices that a reader of this container would not find."""
    parts = by_key(model)
    if other := [name for name in stored.matrices if not isinstance(parts[name].module, nn.Linear)]:
        kinds = "experts, which a model in transformers keeps in one tensor for all of a layer"
        if parts[other[0]].expert is None:
            kinds = f"of the kind {type(parts[other[0]].module).__name__}, which holds inputs first"
        raise InputError(
            f"{len(other)} of the matrices on the grid are no linear layers of their own ({', '.join(other[:2])}, …) "
            f"but {kinds}: a reader of compressed-tensors would find nothing packed there; use --format dense, which "
            "keeps the grid beside the weights"
        )
    left = next((name for name, matrix in parts.items() if matrix.expert is not None), None)
    if left and merges_experts(model.config.get_text_config().model_type):
        raise InputError(
            f"the experts ({left}, …) are on no grid and the other layers are, which transformers can't read back from "
            "compressed-tensors; use --format dense, which keeps the grid beside the weights"
        )


def _compress(model: nn.Module | CausalLM, grids: Mapping[str, Grid], fmt: GridFormat) -> Any:
    """Let the library pack the linear layers whose weights lie on a grid, in place; it, for what config.json says.

    Without numbers (on the meta device) it gives the layers the shapes of what is packed.

    Args:
        model: the linear layers that are not named stay.
        grids: by the name of the weight.
        fmt: their format.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    packed = {name.removesuffix(".weight"): grid for name, grid in grids.items()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": _scheme_of(fmt.name)}},
        ignore=[n for n in linear if n not in packed],
        quantization_status="frozen",
    )
    bars = {"show_progress": False} if "show_progress" in signature(apply_quantization_config).parameters else {}
    apply_quantization_config(model, config, **bars)
    for name, grid in packed.items():
        _set_parameters(model.get_submodule(name), grid, fmt)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def _write_by_block(measured: Measured, target: Path, kind: str) -> dict[str, str]:
    """The same files, of which each block is packed by itself."""
    require_compressed_tensors("--format compressed-tensors")
    model, stored = measured.model, measured.stored
    assert stored is not None
    _require_writable(model, stored)
    shell, keys = empty_of(model), set(stored.matrices)
    with contextlib.redirect_stderr(io.StringIO()):
        empty = {name: grid.to("meta") for name, (_, grid) in stored.matrices.items()}
        compressor = _compress(shell, empty, stored.format)
        _correct_shapes(shell, stored)
        for name, tensor in stored.carried.tensors.items():
            owner, _, local = name.rpartition(".")
            setattr(shell.get_submodule(owner), local, nn.Parameter(tensor.to("meta"), requires_grad=False))
        weights = planned_shell(shell, model, measured.tokenizer, target, measured.max_shard_size)
        compressor.update_config(str(target))
    _complete_config(target, stored.carried.settings)
    files = PlannedFiles(weights)

    def packed(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        some = {key: module for name, module in modules.items() if (key := f"{name}.weight") in keys}
        return {name: t for key, module in some.items() for name, t in _packed(key, module, stored).items()}

    write_parts(model, files, packed)
    files.write(stored.carried.tensors)
    return {"container": f"compressed-tensors ({compressor.quantization_config.format.value})"}


def _correct_shapes(shell: CausalLM, stored: StoredGrid) -> None:
    """Give packed layers without numbers the types and shapes of packed ones: the library leaves out packed zeros."""
    known: dict[torch.Size, dict[str, Tensor]] = {}
    for key, (codes, _) in stored.matrices.items():
        if codes.shape not in known:
            alone = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
            grid = fit(torch.zeros(codes.shape), stored.format)
            alone.weight = nn.Parameter(torch.zeros(codes.shape), requires_grad=False)
            _compress(nn.ModuleDict({"layer": alone}), {"layer.weight": grid}, stored.format)
            known[codes.shape] = alone.state_dict()
        module = shell.get_submodule(key.removesuffix(".weight"))
        for name, tensor in known[codes.shape].items():
            planned: Tensor = getattr(module, name)
            if (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
                empty = torch.empty_like(tensor, device="meta")
                setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _packed(key: str, module: nn.Module, stored: StoredGrid) -> dict[str, Tensor]:
    """The tensors that stand for a linear layer's weight, by their names in the files."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    alone.weight = nn.Parameter(weight, requires_grad=False)
    with contextlib.redirect_stderr(io.StringIO()):
        _compress(nn.ModuleDict({"layer": alone}), {"layer.weight": stored.matrices[key][1]}, stored.format)
    return {f"{key.removesuffix('.weight')}.{name}": tensor.detach() for name, tensor in alone.state_dict().items()}


class _Unpacked(TensorFiles):
    """Files of this container, whose packed weights are read as the plain ones that they stand for.

    args: the library's QuantizationArgs of config.json. packed: names of the tensors that stand for each such weight.
    """

    args: JsonObject
    packed: dict[str, list[str]]

    @staticmethod
    def of_directory(directory: Path) -> _Unpacked:
        """Of a directory that `_write_by_block` wrote."""
        files, packed = TensorFiles.of(weight_files(directory)), dict[str, list[str]]()
        scaled = {name.removesuffix("_scale") for name in files.places if name.endswith(".weight_scale")}
        for name in files.places:
            weight = name[: name.rindex(".")] + ".weight" if "." in name else name
            if weight in scaled and name.startswith(weight):
                packed.setdefault(weight, []).append(name)
        places = {**files.places, **{weight: files.places[f"{weight}_scale"] for weight in packed}}
        unpacked = _Unpacked(places, files.facts)
        unpacked.args, unpacked.packed = packing(directory)["config_groups"]["group_0"]["weights"], packed
        return unpacked

    def read(self, name: str) -> Tensor:
        """See TensorFiles."""
        if name not in self.packed:
            return super().read(name)
        tensors = {part.rpartition(".")[2]: super(_Unpacked, self).read(part) for part in self.packed[name]}
        if self.args["type"] == "int":
            fmt, repeats = _integer_format(self.args, {name: tensors})
            return decode(*_integer(tensors, fmt, self.args, repeats[name]), fmt)
        fmt = _float_format(self.args)
        return decode(*_float(tensors, fmt), fmt)


def _opened_by_block(source: ModelSource, device: torch.device) -> CausalLM:
    assert source.path is not None
    return from_disk(source, device=device, files=_Unpacked.of_directory(source.path))


def _complete_config(target: Path, carried: JsonObject) -> None:
    """Put back what the foreign config asked for beside the weights, and let transformers unpack while it loads, as
    `CompressedTensorsConfig(dequantize=True)` does; engines pass over that.

    Without that compressed-tensors unpacks at the first forward pass, in a dtype of its own: fp4 as bfloat16, which a
    model of another dtype can't multiply, and packed zeros don't fit the places that it prepares for them.
    """
    path = target / "config.json"
    config = read_object(path)
    packing_config: JsonObject = config["quantization_config"]
    packing_config["dequantize"] = True
    for key, value in carried.items():
        (packing_config["config_groups"]["group_0"] if key in _OF_THE_GROUP else packing_config)[key] = value
    write_json(path, config)


def _set_parameters(module: nn.Module, grid: Grid, fmt: GridFormat) -> None:
    """Hand scales and zeros to the library. Scales stay float32: it multiplies in their dtype; float16 would round."""
    parameters: dict[str, Tensor] = {"weight_scale": grid.scales}
    if fmt.name.endswith("-zp"):
        assert grid.zeros is not None
        bits = int(fmt.name[3])
        parameters["weight_zero_point"] = (grid.zeros - 2 ** (bits - 1)).to(torch.int8)
    if grid.outer is not None:
        parameters["weight_global_scale"] = grid.outer.reshape(1)
    for name, value in parameters.items():
        setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))


CONTAINERS.register("compressed-tensors", source="https://github.com/vllm-project/compressed-tensors")(
    Container(
        _reads,
        _recognise,
        _fits,
        _write,
        sharded=True,
        write_by_block=_write_by_block,
        opened_by_block=_opened_by_block,
    )
)
