"""Does pulling hidden states towards the teacher's help? int3-g64 of SmolLM2, with and without `alignment`.

python benchmarks/alignment.py --out runs/alignment [--steps 16] [--student DIR]

Three recoveries by the command line, without repair (which would leave little to see): none, cka, l2. Held-out KL is
measured every 4 steps and printed against the seconds of training alone, so that a dearer step counts. Runs that are
there are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from remend.files.run_directory import RunDirectory
from remend.maths.gap import bootstrap_gap_closed
from remend.studies.demo import write_prompts

EVERY = 4
VARIANTS: dict[str, list[str]] = {
    "none": [],
    "cka": ["alignment.measure=cka"],
    "l2": ["alignment.measure=l2"],
}


def remend(*words: str) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True)


def curve(directory: Path) -> list[tuple[float, float]]:
    """(seconds of training so far, held-out KL) at each evaluation."""
    run = RunDirectory(directory)
    seconds, total = {}, 0.0
    for step, spent in run.step_seconds().items():
        total += spent
        seconds[step] = total
    return [(seconds[row["step"]], row["eval/kl"]) for row in run.rows("metrics.jsonl") if "eval/kl" in row]


def at(points: list[tuple[float, float]], seconds: float) -> float:
    """KL at a time, on straight lines between the evaluations; the last one for a time after it."""
    for (t0, k0), (t1, k1) in itertools.pairwise(points):
        if t0 <= seconds <= t1:
            return k0 + (k1 - k0) * (seconds - t0) / (t1 - t0)
    return points[-1][1]


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--student", help="int3-g64 of SmolLM2; made when it is not given")
    parser.add_argument("--prompts", type=int, help="at most so many for training, and for measuring")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held_out = write_prompts(arguments.out, arguments.prompts)
    student = arguments.student or str(arguments.out / "student")
    if not Path(student).is_dir():
        remend("degrade", "quantize", "smollm2", "--format", "int3-g64", "--out", student)
    for name, words in VARIANTS.items():
        target = arguments.out / name
        if (target / "summary.json").is_file():
            continue
        settings = [f"student={student}", "teacher=smollm2", f"data={train}", f"eval_data={held_out}", f"out={target}"]
        rest = [
            f"steps={arguments.steps}",
            f"eval_every={EVERY}",
            "repair=false",
            "save_every=0",
            "select=last",
            "updates_per_rollout=1",
        ]
        remend("recover", *settings, *rest, *words)
    curves = {name: curve(arguments.out / name) for name in VARIANTS}
    shared = min(points[-1][0] for points in curves.values())
    base = [json.loads(line) for line in (arguments.out / "none" / "held_out.jsonl").open()]
    result: dict[str, Any] = {}
    for name, points in curves.items():
        rows = [json.loads(line) for line in (arguments.out / name / "held_out.jsonl").open()]
        paired = bootstrap_gap_closed([r["kl_sum_recovered"] for r in base], [r["kl_sum_recovered"] for r in rows])
        result[name] = {
            "curve": [(round(s, 1), round(kl, 4)) for s, kl in points],
            "kl_at_equal_time": round(at(points, shared), 4),
            "kl_at_equal_steps": round(points[-1][1], 4),
            "below_none_at_equal_steps_95": paired if name != "none" else None,
            "seconds_a_step": round(points[-1][0] / arguments.steps, 2),
        }
    (arguments.out / "results.json").write_text(json.dumps({"seconds": shared, **result}, indent=2) + "\n")
    print(
        f"| signal | s a step | KL after {arguments.steps} steps | KL after {shared:.0f} s |\n| --- | --- | --- | --- |"
    )
    for name, row in result.items():
        figures = f"{row['seconds_a_step']:.2f} | {row['kl_at_equal_steps']:.3f} | {row['kl_at_equal_time']:.3f}"
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()
