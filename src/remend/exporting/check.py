"""Read an exported artifact back and compare it with the model that was measured: weights and logits, bit for bit.

Then programs that know nothing of remend open it, each in a process of its own (stranger.py).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from remend.compression.containers import Container, Measured, container_of
from remend.console import stage, warn
from remend.errors import FileError
from remend.exporting import stranger
from remend.files.atomic import JsonObject
from remend.models.blocks import by_block, part_of, parts_of
from remend.models.find import ModelSource, find_model
from remend.models.load import load_model, load_tokenizer
from remend.models.protocols import CausalLM

SEQUENCES, LENGTH = 4, 48

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a stranger asks transformers for."""
LARGE = 2 * 10**9
"""Parameters above which it asks for `auto` alone: each dtype loads the model once more."""
LARGEST_KL = 0.1
"""Nats a token between the measured model and what a stranger reads. Rounding to bfloat16 gives a hundredth at most; a
matrix in the wrong order gives several."""

TEXT = "Rain:\n\n1. 12,345.67 km²\n  2) if x == 3:\n\t\treturn f(x)  # naïve Привет 你好 مرحبا 🙂\n| a | 7 |\n"
"""What llama.cpp cuts into tokens: digits after spaces and line breaks, indentation, code, scripts, a table."""


def verify(exported: str | Path, measured_dir: str | Path, *, trust_remote_code: bool = False) -> JsonObject:
    """Load both in float32 on the CPU and compare; then let strangers open the first.

    Args:
        exported: a directory that `export` wrote, or the GGUF file in it.
        measured_dir: the model that was measured: a directory, GGUF file or hub id.

    Returns:
        `weights_equal` (every parameter, bit for bit), `different` (ten names of those that are not),
        `max_weight_difference`, `max_logit_difference` (over 4 sequences of 48 random tokens), `read_by` (who
        opened it, and at which dtypes), and `strangers`, with what each found (see `stranger`).

    Raises:
        FileError: one of the two can't be read.
    """
    return _compare(Path(exported), find_model(str(measured_dir), trust_remote_code=trust_remote_code))


def compare_file(target: Path, measured: Measured, container: Container) -> JsonObject:
    """`verify` against the measured model's own files. Raises FileError when anything differs, or nobody reads it.

    Of a model whose blocks are on the disk, blocks are compared one by one, and no other program opens the whole.
    """
    if by_block(measured.model):
        check = _compare_by_block(target, measured, container)
    else:
        check = _compare(target, measured.source)  # loaded anew: a writer may have packed the measured one in place
    if not check["weights_equal"] or check["max_logit_difference"] != 0:
        raise FileError(
            f"what was written is not what was measured: {len(check['different'])} tensors differ "
            f"({', '.join(check['different'][:3]) or 'none'}), by {check['max_weight_difference']:.3g} at most, "
            f"the logits by {check['max_logit_difference']:.3g}. "
            "Nothing was kept; use --format dense, and report this model"
        )
    for answer in check["strangers"]:
        for dtype, fault in _faults(answer).items():
            text = f"{answer['reader']} does not read what was written{dtype and f' as {dtype}'}: {fault}"
            if dtype not in ("", "auto"):
                warn(text)
                continue
            raise FileError(f"{text}. Nothing was kept; use --format dense, and report this model")
    return check


def _load(source: ModelSource) -> CausalLM:
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def _compare(exported: Path, measured: ModelSource) -> JsonObject:
    files = sorted(exported.glob("*.gguf")) if exported.is_dir() else [exported]
    path = files[0] if files else exported
    source = find_model(str(path), trust_remote_code=measured.trust_remote_code)
    old = _load(measured)
    check, ids_BT, logits_NV = _compared(_load(source), old)
    container, readers = container_of(source), []
    if container is not None and container.differing is not None and source.path is not None:
        different = container.differing(source.path, old)
        check["weights_equal"] = check["weights_equal"] and not different
        check["different"] = (check["different"] or different)[:10]
        readers = [container.reader]
    small = sum(p.numel() for p in old.parameters()) <= LARGE
    del old  # a stranger needs the memory
    answers = _ask_strangers(path, measured, ids_BT, logits_NV, DTYPES if small else DTYPES[:1])
    return {**check, "read_by": ", ".join([*readers, *filter(None, map(_claim, answers))]), "strangers": answers}


def _compare_by_block(target: Path, measured: Measured, container: Container) -> JsonObject:
    assert container.opened_by_block is not None
    source = find_model(str(target), trust_remote_code=measured.source.trust_remote_code)
    new, old = container.opened_by_block(source, measured.model.device), measured.model
    different, largest = list[str](), 0.0
    for number in parts_of(old):
        with part_of(old, number) as theirs, part_of(new, number) as ours:
            one, other = (dict(_parameters(modules)) for modules in (ours, theirs))
            different += sorted(one.keys() ^ other.keys())
            for name in one.keys() & other.keys():
                if not torch.equal(one[name], other[name]):
                    different.append(name)
                    largest = max(largest, float((one[name] - other[name]).abs().max()))
    ids_BT = _random_ids(new, old)
    with torch.no_grad():
        gap = float((new(input_ids=ids_BT).logits - old(input_ids=ids_BT).logits).abs().max())
    return {
        "weights_equal": not different,
        "different": sorted(different)[:10],
        "max_weight_difference": largest,
        "max_logit_difference": gap,
        "tokens_compared": SEQUENCES * LENGTH,
        "read_by": "remend, block by block",
        "strangers": [],
    }


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{own}", parameter.detach()


def _ask_strangers(
    path: Path, measured: ModelSource, ids_BT: Tensor, logits_NV: Tensor, dtypes: tuple[str, ...]
) -> list[JsonObject]:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"logits": logits_NV}, Path(folder) / "measured.safetensors")
        request: JsonObject = {
            "path": str(path.resolve()),
            "ids": ids_BT.tolist(),
            "measured": str(Path(folder) / "measured.safetensors"),
            "dtypes": dtypes,
            "trust_remote_code": measured.trust_remote_code,
        }
        with stage("opening it with transformers alone"):
            answers = [ask_stranger("transformers", request)]
        if path.suffix == ".gguf" and importlib.util.find_spec("xllamacpp"):
            ids = load_tokenizer(measured)(TEXT, add_special_tokens=False)["input_ids"]
            with stage("opening it with llama.cpp"):
                answers.append(ask_stranger("llama.cpp", {**request, "text": TEXT, "text_ids": list(ids)}))
    return answers


def ask_stranger(reader: str, request: JsonObject) -> JsonObject:
    """What a reader finds that never heard of remend, in a process of its own: one result of `stranger`."""
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", str(Path(stranger.__file__)), reader, str(asked), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if not result.is_file():
            said = " ".join(done.stderr.split())[-300:]
            return {"reader": reader, "error": f"its process ended with {done.returncode}: {said}"}
        answer: JsonObject = json.loads(result.read_text(encoding="utf-8"))
        return answer


def _faults(answer: JsonObject) -> dict[str, str]:
    """What is wrong with what a stranger read, by dtype; under '' where it has none."""
    if "error" in answer:
        return {"": answer["error"]}
    if answer.get("tokens_equal") is False:
        return {"": "it cuts a text into other tokens than the measured model's tokenizer"}
    faults: dict[str, str] = {}
    for dtype, one in answer.get("dtypes", {}).items():
        if "error" in one:
            faults[dtype] = one["error"]
        elif not one["kl"] <= LARGEST_KL:
            faults[dtype] = f"its answers are other ones, by a KL of {one['kl']:.3g} nats per token"
    return faults


def _claim(answer: JsonObject) -> str:
    """The reader, and the dtypes at which it read the model; empty where it did not."""
    faults = _faults(answer)
    if "" in faults:
        return ""
    dtypes: dict[str, Any] = {d: one for d, one in answer.get("dtypes", {}).items() if d not in faults}
    names = [f"auto, which is {one['dtype']}" if d == "auto" else d for d, one in dtypes.items()]
    if "dtypes" in answer and not names:
        return ""
    return str(answer["reader"]) + (f" ({'; '.join(names)})" if names else "")


def compare(new: CausalLM, old: CausalLM) -> JsonObject:
    """Compare the parameters and logits of two models of one architecture."""
    return _compared(new, old)[0]


def _random_ids(*models: CausalLM) -> Tensor:
    """[B, T]: tokens that all models know."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models)
    return torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=generator)


@torch.no_grad()
def _compared(new: CausalLM, old: CausalLM) -> tuple[JsonObject, Tensor, Tensor]:
    """The comparison, the random tokens [B, T] that were read, and the old model's logits [N, V], float32."""
    ours, theirs = dict(new.named_parameters()), dict(old.named_parameters())
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    different = sorted((ours.keys() | theirs.keys()) - set(shared))
    different += [n for n in shared if not torch.equal(ours[n], theirs[n])]
    largest = max((float((ours[n] - theirs[n]).abs().max()) for n in shared), default=0.0)
    ids_BT = _random_ids(new, old)
    logits_BTV = old(input_ids=ids_BT).logits
    check: JsonObject = {
        "weights_equal": not different,
        "different": different[:10],
        "max_weight_difference": largest,
        "max_logit_difference": float((new(input_ids=ids_BT).logits - logits_BTV).abs().max()),
        "tokens_compared": SEQUENCES * LENGTH,
    }
    return check, ids_BT, logits_BTV.float().flatten(0, 1).contiguous()
