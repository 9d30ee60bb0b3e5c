"""How far are remend check's estimates from the runs? Three recipes on SmolLM2: estimated before, run, estimated again.

    python benchmarks/estimates.py --out DIR [--steps 8] [--answers 48] [--held-out 16] [--max-new-tokens 48]

The recipes: a 4-bit grid with repair, a 2:4 mask with repair, and a dense student (the weights of the first, held
to nothing).
Each is estimated in a process of its own before it runs, from what the cache has by then (nothing before the first
run, then the runs of the other recipes); from the measurement of --measure; and after its run. The cache is DIR's own.
Printed: seconds by phase, real and estimated, with their ratios; real and estimated peak of memory.
A recipe that DIR has run already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("before", "measured", "after")


def recipes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By name."""
    common = {
        "teacher": "smollm2",
        "data": str(args.out / "prompts.jsonl"),
        "steps": args.steps,
        "repair_samples": args.answers,
        "held_out": args.held_out,
        "max_new_tokens": args.max_new_tokens,
    }
    named: dict[str, dict[str, Any]] = {
        "int4 grid": {"student": str(args.out / "int4")},
        "2:4 mask": {"student": str(args.out / "mask")},
        "dense": {"student": str(args.out / "plain"), "steps": args.steps + 2},
    }
    return {name: {**common, **own, "out": str(args.out / name.replace(" ", "-"))} for name, own in named.items()}


def estimate(recipe: dict[str, Any], *, measure: bool) -> dict[str, Any]:
    """What this process says of a recipe."""
    from remend.recovery.forecast import forecast
    from remend.recovery.job import settings
    from remend.recovery.measure_speed import measured_costs
    from remend.recovery.preflight import preflight

    began = time.monotonic()
    checked = preflight(settings(overrides={**recipe, "out": recipe["out"] + "-not-run"}))
    checked.raise_problems()
    assert checked.plan is not None
    found = forecast(checked.plan, measured_costs(checked.plan) if measure else None, "measured")
    return {
        "seconds": dict(found.seconds),
        "peak": found.memory.peak,
        "source": found.source,
        "took": time.monotonic() - began,
    }


def asked(args: argparse.Namespace, name: str, *, measure: bool) -> dict[str, Any]:
    """`estimate` in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--estimate", name, *(["--now"] if measure else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def remend(*words: str) -> None:
    """Run remend's command line."""
    done = subprocess.run([sys.executable, "-m", "remend", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"remend {' '.join(words)}:\n{done.stdout.decode()[-2000:]}")


def prepared(out: Path) -> None:
    """The students and the prompts."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "int4").exists():
        remend("degrade", "quantize", "smollm2", "--format", "int4-g32-sym", "--no-probe", "--out", str(out / "int4"))
    if not (out / "plain").exists():  # the same weights, without what says that they are on a grid
        shutil.copytree(out / "int4", out / "plain", ignore=shutil.ignore_patterns("remend", "degradation.json"))
    if not (out / "mask").exists():
        remend("degrade", "prune", "smollm2", "--sparsity", "2:4", "--no-probe", "--out", str(out / "mask"))
    if not (out / "prompts.jsonl").exists():
        remend("recipes", "cp", "recover", str(out))


def measured(args: argparse.Namespace, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Estimates of one recipe before, by measurement and after, and its run; kept in DIR."""
    kept = args.out / f"{name.replace(' ', '-')}.json"
    if kept.is_file():
        value: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return value
    found: dict[str, Any] = {"load": [os.getloadavg()[0]]}
    found["before"] = asked(args, name, measure=False)
    found["measured"] = asked(args, name, measure=True)
    words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in recipe.items()]
    remend("recover", *words)
    found["load"].append(os.getloadavg()[0])
    from remend.files.run_directory import RunDirectory

    found["real"] = RunDirectory(Path(recipe["out"])).phase_seconds()
    summary = json.loads((Path(recipe["out"]) / "summary.json").read_text(encoding="utf-8"))
    found["peak_rss_mib"] = summary["peak_rss_mib"]
    found["after"] = asked(args, name, measure=False)
    kept.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| recipe | phase | real, s | " + " | ".join(KINDS) + " |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, found in results.items():
        phases = [phase for phase in found["after"]["seconds"] if found["real"].get(phase)]
        rows = [(phase, found["real"][phase], [found[kind]["seconds"][phase] for kind in KINDS]) for phase in phases]
        whole = sum(found["real"].values()), [sum(found[kind]["seconds"].values()) for kind in KINDS]
        for phase, real, guesses in [*rows, ("in all", *whole)]:
            ratios = " | ".join(f"{guess:.0f} ({guess / real:.2f})" for guess in guesses)
            lines.append(f"| {name} | {phase} | {real:.1f} | {ratios} |")
    for name, found in results.items():
        load, peak = " and ".join(f"{value:.1f}" for value in found["load"]), found["after"]["peak"] / 2**20
        lines.append(
            f"\n{name}: peak of memory {found['peak_rss_mib']} MiB, estimated {peak:.0f}; check took "
            f"{found['before']['took']:.0f} s, with --measure {found['measured']['took']:.0f} s; load {load}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--estimate", help=argparse.SUPPRESS)
    parser.add_argument("--now", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["REMEND_CACHE"] = str((args.out / "cache").absolute())
    if args.estimate:
        print(json.dumps(estimate(recipes(args)[args.estimate], measure=args.now)))
        return
    prepared(args.out)
    results = {}
    for name, recipe in recipes(args).items():
        results[name] = measured(args, name, recipe)
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
