"""Opens a model as programs do that know nothing of remend. It runs in a process of its own, and imports nothing of it.

python -P stranger.py READER REQUEST.json RESULT.json

REQUEST names `path` (a directory, or a GGUF file), `ids` (rows of one length), `measured` (a safetensors file with the
measured model's `logits` on them, float32 [N, V]), `dtypes` and `trust_remote_code`; for llama.cpp also `text` and
its `text_ids`.

Legend: N tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 600
"""Seconds that llama.cpp's server is waited for: four tokens of a large model on a busy machine take minutes."""


def transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Load with transformers alone and run one forward pass, dtype by dtype.

    float32 is left out where `auto` came to it.

    Returns:
        `reader`, and `dtypes`: for each that was asked for the `dtype` that the model came to, `kl` (nats per token,
        measured ‖ read) and `max_logit_difference`; or `error`, where it can't be loaded or run.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(request["path"])
    where, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    measured_NV = load_file(request["measured"])["logits"]
    log_p_NV = measured_NV.log_softmax(-1)
    dtypes: dict[str, Any] = {}
    for dtype in request["dtypes"]:
        if dtype in (done.get("dtype") for done in dtypes.values()):
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, use_safetensors=True, trust_remote_code=request["trust_remote_code"], **extra
            ).eval()
            with torch.no_grad():
                read_NV = model(input_ids=torch.tensor(request["ids"])).logits.float().flatten(0, 1)
            if not read_NV.isfinite().all():
                raise ValueError("its logits are not all finite")
            dtypes[dtype] = {
                "dtype": str(model.dtype).removeprefix("torch."),
                "kl": float((log_p_NV.exp() * (log_p_NV - read_NV.log_softmax(-1))).sum(-1).mean()),
                "max_logit_difference": float((read_NV - measured_NV).abs().max()),
            }
            del model
        except Exception as error:
            dtypes[dtype] = {"error": _said(error)}
    return {"reader": f"transformers {importlib.metadata.version('transformers')}", "dtypes": dtypes}


def llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Open a GGUF file in llama.cpp (package xllamacpp), cut a text into tokens and let it answer.

    Returns:
        `reader`, and `tokens_equal` (the text's ids are those given) or `error`.
    """
    import xllamacpp

    result: dict[str, Any] = {"reader": f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"}
    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.verbosity = 256, 1, False, False, -1
    try:
        server = xllamacpp.Server(params)
        _alive.append(server)

        def ask(what: str, **content: Any) -> Any:
            headers = {"Content-Type": "application/json"}
            address = f"{server.listening_address}/{what}"
            asked = urllib.request.Request(address, json.dumps(content).encode(), headers)
            with urllib.request.urlopen(asked, timeout=PATIENCE) as said:
                return json.load(said)

        ids = ask("tokenize", content=request["text"], add_special=False, parse_special=True)["tokens"]
        answer = ask("completion", prompt=request["ids"][0], n_predict=4, temperature=0.0, return_tokens=True)
        if not answer["tokens_predicted"]:
            raise ValueError("it gives no answer")
        return {**result, "tokens_equal": ids == request["text_ids"]}
    except Exception as error:
        return {**result, "error": _said(error)}


_alive: list[Any] = []
"""Servers that are not taken down."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    sys.modules["remend"] = None  # type: ignore[assignment]  # whatever would import it fails
    reader, asked, result = sys.argv[1:]
    answer = {"transformers": transformers, "llama.cpp": llama_cpp}[reader](json.loads(Path(asked).read_text("utf-8")))
    Path(result).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)  # llama.cpp's server, taken down soon after its start, now and then waits for itself for ever
