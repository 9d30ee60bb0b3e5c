"""Inputs and commands of the golden comparison: small, but through everything that a recovery does.

Two users: benchmarks/golden.py runs them with old and new code side by side, tests/test_golden.py keeps their figures.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from helpers.task_rows import letter_rows, tool_rows
from helpers.tiny import TOPICS, build_model, build_tokenizer

KILLED_AT = 6
"""The row of metrics.jsonl before which an interrupted run dies: that of step 5, or of step 4 where the layers are
compared at step 3. The evaluation at step 3 is behind it, and so is a checkpoint that is older than the last row."""

SHARED: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "warmup_steps": 1,
    "max_new_tokens": 8,
    "held_out": 6,
    "save_every": 2,
    "eval_every": 3,
    "repair_samples": 24,
    "device": "cpu",
    "dtype": "float32",
}
"""Rates and rounds of sampling are the defaults, which are a part of what must not move."""

RECIPES: dict[str, dict[str, Any]] = {
    "grid": {
        "student": "given/int3",
        "teacher": "reference",
        "data": "prompts.jsonl",
        "bootstrap": "repair",
        "diagnose_every": 3,
    },
    "mask": {"student": "given/mask", "teacher": "reference", "data": "prompts.jsonl", "diagnose_every": 2},
    "streams": {
        "student": "given/forgot",
        "streams": {
            "past": {"teacher": "reference", "data": "prompts.jsonl"},
            "task": {"teacher": "ema", "data": "rows.jsonl", "demonstrations": True, "policy": 0.5, "weight": 0.5},
        },
    },
    "cache": {
        "student": "given/int3",
        "streams": {"stored": {"teacher": "given/cache", "policy": "off", "beta": 0.5}},
        "gradient_accumulation": 2,
    },
    "lora": {
        "student": "given/forgot",
        "teacher": "reference",
        "data": "prompts.jsonl",
        "lora": {"rank": 4},
        "bootstrap": "auto",
    },
}
"""The five that must be compared."""

MORE_RECIPES: dict[str, dict[str, Any]] = {
    "shallow": {
        "student": "given/depth",
        "teacher": "reference",
        "data": "self",
        "self_prompts": 24,
        "alignment": {"measure": "cka"},
    },
    "packed": {
        "student": "given/packed",
        "streams": {
            "past": {
                "teacher": "reference",
                "data": "prompts.jsonl",
                "top_k": 8,
                "beta": 1.0,
                "max_new_tokens": [4, 8],
            },
            "same": {"teacher": "initial", "data": "rows.jsonl", "share": 0.5, "beta": 1.0, "temperature": 0.7},
            "still": {"teacher": "live", "data": "rows.jsonl", "demonstrations": True, "weight": 0.1},
        },
        "updates_per_rollout": 3,
        "save_every": 3,
        "select": "last",
    },
    "gguf": {
        "student": "given/gguf/model.gguf",
        "teacher": "reference",
        "data": "prompts.jsonl",
        "bootstrap": "on",
        "bootstrap_steps": 3,
        "train_embeddings": True,
    },
    "narrow": {"student": "given/width", "teacher": "reference", "data": "prompts.jsonl", "updates_per_rollout": 1},
    "adapter": {
        "student": "given/runs/lora/model",
        "teacher": "base",
        "data": "prompts.jsonl",
        "merge": True,
        "patience": 1,
    },
}
"""What the five leave out: other damage, other containers, other teachers, other choices."""

DEGRADE = {
    "int3": "degrade quantize reference --format int3-g32",
    "int4": "degrade quantize reference --format int4-g32-sym",
    "gptq": "degrade quantize reference --format gguf:q4_0 --method gptq --data prompts.jsonl",
    "mask": "degrade prune reference --method wanda --sparsity 2:4 --data prompts.jsonl",
    "depth": "degrade prune reference --method depth --layers 1 --data prompts.jsonl",
    "width": "degrade prune reference --method width --ffn 0.25 --data prompts.jsonl",
    "forgot": "degrade finetune reference --data rows.jsonl --steps 6 --learning-rate 1e-3",
    "nf4": "degrade quantize reference --format nf4",
    "nvfp4": "degrade quantize reference --format nvfp4 --method gptq --data prompts.jsonl",
    "folded": "degrade finetune reference --data rows.jsonl --epochs 1 --lora-rank 4",
    "sparse": "degrade prune reference --method sparsegpt --sparsity 0.5 --data prompts.jsonl",
    "packed": "export made/int4 --format compressed-tensors",
    "gguf": "export made/gptq --format gguf:q4_0",
    "prompts.jsonl": "prompts reference --n 12 --max-new-tokens 24",
    "cache": "cache-teacher reference --data prompts.jsonl --k 16 --max-new-tokens 8",
}
"""What makes the students and the cached teacher; `--out` is added."""


VERBS = ["Tell", "Sing", "Draw", "Write", "Read", "Name"]
FORMS = ["about {} here", "of {} and me", "the {} again", "more {} today", "two {} for all"]
TEXT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
"""What the chat template puts before a prompt, between it and its answer, and after that."""


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cpu_kind() -> dict[str, object]:
    """What the last bits of a figure depend on: the processor's instructions, its maker's libraries, torch."""
    flags: set[str] = set()
    maker = platform.processor()
    if (about := Path("/proc/cpuinfo")).is_file():
        values = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", about.read_text(), re.MULTILINE))
        maker, flags = values.get("vendor_id", maker), set(values.get("flags", "").split())
    telling = {"amx_bf16", "amx_tile", "avx2", "avx512_bf16", "avx512_vnni", "avx512f", "fma"}
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "maker": maker,
        "flags": sorted(flags & telling),
        "torch": torch.__version__,
    }


def write_inputs(directory: Path, width: int = 64, layers: int = 3, steps: int = 150) -> None:
    """A healthy tiny model, prompts, rows with demonstrations and task rows; by no code of the package.

    The model learns for `steps` steps to ask and to answer, so that it can write prompts itself.
    """
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), width=width, layers=layers)
    asked = [f"{verb} {form.format(topic)}" for form in FORMS for topic in TOPICS for verb in VERBS]
    chats = [f"{TEXT[0]}{ask}.{TEXT[1]}{ask.split()[2]} is good.{TEXT[2]}" for ask in asked]
    _learn(model, [tokenizer.encode(chat) for chat in chats], steps)
    model.save_pretrained(directory / "reference")
    tokenizer.save_pretrained(directory / "reference")
    _lines(directory / "prompts.jsonl", [{"prompt": f"{ask}."} for ask in asked[::6]])
    facts = [f"Say one word about {TOPICS[i % len(TOPICS)]} and {i}." for i in range(24)]
    rows = [{"prompt": f, "demonstration": f"{TOPICS[i % len(TOPICS)]} is good."} for i, f in enumerate(facts)]
    _lines(directory / "rows.jsonl", rows)
    _lines(directory / "tools.jsonl", tool_rows(10))
    letters = [{**row, "demonstration": row["answer"]} for row in letter_rows(36)]
    _lines(directory / "letters.jsonl", letters[:12])
    _lines(directory / "letters-train.jsonl", letters[12:])


OLD_RUN: dict[str, Any] = {
    **SHARED,
    "learning_rate": 1e-3,
    "student": "student",
    "teacher": "reference",
    "data": "prompts.jsonl",
    "diagnose_every": 3,
    "keep_checkpoints": 1,
}
"""Of the two runs that a fixture keeps as an old version wrote them, one complete and one killed."""

STUDY: dict[str, Any] = {
    "model": "reference",
    "degradations": {
        "forgot": {"kind": "finetune", "steps": 6, "learning_rate": 3e-3},
        "shallow": {"kind": "depth", "layers": [1], "method": "list"},
    },
    "methods": {"none": "none", "sft": "sft", "repair-sdft": "on-policy+repair"},
    "tasks": {
        "science": {"train": "letters-train.jsonl", "held_out": "letters.jsonl", "options": {"max_new_tokens": 4}},
    },
    "data": {"train": "rows.jsonl", "rows": 6},
    "seeds": [0, 1],
    "budget": {"tokens": 200},
    "measurements": 2,
    "recipe": {"batch_size": 4, "max_new_tokens": 8, "repair_samples": 16, "device": "cpu", "dtype": "float32"},
    "one_process": True,
}


def _learn(model: PreTrainedModel, rows: list[list[int]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        some = [torch.tensor(rows[(16 * step + i) % len(rows)]) for i in range(16)]
        ids = pad_sequence(some, batch_first=True, padding_value=-100)
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def figures(run: Path) -> dict[str, Any]:
    """What a recovery computed: losses and held-out KL by step, before and after, and a hash of each tensor file."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    numbers = {f"{key} at step {row['step']}": row[key] for row in rows for key in ("loss", "eval/kl") if key in row}
    numbers |= {f"{key}, {which}": summary[which][key] for which in ("degraded", "recovered") for key in summary[which]}
    numbers = {name: value for name, value in numbers.items() if value is not None}  # a cache scores no new answers
    files = [*(run / "model").rglob("*.safetensors"), *run.glob("checkpoints/step-000006/*.safetensors")]
    # a grid lay beside the weights in 0.1, and goes by that name here
    names = {path.relative_to(run).as_posix().replace("model/remend/", "model/"): path for path in files}
    return {"numbers": numbers, "sha256": {name: _hash(path) for name, path in sorted(names.items())}}


def _hash(path: Path) -> str:
    """Of the tensors with their names; the file's own metadata stand in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], kind: dict[str, object]) -> None:
    """Exactly where `theirs` comes of this kind of CPU, else the numbers to 1e-4."""
    if cpu_kind() == kind:
        assert ours == theirs
    else:
        assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=1e-4)
        assert ours["sha256"].keys() == theirs["sha256"].keys()


def write_recipes(directory: Path) -> None:
    """One file a recipe, and a study's; JSON is YAML."""
    for name, settings in {**RECIPES, **MORE_RECIPES}.items():
        text = json.dumps({**SHARED, **settings, "out": f"runs/{name}"}, indent=1)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    for name in ("complete", "killed"):
        text = json.dumps({**OLD_RUN, "out": name}, indent=1)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    (directory / "study.yaml").write_text(json.dumps(STUDY, indent=1), encoding="utf-8")
