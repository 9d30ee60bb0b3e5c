"""Does a model's configuration ask for no more layers than its files hold?

Building a model of 10^5 layers takes minutes and of 10^9 all memory, before anything notices that there are no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from remend.errors import InputError
from remend.files.reading import FETCH, read_object
from remend.models.find import ModelSource, weight_files
from remend.models.gguf_header import header

ALWAYS = 512
"""So many layers are taken as they are; the deepest models that are published have a few hundred."""

_DEPTH = re.compile(r"(layers?|depth|blocks|block_count)$|^n_layers?$")
"""How configurations call a number of layers."""


def require_plausible_depth(source: ModelSource) -> None:
    """Raise InputError where a local model's configuration has more layers than the names in its files."""
    if source.path is None:
        return
    if source.kind == "gguf":
        reader = header(source.path)
        asked = {name: field.contents() for name, field in reader.fields.items() if name.endswith(".block_count")}
        named = iter([tensor.name for tensor in reader.tensors])
    else:
        asked = dict(_depths(read_object(source.path / "config.json", FETCH)))
        named = _names(source.path)
    deep = {key: count for key, count in asked.items() if isinstance(count, int) and count > ALWAYS}
    if not deep:
        return
    held = _layers(named)
    for key, count in deep.items():
        if count > max(held, ALWAYS):
            where = "the header" if source.kind == "gguf" else "config.json"
            raise InputError(
                f"{source.spec}: {where} asks for {count} layers ({key}), and its files name {held}; correct the number"
            )


def _depths(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", count) for inner, count in _depths(value))
        elif _DEPTH.search(key):
            yield key, value


def _names(directory: Path) -> Iterator[str]:
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as tensors:
                yield from tensors.keys()
        except (SafetensorError, OSError):
            continue  # what reads the weights says so


def _layers(names: Iterable[str]) -> int:
    numbers = (int(part) for name in names for part in name.split(".") if part.isdecimal() and len(part) < 9)
    return max(numbers, default=-1) + 1
