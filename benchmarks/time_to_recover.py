"""Seconds to 70, 80 and 85% of the KL gap: remend's options against each other and TRL's DistillationTrainer 1.16.

    pip install -e '.[bench]'
    python benchmarks/time_to_recover.py --out runs/time [--table speed|options|prompts|bootstrap] [--only NAME …]
        [--steps N] [--dtype bfloat16]

    speed      int3-g64 SmolLM2: remend with and without repair, and TRL. Both sides: 8 prompts a step, up to 48 tokens
               sampled at temperature 1, forward KL over the full vocabulary, the same prompts and held-out answers
    options    2 updates from a round of sampling (with and without weights), and short rollouts first, at equal steps
    prompts    the bundled training prompts against as many that the reference wrote, at equal steps
    bootstrap  on-policy, off-policy first, or as the gate decides (auto), on int3-g64 and on 5 removed layers

The clock counts what a user waits for to get the weights: repair, gate, the teacher's completions, and every step. It
stands still while a model is loaded or measured. KL is measured every 5 steps on the reference's greedy answers to the
held-out prompts; a gap is closed at the first measurement that is low enough, nothing is interpolated.

TRL (trl_distillation.py) trains the student's weights freely, without gradient checkpointing (its faster setting) and
at a constant rate after a warm-up as long as remend's at that rate. Its end is measured as trained, and rounded onto
the student's grid again.

Every line is a process of its own. Results are kept in results.json; a line that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from remend import models, run
from remend.flows.demo import TRAINING, write_prompts
from remend.recovery.side_streams import BASELINE
from remend.run import RunDirectory

MODEL, SEED, EVERY, TOKENS, ROWS = "smollm2", 0, 5, 48, 8
TRL_SIDE = Path(__file__).with_name("trl_distillation.py")
SHARES = (0.70, 0.80, 0.85)
DEGRADE = {
    "int3-g64": ("quantize", MODEL, "--format", "int3-g64"),
    "depth-5": ("prune", MODEL, "--method", "depth", "--layers", "23,24,25,26,27"),
}
SELF_WRITTEN = 192
COOL = {"learning_rate": 1e-4}
TWO = {"updates_per_rollout": 2}
ON, AUTO, REPAIR = {"bootstrap": "on"}, {"bootstrap": "auto"}, {"repair": True}
INT3 = "int3-g64"
PACKAGES = ("remend", "torch", "transformers", "trl")


@dataclass(frozen=True)
class Line:
    """One run: its recipe beside the common one, and the tables that show it."""

    name: str
    tables: tuple[str, ...] = ("speed",)
    degradation: str = INT3
    steps: int = 60
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(TRAINING))
    side: str = "remend"
    data: str = "train.jsonl"


def short_lines(degradation: str) -> list[Line]:
    """Of the tables of prompts and bootstrap: 24 steps, each run in every table that it can stand in."""
    tables = ("prompts", "bootstrap", *(["options"] if degradation == INT3 else []))
    return [
        Line(f"on-policy, {degradation}", tables, degradation, 24),
        Line(f"off-policy first, {degradation}", ("bootstrap",), degradation, 24, {**TRAINING, **ON}),
        Line(f"self-written, {degradation}", ("prompts",), degradation, 24, data="self.jsonl"),
        Line(f"auto, {degradation}", ("bootstrap",), degradation, 24, {**TRAINING, **AUTO}),
    ]


def options(name: str, **changed: Any) -> Line:
    """Of the table of options: as on-policy, but for one thing."""
    return Line(name, ("options",), INT3, 24, {**TRAINING, **changed})


LINES = (
    Line("on-policy, 1e-4", recipe=COOL),
    Line("on-policy, 4e-4"),
    Line("repair first", steps=24, recipe=REPAIR),
    Line("repair on 48 answers", steps=24, recipe={**REPAIR, "repair_samples": 48}),
    Line("TRL, 1e-4", recipe=COOL, side="trl"),
    Line("TRL, 4e-4", side="trl"),
    *(line for degradation in DEGRADE for line in short_lines(degradation)),
    options("2 updates a rollout", **TWO),
    options("2 updates, weighted", **TWO, importance_clip=5),
    # the longer length is also that of the held-out answers
    options("short rollouts first", max_new_tokens=[16, TOKENS]),
)


def remend(*words: str) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True)


def prepare(out: Path, lines: Sequence[Line]) -> None:
    """Make what these lines need and is not there: prompts, the reference, students."""
    write_prompts(out)
    if not (out / "reference").is_dir():
        source = models.resolve(MODEL)
        model = models.load_model(source, dtype=torch.float32, device=torch.device("cpu"))
        with run.new_directory(out / "reference") as target:
            models.save_model(model, models.load_tokenizer(source), target)
    for name in dict.fromkeys(line.degradation for line in lines):
        if not (out / name / "degradation.json").is_file():
            remend("degrade", *DEGRADE[name], "--out", str(out / name), "--no-probe", "--seed", str(SEED))
    if any(line.data == "self.jsonl" for line in lines) and not (out / "self.jsonl").is_file():
        words = ("--n", str(SELF_WRITTEN), "--seed", str(SEED), "--device", "cpu")
        remend("prompts", MODEL, *words, "--out", str(out / "self.jsonl"))


def recipe_of(line: Line, out: Path, steps: int, dtype: str) -> dict[str, Any]:
    """All settings of a remend line that are not defaults."""
    common: dict[str, Any] = {
        "student": str(out / line.degradation),
        "teacher": str(out / "reference"),
        "data": str(out / line.data),
        "eval_data": str(out / "held_out.jsonl"),
        "out": str(place_of(line, out)),
        "steps": steps,
        "batch_size": ROWS,
        "max_new_tokens": TOKENS,
        "eval_every": min(EVERY, steps),
        "save_every": 0,
        "select": "last",
        "repair": False,
        "seed": SEED,
        "device": "cpu",
        "dtype": dtype,
    }
    if line.recipe.get("bootstrap"):
        common["bootstrap_steps"] = -(-steps // 3)
    return {**common, **line.recipe}


def trl_words(line: Line, out: Path, steps: int, dtype: str) -> list[str]:
    """The same for trl_distillation.py."""
    stored = sorted((out / "runs").glob("*/reference.jsonl"))  # the answers that remend's runs are measured on
    given = {
        "student": out / line.degradation,
        "reference": out / "reference",
        "data": out / line.data,
        "held-out": out / "held_out.jsonl",
        "answers": stored[0].parent if stored else out,
        "out": place_of(line, out),
        "steps": steps,
        "every": min(EVERY, steps),
        "rows": ROWS,
        "tokens": TOKENS,
        "learning-rate": line.recipe["learning_rate"],
        "warmup": line.recipe.get("warmup_steps", 5),
        "seed": SEED,
        "dtype": dtype,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def place_of(line: Line, out: Path) -> Path:
    """A line's run directory."""
    return out / "runs" / line.name.replace(",", "").replace(" ", "-")


def run_line(line: Line, out: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Run a line from the start and read what its files say."""
    place, load = place_of(line, out), os.getloadavg()
    shutil.rmtree(place, ignore_errors=True)  # an interrupted run has no checkpoints, and its clock had a gap
    began = time.monotonic()
    if line.side == "remend":
        given = recipe_of(line, out, steps, dtype)
        remend("recover", *(f"{key}={json.dumps(v) if not isinstance(v, str) else v}" for key, v in given.items()))
    else:
        subprocess.run([sys.executable, str(TRL_SIDE), *trl_words(line, out, steps, dtype)], check=True)
    summary, around = run.read_json(place / run.SUMMARY), run.environment()
    about = {
        "steps": steps,
        "dtype": dtype,
        "seed": SEED,
        "load_at_start": load,
        "versions": {**around["versions"], **summary.get("versions", {})},
        "hardware": around["hardware"],
        "git_commit": around["git_commit"],
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    shutil.rmtree(place / "model", ignore_errors=True)
    names = ("degraded", "recovered", "rounded", "gap_closed", "gap_closed_kl_95")
    return {**about, **{name: summary.get(name) for name in names}, "setup": setup(place), "curve": curve(place)}


def setup(place: Path) -> dict[str, float]:
    """Seconds before the first step that count, by what they went to."""
    files = RunDirectory(place)
    spent: dict[str, float] = {}
    for row in files.rows("timing.jsonl"):
        if row["step"] == 0:
            spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    if not spent:  # a run that did not time its stages
        before, pools = place / BASELINE, list(place.glob("off-policy-*.jsonl"))
        if pools and before.is_file():
            spent["pool"] = max(0.0, max(p.stat().st_mtime for p in pools) - before.stat().st_mtime)
    if (place / run.REPAIR).is_file() and "repair" not in spent:
        spent["repair"] = run.read_json(place / run.REPAIR)["seconds"]
    return spent


def curve(place: Path) -> list[tuple[float, float]]:
    """(seconds, KL) at every measurement, in order; 0 seconds is the degraded student."""
    files, summary = RunDirectory(place), run.read_json(place / run.SUMMARY)
    before = setup(place)
    points = [(0.0, summary["degraded"]["kl"])]
    if "repair" in before:
        points.append((before["repair"], summary["repair"]["kl"]))
    at, clock = {0: sum(before.values())}, sum(before.values())
    for row in files.rows("timing.jsonl"):
        if row["step"]:
            clock += row["seconds"]
            at[row["step"]] = clock
    measured = [r for r in files.rows(run.METRICS) if "eval/kl" in r and r["step"] < summary["steps"]]
    points += [(at[row["step"]], row["eval/kl"]) for row in measured]
    return [*points, (clock, summary["recovered"]["kl"])]


def seconds_to(points: Sequence[Sequence[float]], limit: float) -> float | None:
    """When the first measurement was at or below `limit`, if any was."""
    return next((seconds for seconds, kl in points if kl <= limit), None)


def to_share(result: Mapping[str, Any], share: float) -> float | None:
    """Seconds until so much of the gap was closed."""
    return seconds_to(result["curve"], (1 - share) * result["degraded"]["kl"])


def figures(value: float | None, form: str = ".0f") -> str:
    """A number, or a dash for one that never came."""
    return "–" if value is None else format(value, form)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


TO = tuple(f"s to {share:.0%}" for share in SHARES)


def speed_table(done: Mapping[str, dict[str, Any]]) -> str:
    """TRL is represented by its line that reaches 70% first, or else by the one that ends lowest."""
    rivals = {n: r for n, r in done.items() if n.startswith("TRL")}
    best = min(
        rivals,
        key=lambda n: (to_share(rivals[n], SHARES[0]) or float("inf"), rivals[n]["recovered"]["kl"]),
        default=None,
    )
    theirs = to_share(done[best], SHARES[0]) if best else None
    limit = done[best]["curve"][-1][0] if best else None
    rows = []
    for name, result in done.items():
        ours, at = to_share(result, SHARES[0]), None
        if limit is not None:
            at = [kl for seconds, kl in result["curve"] if seconds <= limit][-1]
        ratio = figures(ours / theirs, ".2f") if ours is not None and theirs else "–"
        reached = [figures(to_share(result, share)) for share in SHARES]
        end, own = figures(result["recovered"]["kl"], ".3f"), figures(result["recovered"]["kl_on_policy"], ".3f")
        if result["rounded"]:
            end += f" ({result['rounded']['kl']:.3f} on the grid)"
            own += f" ({result['rounded']['kl_on_policy']:.3f} on the grid)"
        rows.append((name, *reached, ratio, figures(at, ".3f"), end, own, figures(result["curve"][-1][0])))
    heads = ("line", *TO, "70% time over TRL's", f"KL at {figures(limit)} s", "KL", "KL on its own answers", "s in all")
    return f"TRL's times are those of {best or 'no line yet'}.\n\n" + markdown(heads, rows)


def prompts_table(done: Mapping[str, dict[str, Any]]) -> str:
    """What is left of the gap at equal steps."""
    rows = []
    for name, r in done.items():
        interval = "{:.2f} to {:.2f}".format(*r["gap_closed_kl_95"]) if r["gap_closed_kl_95"] else "–"
        gap = f"{figures((r['gap_closed'] or {}).get('kl'), '.2f')} ({interval})"
        kl = (f"{r[when]['kl']:.3f}" for when in ("degraded", "recovered"))
        rows.append((name, str(r["steps"]), *kl, gap, f"{r['recovered']['kl_on_policy']:.3f}"))
    heads = ("prompts, student", "steps", "degraded KL", "KL", "gap closed (95%)", "KL on its own answers")
    return markdown(heads, rows)


def bootstrap_table(done: Mapping[str, dict[str, Any]]) -> str:
    """Also: how soon each is where on-policy alone ended, on the same student."""
    students = {line.name: line.degradation for line in LINES}
    rows = []
    for name, r in done.items():
        alone = f"on-policy, {students[name]}"
        end = seconds_to(r["curve"], done[alone]["recovered"]["kl"]) if alone in done else None
        reached = [figures(to_share(r, share)) for share in SHARES]
        last = (f"{r['recovered'][key]:.3f}" for key in ("kl", "kl_on_policy"))
        rows.append((name, students[name], *reached, figures(end), *last, figures(r["curve"][-1][0])))
    heads = ("line", "student", *TO, "s to on-policy's last KL", "KL", "KL on its own answers", "s in all")
    return markdown(heads, rows)


TABLES = {"speed": speed_table, "options": bootstrap_table, "prompts": prompts_table, "bootstrap": bootstrap_table}


def show(results: Mapping[str, dict[str, Any]], tables: Sequence[str]) -> None:
    """Print what is done, table by table, with machine and settings."""
    for table in tables:
        done = {line.name: results[line.name] for line in LINES if table in line.tables and line.name in results}
        if not done:
            continue
        last = next(reversed(done.values()))
        machine, versions = last["hardware"], {k: v for r in done.values() for k, v in r["versions"].items()}
        loads = [r["load_at_start"][0] for r in done.values()]
        packages = ", ".join(f"{n} {versions[n]}" for n in PACKAGES if n in versions)
        print(
            f"\n{table}: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{last['dtype']}, seed {SEED}, load average at a line's start {min(loads):.1f} to {max(loads):.1f}; "
            + packages
        )
        print("\n" + TABLES[table](done), flush=True)


def same_terms(results: Mapping[str, dict[str, Any]], lines: Sequence[Line], wanted: argparse.Namespace) -> None:
    """Raises SystemExit where a result that would be shown beside new ones was made otherwise."""
    for line in lines:
        made = results.get(line.name)
        if made and (made["steps"], made["dtype"]) != (wanted.steps or line.steps, wanted.dtype):
            raise SystemExit(
                f'{wanted.out} holds "{line.name}" of {made["steps"]} steps in {made["dtype"]}; wanted are '
                f"{wanted.steps or line.steps} in {wanted.dtype}. Give another --out, or the same options"
            )


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time"))
    parser.add_argument("--table", choices=list(TABLES), action="append", help="by default all")
    parser.add_argument("--only", choices=[line.name for line in LINES], nargs="+", action="extend", metavar="NAME")
    parser.add_argument("--steps", type=int, help="instead of each line's own number")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    tables = options.table or list(TABLES)
    lines = [n for n in LINES if set(n.tables) & set(tables) and (not options.only or n.name in options.only)]
    path = options.out / "results.json"
    results: dict[str, dict[str, Any]] = run.read_json(path) if path.is_file() else {}
    same_terms(results, lines, options)
    waiting = [line for line in lines if line.name not in results]
    if waiting:
        prepare(options.out, waiting)
    for line in waiting:
        results[line.name] = run_line(line, options.out, options.steps or line.steps, options.dtype)
        run.write_json(path, results)
        show(results, tables)
    show(results, tables)


if __name__ == "__main__":
    main()
