"""Does each benchmark still run? The shortest case of every script in this folder, one after another.

    python benchmarks/shortest.py [NAME …]          (make benchmarks-short)

What is printed is no measurement. A script whose peer is not installed (TRL, ckatorch: pip install -e '.[bench]') or
that finds no package index is skipped by name. A script that stands here without a case is an error.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from helpers.task_rows import letter_rows, tool_rows, write  # noqa: E402

CASES: Mapping[str, str] = {
    "solvers": "--rows 64 --columns 64 --samples 128 --repeats 1",
    "openings": "--rounds 1 --tokens 4",
    "decoding": "--rows 2 --tokens 4 --rounds 1",
    "cka": "--student OUT/student --rows 8",
    "awq": "--formats int3-g64 --answers 0 --prompts 1 --calibration 2",
    "step_time": "--rounds 1 --steps 1 --prompts 2 --new-tokens 4",
    "evaluation": "--out OUT/evaluation --science OUT/letters.jsonl --tooluse OUT/tools.jsonl --limit 1",
    "alignment": "--out OUT/alignment --steps 4 --prompts 4 --student OUT/student",
    "degradations": "--out OUT/degradations --only SHORTEST --steps 1 --set repair_samples=8",
    "time_to_recover": "--out OUT/time --only SHORTEST --steps 5",
    "forgetting": "--out OUT/forgetting --steps 1 --rows 2 --prompts 4",
    "download_size": "",
    "served": "--types f32 --tokens 2",
    "estimates": "--out OUT/estimates --steps 1 --answers 8 --held-out 4 --max-new-tokens 4",
    "scale": "--out OUT/scale --sizes 10m --ways norms --steps 1",
    "by_block": "--out OUT/blocks --size 10m --layers 1 --records OUT/rows",
    "durability": "--out OUT/durability steps=1 repair_samples=8 held_out=4 max_new_tokens=4",
    "after_repair": "--out OUT/after --only int3-g64 --idea SHORTEST --seconds 2 --answers 16 --records OUT/rows",
    "claims": "--out OUT/claims.md",
    "architectures": "--out OUT/arch --only SHORTEST --damage int3-g64 --steps 2 --answers 16 --records OUT/cells",
}
"""Options of each; OUT is a directory that is gone afterwards, SHORTEST the name in ONLY."""

ONLY = {
    "degradations": "int3-g64 rtn",
    "time_to_recover": "on-policy, 1e-4",
    "architectures": "llama",
    "after_repair": "norms, 1e-3",
}
NEEDS = {"cka": "ckatorch", "step_time": "trl", "served": "xllamacpp"}
PARTS = {
    "time_lines": "is a part of time_to_recover",
    "time_tables": "is a part of time_to_recover",
    "trl_distillation": "is run by time_to_recover's lines of TRL",
    "golden": "make golden",
    "golden_reasons": "is a part of golden",
    "count": "make count",
    "verdicts": "is a part of claims",
    "reference": "make docs",
    "oldest": "make test-oldest",
    "docs_commands": "make docs-commands",
    "engines": "make test-engines",
    "engine_answers": "is run by engines, in vLLM's environment",
    "kept_rows": "keeps rows of others",
    "record": "keeps what came of the others",
    "shortest": "is this",
}
"""Scripts that have no case of their own, and why."""


def prepare(out: Path) -> None:
    """What several cases read."""
    write(out / "tools.jsonl", tool_rows(1))
    write(out / "letters.jsonl", letter_rows(1))
    student = ["degrade", "quantize", "smollm2", "--format", "int3-g64", "--no-probe", "--out", str(out / "student")]
    subprocess.run([sys.executable, "-m", "remend", *student], check=True, stdout=subprocess.DEVNULL)


def run(name: str, out: Path) -> str:
    """'ran', or why it was skipped; on an error what it printed last."""
    if (package := NEEDS.get(name)) and importlib.util.find_spec(package) is None:
        return f"skipped: {package} is not installed"
    words = [ONLY[name] if w == "SHORTEST" else w.replace("OUT", str(out)) for w in CASES[name].split()]
    command = [sys.executable, str(HERE / f"{name}.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return "ran"
    if name == "download_size" and "No matching distribution" in done.stdout:
        return "skipped: no package index"
    return f"FAILED with {done.returncode}\n{done.stdout[-3000:]}"


def main() -> None:
    """See the module."""
    missing = {path.stem for path in HERE.glob("*.py")} - CASES.keys() - PARTS.keys()
    if missing:
        sys.exit(f"no shortest case for {', '.join(sorted(missing))}; add one to CASES in {Path(__file__).name}")
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for name in sys.argv[1:] or CASES:
            began = time.monotonic()
            results[name] = run(name, Path(temporary))
            print(f"{name:<18}{time.monotonic() - began:>6.0f} s  {results[name]}", flush=True)
    skipped = [name for name, result in results.items() if result.startswith("skipped")]
    failed = [name for name, result in results.items() if result.startswith("FAILED")]
    about = f"{len(results) - len(skipped) - len(failed)} of {len(results)} benchmarks ran"
    about += f"; skipped: {', '.join(skipped)}" if skipped else ""
    print(about + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
