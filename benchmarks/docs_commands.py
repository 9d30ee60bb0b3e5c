"""Do the commands of the README and of the pages in docs run as they stand there?

    python benchmarks/docs_commands.py [PAGE …]          (make docs-commands)

Runs every line of a block of code that begins with remend or torchrun, page after page in a directory of its own. A
tiny model stands in for every model that is named, and options make each command short. What an earlier line of the
page did not make is made beforehand, see `make_input`. The pages of docs/extending are run by their own test.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.tiny import build_model, build_tokenizer, prompts  # noqa: E402

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
MODELS, RUNS = (
    ("student", "damaged", "int3-g64", "runs/tool-sft"),
    ("runs/q4", "runs/recovered", "runs/mine", "runs/first"),
)
RECOVER = "steps=2 warmup_steps=1 batch_size=4 max_new_tokens=6 held_out=4 eval_every=1 repair_samples=8 device=cpu"
QUICK = {
    "recover": RECOVER,
    "check": RECOVER,
    "degrade": "--no-probe --device cpu",
    "diagnose": "--rows 48 --max-new-tokens 6 --device cpu",
    "eval": "--limit 2 --device cpu",
    "cache-teacher": "--max-new-tokens 6 --device cpu",
}
"""Words behind a command of that verb."""

SKIPPED = {
    "lm-eval:": "reads data of the hub",
    "push": "uploads to the hub",
    "--watch": "serves until it is stopped",
    "vllm": "needs vLLM",
}
UNRUN = ("docs/measurements/", "docs/extending/", "docs/reference/cli.md")
"""Measurements take hours, the pages on extending have a test of their own, and the reference shows verbs by form."""

STUDY = """
model: reference
degradations: {cut: {kind: depth, layers: 1}}
methods: {none: none, sdft: on-policy}
tasks: {tooluse-short: {rows: 2, train_rows: 8, options: {max_new_tokens: 4}}}
seeds: [0]
budget: {tokens: 24}
recipe: {batch_size: 2, max_new_tokens: 6, device: cpu}
"""


def remend(*words: str, launcher: Sequence[str] = ("-m", "remend")) -> None:
    """Run the command line. Raises CalledProcessError with what was printed."""
    environment = {**os.environ, "REMEND_CACHE": "cache-of-answers", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *launcher, *words]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make_models() -> None:
    """In the working directory: a healthy model, and rows that are prompts, tool calls and choices in one."""
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained("reference")
    tokenizer.save_pretrained("reference")
    calls = [{"Action": "getMap", "Action_Input": "{}"}]
    options = "\n\nA: tea\nB: rain\nC: cats\nD: maps"
    rows = [
        {"prompt": text + options, "answer": "B", "demonstration": "B", "golden_answer": calls} for text in prompts()
    ]
    parts = {
        "prompts": rows,
        "train": rows[:32],
        "held_out": rows[32:],
        "dev": rows,
        "tools": rows,
        "written": rows,
        "science": rows,
    }
    for name, part in parts.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    recipe = {"student": "student", "teacher": "reference", "data": "prompts.jsonl", "out": "runs/recovered"}
    Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    Path("mine.yaml").write_text(STUDY, encoding="utf-8")


def make_input(name: str) -> None:
    """A model, a run or a file of results that a page takes for granted."""
    if Path(name).exists():
        return
    if name == "gsm.csv":
        lines = ["question,answer", *(f"What is {i} and {i}?,{2 * i}" for i in range(1, 33))]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif name == "small.yaml":
        Path(name).write_text(STUDY, encoding="utf-8")
    elif name == "pruned":
        remend("degrade", "prune", "reference", "--sparsity", "0.5", "--no-probe", "--out", name)
    elif name == "student.gguf":
        make_input("student")
        remend("export", "student", "--format", "gguf", "--out", "of-student")
        shutil.copy(next(Path("of-student").glob("*.gguf")), name)
    elif name == "finetuned":
        rows = [{"prompt": text, "completion": "Tea and rain."} for text in prompts()]
        Path("learned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = ["--data", "learned.jsonl", "--steps", "2", "--no-probe", "--device", "cpu"]
        remend("degrade", "finetune", "reference", *words, "--out", name)
    elif name == "adapter":
        make_input("finetuned")
        words = ["student=reference", "teacher=finetuned", "data=prompts.jsonl", "lora.rank=2", *RECOVER.split()]
        remend("recover", *words, "out=runs/of-adapter")
        shutil.copytree("runs/of-adapter/model", name)
    elif name in MODELS:
        remend("degrade", "quantize", "reference", "--format", "gguf:q4_0", "--no-probe", "--out", name)
    elif name in RUNS:
        make_input("student")
        words = ["student=student", "teacher=reference", "data=prompts.jsonl", f"out={name}", *RECOVER.split()]
        remend("recover", *words)
    elif name in ("degraded.json", "recovered.json"):
        shutil.copy("reference.json", name)


def quick(words: Sequence[str]) -> list[str]:
    """The words that make a command short, without a recipe's keys that it gives as options itself."""
    own = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    if "--steps" in words and words[words.index("--steps") + 1] == "0":
        own |= {"warmup_steps", "eval_every"}
    return [word for word in QUICK.get(words[0], "").split() if word.partition("=")[0] not in own]


def run(line: str) -> str | None:
    """Run one line of a page. Returns why it is skipped, or None.

    Raises CalledProcessError where the command fails.
    """
    words, launcher = shlex.split(line, comments=True)[1:], ["-m", "remend"]
    if line.startswith("torchrun "):
        ours = words.index("remend") + 1
        words, launcher = words[ours:], ["-m", "torch.distributed.run", *words[:ours]]
    reason = next((why for part, why in SKIPPED.items() if any(part in word for word in words)), None)
    if reason:
        return reason
    if words[0] == "prompts":
        return "an untrained model writes no prompts that can be used"
    if words[0] == "recover" and "--student" in words and "--data" not in words and "cache" not in words:
        words += ["--data", "prompts.jsonl"]  # for the same reason
    dry = "--dry-run" in words
    words = [{"smollm2": "reference", "small": "small" if dry else "mine.yaml"}.get(word, word) for word in words]
    out = words[words.index("--out") + 1] if "--out" in words else None
    for word in words:
        name = word.removeprefix("student=")
        if name != out:
            make_input(name)
    if out and "--resume" not in words and words[0] != "study":  # what was made beforehand under the name that it takes
        shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink(missing_ok=True)
    remend(*words, *([] if "--resume" in words else quick(words)), launcher=launcher)
    if words[:2] == ["recipes", "cp"]:
        copied = Path(f"{words[2]}.yaml")
        text = (
            copied.read_text(encoding="utf-8")
            .replace("smollm2", "reference")
            .replace("data: self", "data: prompts.jsonl")
        )
        copied.write_text(text, encoding="utf-8")
        make_input("runs/tool-sft")
    return None


def lines_of(page: str) -> list[str]:
    """The commands in a page's blocks of code, fenced or indented."""
    commands, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif line.startswith(("remend ", "torchrun ") if inside else "    remend "):
            commands.append(line.strip())
    return commands


def main() -> None:
    """See the module."""
    ran, skipped, failed = 0, [], []
    for page in sys.argv[1:] or [page for page in PAGES if not page.startswith(UNRUN)]:
        with tempfile.TemporaryDirectory() as temporary:
            os.chdir(temporary)
            if lines := lines_of(page):
                make_models()
            for line in lines:
                try:
                    reason = run(line)
                except subprocess.CalledProcessError as error:
                    failed.append(line)
                    reason = f"FAILED\n{error.stdout[-3000:]}"
                else:
                    skipped += [line] if reason else []
                    ran += not reason
                print(f"{page}: {line.split('  ')[0]}{f'  {reason}' if reason else ''}", flush=True)
            os.chdir(ROOT)
    print(f"{ran} commands of the docs ran, {len(skipped)} skipped, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
