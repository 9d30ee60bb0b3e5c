"""Seconds to 70, 80 and 85% of the KL gap: remend's options against each other and TRL's DistillationTrainer 1.16.

    pip install -e '.[bench]'
    python benchmarks/time_to_recover.py --out runs/time [--table speed|options|prompts|bootstrap] [--only NAME …]
        [--steps N] [--dtype bfloat16] [--device cuda] [--at-once N]

    speed      int3-g64 SmolLM2: remend with and without repair, and TRL. Both sides: 8 prompts a step, up to 48 tokens
               sampled at temperature 1, forward KL over the full vocabulary, the same prompts and held-out answers
    options    at equal steps: 2 updates from a round of sampling (with and without weights), short rollouts first, and
               what changes the cost of a step only: gradient checkpointing, micro-batches sorted by length or not, the
               size of a chunk of logits. What is no setting is set from outside, see Line.patch
    prompts    the bundled training prompts against as many that the reference wrote, at equal steps
    bootstrap  on-policy, off-policy first, or as the gate decides (auto), on int3-g64 and on 5 removed layers

The clock counts what a user waits for to get the weights: repair, gate, the teacher's completions, and every step. It
stands still while a model is loaded or measured. KL is measured every 5 steps on the reference's greedy answers to the
held-out prompts; a gap is closed at the first measurement that is low enough, nothing is interpolated.

TRL (trl_distillation.py) trains the student's weights freely, without gradient checkpointing (its faster setting) and
at a constant rate after a warm-up as long as remend's at that rate. Its end is measured as trained, and rounded onto
the student's grid again.

Every line is a process of its own; --at-once lets several run beside each other, which a GPU with cores enough bears
(the tables say how many). Results are kept in results.json; a line that is there is not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remend.files.atomic import new_directory, write_json
from remend.files.environment import environment
from remend.files.reading import read_object
from remend.files.run_directory import METRICS, REPAIR, SUMMARY, RunDirectory
from remend.models.find import find_model
from remend.models.load import load_model, load_tokenizer, save_model
from remend.recovery.judge import SIDE_BASELINE
from remend.studies.demo import write_prompts
from time_lines import DEGRADE, LINES, MODEL, TOKENS, Line
from time_tables import TABLES, show

SEED, EVERY, ROWS = 0, 5, 8
TRL_SIDE = Path(__file__).with_name("trl_distillation.py")
SELF_WRITTEN = 192


@dataclass(frozen=True)
class Terms:
    """What holds for every line of a call; `steps` None is each line's own number."""

    steps: int | None
    dtype: str
    device: str
    at_once: int


def remend(*words: str, patch: Mapping[str, str] | None = None) -> None:
    """Run the command line, with names of its modules set to other values. Stops the benchmark when it fails."""
    if not patch:
        subprocess.run([sys.executable, "-m", "remend", *words], check=True)
        return
    modules = "".join(f"import {name.rpartition('.')[0]}\n" for name in patch)
    changes = "".join(f"{name} = {value}\n" for name, value in patch.items())
    start = "from remend.cli import main\nmain()"
    subprocess.run([sys.executable, "-c", modules + changes + start, *words], check=True)


def prepare(out: Path, lines: Sequence[Line]) -> None:
    """Make what these lines need and is not there: prompts, the reference, students."""
    write_prompts(out)
    if not (out / "reference").is_dir():
        source = find_model(MODEL)
        model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
        with new_directory(out / "reference") as target:
            save_model(model, load_tokenizer(source), target)
    for name in dict.fromkeys(line.degradation for line in lines):
        if not (out / name / "degradation.json").is_file():
            remend("degrade", *DEGRADE[name], "--out", str(out / name), "--no-probe", "--seed", str(SEED))
    if any(line.data == "self.jsonl" for line in lines) and not (out / "self.jsonl").is_file():
        words = ("--n", str(SELF_WRITTEN), "--seed", str(SEED), "--device", "cpu")
        remend("prompts", MODEL, *words, "--out", str(out / "self.jsonl"))


def recipe_of(line: Line, out: Path, steps: int, terms: Terms) -> dict[str, Any]:
    """All settings of a remend line that are not defaults."""
    common: dict[str, Any] = {
        "student": str(out / line.degradation),
        "teacher": str(out / "reference"),
        "data": str(out / line.data),
        "eval_data": str(out / "held_out.jsonl"),
        "out": str(place_of(line, out)),
        "steps": steps,
        "updates_per_rollout": 1,
        "batch_size": ROWS,
        "max_new_tokens": TOKENS,
        "eval_every": min(EVERY, steps),
        "save_every": 0,
        "select": "last",
        "repair": False,
        "seed": SEED,
        "device": terms.device,
        "dtype": terms.dtype,
    }
    if line.recipe.get("bootstrap"):
        common["bootstrap_steps"] = -(-steps // 3)
    return {**common, **line.recipe}


def trl_words(line: Line, out: Path, steps: int, terms: Terms) -> list[str]:
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
        "dtype": terms.dtype,
        "device": terms.device,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def place_of(line: Line, out: Path) -> Path:
    """A line's run directory."""
    return out / "runs" / line.name.replace(",", "").replace(" ", "-")


def run_line(line: Line, out: Path, terms: Terms) -> dict[str, Any]:
    """Run a line from the start and read what its files say."""
    place, load, steps = place_of(line, out), os.getloadavg(), terms.steps or line.steps
    shutil.rmtree(place, ignore_errors=True)  # an interrupted run has no checkpoints, and its clock had a gap
    began = time.monotonic()
    if line.side == "remend":
        given = recipe_of(line, out, steps, terms)
        remend(
            "recover",
            *(f"{key}={json.dumps(v) if not isinstance(v, str) else v}" for key, v in given.items()),
            patch=line.patch,
        )
    else:
        subprocess.run([sys.executable, str(TRL_SIDE), *trl_words(line, out, steps, terms)], check=True)
    summary, around = read_object(place / SUMMARY), environment()
    about = {
        "steps": steps,
        "dtype": terms.dtype,
        "device": terms.device,
        "at_once": terms.at_once,
        "peak_rss_mib": summary.get("peak_rss_mib"),
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
        if row["step"] == 0 and "stage" in row:  # other rows tell of whole phases
            spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    if not spent:  # a run that did not time its stages
        before, pools = place / SIDE_BASELINE, list(place.glob("off-policy-*.jsonl"))
        if pools and before.is_file():
            spent["pool"] = max(0.0, max(p.stat().st_mtime for p in pools) - before.stat().st_mtime)
    if (place / REPAIR).is_file() and "repair" not in spent:
        spent["repair"] = read_object(place / REPAIR)["seconds"]
    return spent


def curve(place: Path) -> list[tuple[float, float]]:
    """(seconds, KL) at every measurement, in order; 0 seconds is the degraded student."""
    files, summary = RunDirectory(place), read_object(place / SUMMARY)
    before = setup(place)
    points = [(0.0, summary["degraded"]["kl"])]
    if "repair" in before:
        points.append((before["repair"], summary["repair"]["kl"]))
    at, clock = {0: sum(before.values())}, sum(before.values())
    for row in files.rows("timing.jsonl"):
        if row["step"]:
            clock += row["seconds"]
            at[row["step"]] = clock
    measured = [r for r in files.rows(METRICS) if "eval/kl" in r and r["step"] < summary["steps"]]
    points += [(at[row["step"]], row["eval/kl"]) for row in measured]
    return [*points, (clock, summary["recovered"]["kl"])]


def same_terms(results: Mapping[str, dict[str, Any]], lines: Sequence[Line], wanted: Terms, out: Path) -> None:
    """Raises SystemExit where a result that would be shown beside new ones was made otherwise."""
    for line in lines:
        made, steps = results.get(line.name), wanted.steps or line.steps
        asked = {"steps": steps, "dtype": wanted.dtype, "device": wanted.device}
        if made and (had := {"device": "cpu", **{k: made[k] for k in asked if k in made}}) != asked:
            raise SystemExit(f'{out} holds "{line.name}" of {had}; wanted is {asked}. Give another --out, or the same')


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time"))
    parser.add_argument("--table", choices=list(TABLES), action="append", help="by default all")
    parser.add_argument("--only", choices=[line.name for line in LINES], nargs="+", action="extend", metavar="NAME")
    parser.add_argument("--steps", type=int, help="instead of each line's own number")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="lines beside each other")
    options = parser.parse_args()
    terms, tables = Terms(options.steps, options.dtype, options.device, options.at_once), options.table or list(TABLES)
    lines = [n for n in LINES if set(n.tables) & set(tables) and (not options.only or n.name in options.only)]
    path = options.out / "results.json"
    results: dict[str, dict[str, Any]] = read_object(path) if path.is_file() else {}
    same_terms(results, lines, terms, options.out)
    waiting = [line for line in lines if line.name not in results]
    if waiting:
        prepare(options.out, waiting)
    with concurrent.futures.ThreadPoolExecutor(terms.at_once) as pool:
        begun = {pool.submit(run_line, line, options.out, terms): line for line in waiting}
        for done in concurrent.futures.as_completed(begun):
            results[begun[done].name] = done.result()
            write_json(path, results)
    show(results, tables)


if __name__ == "__main__":
    main()
