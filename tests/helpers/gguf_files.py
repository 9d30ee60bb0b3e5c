"""GGUF files that differ from one in a header or a tensor, as other converters write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np


def rewritten(
    source: Path,
    target: Path,
    *,
    drop: Sequence[str] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    header: Mapping[str, str | int | float] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """`target`, the content of `source` without some tensors, and with more tensors and header fields."""
    reader, more = gguf.GGUFReader(source), dict(header or {})
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in more:
            continue
        value, kind = field.contents(), field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kind)
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for name, given in more.items():
        writer.add_key_value(name, given, kinds[type(given)])
    for tensor in reader.tensors:
        if tensor.name not in drop:
            plain = tensor.tensor_type == gguf.GGMLQuantizationType.F32
            name = (rename or {}).get(tensor.name, tensor.name)
            writer.add_tensor(name, np.array(tensor.data), raw_dtype=None if plain else tensor.tensor_type)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
