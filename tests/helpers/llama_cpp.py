"""llama.cpp itself, from the wheel of xllamacpp, and tiny GGUF files for it. Without the wheel the tests fail."""

from __future__ import annotations

import ctypes
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp


class LlamaCpp:
    """A GGUF file, opened by llama.cpp's server on one thread."""

    def __init__(self, file: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.warmup = False
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_threads_http = 1
        params.verbosity = -1
        self.server = xllamacpp.Server(params)
        # a server that is taken down soon after its start now and then waits for itself for ever, so none ever is
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.server))

    def ask(self, where: str, **content: Any) -> dict[str, Any]:
        """One request to the server, e.g. to 'tokenize'."""
        body = json.dumps(content).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/{where}", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def tokens(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text in which special tokens count as such."""
        ids: list[int] = self.ask("tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]
        return ids


def tiny_file(
    file: Path,
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    model: str = "gpt2",
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    header: Mapping[str, Any] | None = None,
) -> Path:
    """A llama of one layer and width 32 with random weights, whose header has this vocabulary.

    Args:
        header: more fields; a bool, int, str or a list of str.
    """
    width, random = 32, np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    if merges:
        writer.add_token_merges(list(merges))
    if scores:
        writer.add_token_scores(list(scores))
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for name, value in (header or {}).items():
        add[type(value)](name, value)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,), "output": (len(tokens), width)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
