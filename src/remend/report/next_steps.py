"""What to do with a recovered model: commands that can be copied, with the run's own paths."""

from __future__ import annotations

import shlex
from pathlib import Path

from remend.files.atomic import JsonRow
from remend.report.page import Block, Code, Text
from remend.report.scores import EVALS


def is_adapter(run: Path) -> bool:
    """Whether the run's model is an adapter beside its base."""
    return (run / "model" / "adapter_config.json").is_file()


def loading(model: str, *, adapter: bool = False) -> str:
    """Python that loads a model and its tokenizer from a directory or hub id."""
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    package = "peft" if adapter else "transformers"
    lines = ["from transformers import AutoTokenizer"] if adapter else []
    lines = [f"from {package} import {kind}" + ("" if adapter else ", AutoTokenizer"), *lines, ""]
    return "\n".join(
        [*lines, f"model = {kind}.from_pretrained({model!r})", f"tokenizer = AutoTokenizer.from_pretrained({model!r})"]
    )


def serving(model: str, *, adapter: str = "") -> str:
    """The command that serves a directory by vLLM; of an adapter (its directory) beside its base (`model`)."""
    words = ["vllm", "serve", model, *(["--enable-lora", "--lora-modules", f"recovered={adapter}"] if adapter else [])]
    return shlex.join(words)


def next_steps(run: Path, summary: JsonRow, manifest: JsonRow) -> list[Block]:
    """`commands` as a page shows them."""
    return [block for title, code in commands(run, summary, manifest) for block in (Text(title + ":"), Code(code))]


def commands(run: Path, summary: JsonRow, manifest: JsonRow) -> list[tuple[str, str]]:
    """Load, serve, export, evaluate, look closer, publish: what it is for, and the line or lines to copy."""
    model, recipe, name = str(run / "model"), manifest["recipe"], run.name or "recovered"
    adapter = is_adapter(run)
    base = str(recipe["student"])
    steps: list[tuple[str, str]] = [("Load it in Python", loading(model, adapter=adapter))]
    if adapter:
        steps.append(("Serve it on its base", serving(base, adapter=model)))
    else:
        steps.append(("Serve it", serving(model)))
        for format in summary.get("exports") or ["dense"]:
            command = shlex.join(
                ["remend", "export", str(run), "--format", format, "--out", f"{run}-{format.partition(':')[0]}"]
            )
            steps.append((_why(format), command))
    grade = ["--task", "TASK", "--data", "ROWS.jsonl", "--out"]
    scored = [
        shlex.join(["remend", "eval", spec, *grade, str(run / EVALS / f"{role}.json")])
        for role, spec in (("degraded", base), ("recovered", str(run)), ("reference", str(manifest["reference"])))
    ]
    files = [str(run / EVALS / f"{role}.json") for role in ("degraded", "recovered", "reference")]
    steps.append(
        ("Grade it on your task (remend tasks lists what there is); the page then shows the scores", "\n".join(scored))
    )
    steps.append(
        ("Say whether the scores differ by more than chance", shlex.join(["remend", "compare", files[2], *files[:2]]))
    )
    look = ["remend", "diagnose", "--reference", str(manifest["reference"]), "--student", model, "--out"]
    steps.append(("See where the rest of the damage sits", shlex.join([*look, f"{run}-diagnosis"])))
    steps.append(("Publish it, privately", shlex.join(["remend", "push", str(run), f"YOUR_NAME/{name}"])))
    return steps


def _why(format: str) -> str:
    name = format.partition(":")[0]
    reader = {"gguf": "llama.cpp", "compressed-tensors": "vLLM"}.get(name)
    return f"Export it for {reader}" if reader else "Export it as a plain directory"
