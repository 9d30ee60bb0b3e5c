"""Degrade, recover and export SmolLM2 in the ways users meet; print the table of docs/measurements/degradations.md.

python benchmarks/degradations.py --out runs/degradations [--only "int3-g64 rtn"] [--steps N] [--alone] [--repair-alone]
    [--set bootstrap=repair …]

Every row runs the commands `remend degrade`, `remend recover` and `remend export`, each as a process of
its own, with the defaults. Results are appended to results.json with steps, settings and commit; a row that is there
with these steps is not run again, and a recovery that was interrupted is resumed. For rows that are done,

--alone         recovers without repair, with so many more steps that training takes as long as both did (alone.json;
                the rows of ALONE);
--repair-alone  repairs without training, on so many more answers that repair takes as long as both did
                (repair_alone.json; every row that has a repair).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remend.files.atomic import write_json
from remend.files.run_directory import MANIFEST, SUMMARY, RunDirectory
from remend.maths.gap import bootstrap_gap_closed
from remend.recovery.settings import RecoverConfig
from remend.studies.demo import write_prompts

MODEL = "smollm2"
TOOLS = "TOOLS"
"""In a row's arguments: the path of --tools, the tool-use rows of arXiv 2601.19897 or others with the same columns."""

TOOL_ROWS = 2000
"""Rows of the task tooluse-short where no other file is named."""

FORGETTING = ("--max-tokens", "512", "--epochs", "1.5", "--learning-rate", "5e-4")


@dataclass(frozen=True)
class Row:
    """One degradation: arguments of `remend degrade`, and the container that it is exported to."""

    name: str
    degrade: tuple[str, ...]
    container: str = "dense"


ROWS = (
    Row("int4-g32-sym rtn", ("quantize", MODEL, "--format", "int4-g32-sym"), "compressed-tensors"),
    Row("int3-g64 rtn", ("quantize", MODEL, "--format", "int3-g64")),
    Row("gguf:q4_0", ("quantize", MODEL, "--format", "gguf:q4_0"), "gguf:q4_0"),
    Row("nvfp4", ("quantize", MODEL, "--format", "nvfp4"), "compressed-tensors"),
    Row("magnitude 50%", ("prune", MODEL, "--method", "magnitude", "--sparsity", "0.5")),
    Row("wanda 2:4", ("prune", MODEL, "--method", "wanda", "--sparsity", "2:4")),
    Row("depth -5", ("prune", MODEL, "--method", "depth", "--layers", "23,24,25,26,27")),
    Row("ffn width -25%", ("prune", MODEL, "--method", "width", "--ffn", "0.25")),
    Row("tool-use SFT", ("finetune", MODEL, "--data", TOOLS, *FORGETTING)),
)


ALONE = ("int3-g64 rtn", "wanda 2:4", "depth -5")
"""Of --alone: one of each kind of constraint: a grid, a mask, fewer layers."""


def remend(*words: str) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True)


def tools_file(given: Path | None, out: Path) -> str:
    """The rows that the tool-use SFT trains on: a given file, else rows that remend writes itself."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"--tools {given} is no file; leave it out to train on remend's own task tooluse-short")
        return str(given)
    written = out / "tooluse-short.jsonl"
    if not written.is_file():
        print(
            f"no --tools: the tool-use row trains on {TOOL_ROWS} rows of remend tasks write tooluse-short", flush=True
        )
        out.mkdir(parents=True, exist_ok=True)
        remend("tasks", "write", "tooluse-short", "--n", str(TOOL_ROWS), "--out", str(written))
    return str(written)


def run_row(row: Row, folder: Path, steps: int | None, tools: Path | None, more: Sequence[str]) -> dict[str, Any]:
    """All three commands, and what their files say. What was made with another number of steps is made again."""
    begun = folder / "recovered" / MANIFEST
    if begun.is_file() and not made_with(json.loads(begun.read_text())["recipe"]["steps"], steps):
        for old in ("recovered", "exported", "alone", "repair_alone"):
            shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = write_prompts(folder)
    student, recovered, exported = folder / "student", folder / "recovered", folder / "exported"
    if not (student / "degradation.json").is_file():
        words = [tools_file(tools, folder.parent) if word == TOOLS else word for word in row.degrade]
        remend("degrade", *words, "--out", str(student))
    if (recovered / "manifest.json").is_file():
        remend("recover", "--resume", str(recovered))
    else:
        words = [f"student={student}", f"teacher={MODEL}", f"data={train}", f"eval_data={held_out}", f"out={recovered}"]
        remend("recover", *words, *([f"steps={steps}"] if steps is not None else []), *more)
    if not exported.exists():
        remend("export", str(recovered), "--format", row.container, "--out", str(exported))
    summary, damage, check = (
        json.loads(path.read_text())
        for path in (recovered / "summary.json", student / "degradation.json", exported / "export.json")
    )
    repair, manifest = summary["repair"], json.loads((recovered / MANIFEST).read_text())
    return {
        "row": row.name,
        "probe_kl": damage["probe"]["kl"],
        "bits_per_weight": damage["bits_per_weight"],
        "degraded_kl": summary["degraded"]["kl"],
        "repaired_kl": repair["kl"] if repair else None,
        "recovered_kl": summary["recovered"]["kl"],
        "gap_closed": summary["gap_closed"]["kl"],
        "gap_closed_95": summary["gap_closed_kl_95"],
        "below_repair_95": below_repair(recovered) if repair else None,
        "constraint": summary["constraint"],
        "steps": summary["steps"],
        "settings": {"degrade": list(row.degrade), "recover": manifest["recipe"]},
        "commit": manifest["git_commit"],
        "hardware": manifest["hardware"],
        "seconds": summary["seconds"],
        "repair_seconds": repair["seconds"] if repair else 0,
        "container": row.container,
        "held": held(student, exported, row.container),
        "weights_equal": check["check"]["weights_equal"],
        "max_logit_difference": check["check"]["max_logit_difference"],
    }


def made_with(steps: int, wanted: int | None) -> bool:
    """Whether a recovery of so many steps is the one that is asked for; None asks for the default."""
    return steps == (RecoverConfig.model_fields["steps"].default if wanted is None else wanted)


def held(student: Path, exported: Path, container: str) -> str:
    """What the student was held to, read off the exported artifact: raises SystemExit where it is lost."""
    from remend.compression.grids import decode, encode
    from remend.compression.recognise import recognise
    from remend.compression.stored_grid import StoredGrid
    from remend.models.find import find_model
    from remend.models.layers import kept_weights
    from remend.models.load import load_model

    file = next(exported.glob("*.gguf"), exported) if container.startswith("gguf") else exported
    before, after = (
        load_model(find_model(str(p)), dtype=torch.float32, device=torch.device("cpu")) for p in (student, file)
    )
    grid, weights = StoredGrid.read(student), dict(after.named_parameters())
    if grid is not None:
        for name, (_, scales) in grid.matrices.items():
            snapped = decode(encode(weights[name], scales, grid.format), scales, grid.format)
            if not torch.equal(snapped, weights[name]):
                raise SystemExit(f"{name} of {exported} is off the student's grid")
        return f"{len(grid.matrices)} matrices on {grid.format.name}"
    mask = kept_weights(before) if recognise(str(student)).mask else {}  # a dense model may hold a zero by chance
    for name, kept_OI in mask.items():
        if bool((weights[name][~kept_OI] != 0).any()):
            raise SystemExit(f"{name} of {exported} has weights where the student has zeros")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (before, after)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{exported} has other shapes than the student")
    masked = len(mask)
    return f"zeros of {masked} matrices" if masked else f"{after.config.num_hidden_layers} layers, same shapes"


def below_repair(recovered: Path) -> list[float]:
    """Share of repair's KL that training won on top: 95% interval, paired over the held-out prompts."""
    rows = [[json.loads(line) for line in (recovered / f"{n}.jsonl").open()] for n in ("held_out_repaired", "held_out")]
    before, after = [r["kl_sum"] for r in rows[0]], [r["kl_sum_recovered"] for r in rows[1]]
    return list(bootstrap_gap_closed(before, after, seed=0) or ())


def run_alone(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """SDFT without repair for as long as `result`, a row of results.json, took for both.

    Its steps are counted by the seconds of a step of both; after `--set bootstrap=repair` these are shorter than its
    own on-policy ones, so it gets more time.
    """
    timing = list(RunDirectory(folder / "recovered").step_seconds().values())
    steps = math.ceil((sum(timing) + result["repair_seconds"]) / (sum(timing) / len(timing)))
    alone = folder / "alone"
    if not (alone / "summary.json").is_file():
        train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        words = [f"student={folder / 'student'}", f"teacher={MODEL}", f"data={train}", f"eval_data={held_out}"]
        resumed = ["--resume", str(alone)] if (alone / "manifest.json").is_file() else []
        remend("recover", *(resumed or [*words, f"out={alone}", f"steps={steps}", "repair=false"]))
    summary = json.loads((alone / "summary.json").read_text())
    rows = [[json.loads(line) for line in (folder / d / "held_out.jsonl").open()] for d in ("alone", "recovered")]
    sums = [[r["kl_sum_recovered"] for r in part] for part in rows]
    return {
        "row": result["row"],
        "steps": summary["steps"],
        "kl": summary["recovered"]["kl"],
        "training_seconds": summary["training_seconds"],
        "both_kl": result["recovered_kl"],
        "both_seconds": sum(timing) + result["repair_seconds"],
        "repaired_kl": result["repaired_kl"],
        "repair_seconds": result["repair_seconds"],
        "both_below_alone_95": list(bootstrap_gap_closed(*sums, seed=0) or ()),
    }


def run_repair_alone(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Repair without training, on so many answers that it takes about as long as `result` took for both.

    Its seconds are taken to grow with the answers; those that it took are reported beside.
    """
    both = sum(RunDirectory(folder / "recovered").step_seconds().values()) + result["repair_seconds"]
    usual = summary_samples(folder / "recovered")
    samples = round(usual * both / result["repair_seconds"])
    alone = folder / "repair_alone"
    if not (alone / SUMMARY).is_file():
        shutil.rmtree(alone, ignore_errors=True)  # without steps there is no checkpoint to go on from
        words = [f"student={folder / 'student'}", f"teacher={MODEL}", f"data={folder / 'train.jsonl'}"]
        words += [f"eval_data={folder / 'held_out.jsonl'}", f"out={alone}", "steps=0", f"repair_samples={samples}"]
        remend("recover", *words)
    summary = json.loads((alone / SUMMARY).read_text())
    rows = [
        [json.loads(line) for line in (folder / d / "held_out.jsonl").open()] for d in ("repair_alone", "recovered")
    ]
    sums = [[r["kl_sum_recovered"] for r in part] for part in rows]
    return {
        "row": result["row"],
        "repair_samples": summary_samples(alone),
        "kl": summary["recovered"]["kl"],
        "repair_seconds": summary["repair"]["seconds"],
        "both_kl": result["recovered_kl"],
        "both_seconds": both,
        "both_below_repair_alone_95": list(bootstrap_gap_closed(*sums, seed=0) or ()),
    }


def summary_samples(recovered: Path) -> int:
    """How many answers a run's repair was asked to be fitted to."""
    return int(json.loads((recovered / MANIFEST).read_text())["repair_answers"])


def repair_alone_table(results: list[dict[str, Any]]) -> str:
    """The page's third table."""
    heads = ("degradation", "repair alone (answers, s)", "both (s)", "both below repair alone (95%)")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for r in results:
        low, high = r["both_below_repair_alone_95"]
        cells = (
            r["row"],
            f"{r['kl']:.3f} ({r['repair_samples']}, {r['repair_seconds']:.0f})",
            f"{r['both_kl']:.3f} ({r['both_seconds']:.0f})",
            f"{low:.2f} to {high:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alone_table(results: list[dict[str, Any]]) -> str:
    """The page's second table."""
    heads = ("degradation", "repair alone (s)", "SDFT alone (steps, s)", "both (s)", "both below SDFT alone (95%)")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for r in results:
        low, high = r["both_below_alone_95"]
        cells = (
            r["row"],
            f"{r['repaired_kl']:.3f} ({r['repair_seconds']:.0f})",
            f"{r['kl']:.3f} ({r['steps']}, {r['training_seconds']:.0f})",
            f"{r['both_kl']:.3f} ({r['both_seconds']:.0f})",
            f"{low:.2f} to {high:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    """The page's table."""
    heads = ("degradation", "degraded KL", "after repair", "repair + SDFT", "gap closed (95%)", "over repair (95%)")
    lines = ["| " + " | ".join((*heads, "recover, s", "export", "held, bit for bit")) + " |", "| --- " * 9 + "|"]
    for r in results:
        repaired = "–" if r["repaired_kl"] is None else f"{r['repaired_kl']:.3f}"
        low, high = r["gap_closed_95"]
        over = "–" if r["below_repair_95"] is None else "{:.1%} to {:.1%}".format(*r["below_repair_95"])
        same = "equal" if r["weights_equal"] and r["max_logit_difference"] == 0 else "DIFFERS"
        gap = f"{r['gap_closed']:.2f} ({low:.2f} to {high:.2f})"
        cells = (r["row"], f"{r['degraded_kl']:.3f}", repaired, f"{r['recovered_kl']:.3f}", gap, over)
        lines.append("| " + " | ".join((*cells, f"{r['seconds']:.0f}", f"{r['container']}, {same}", r["held"])) + " |")
    return "\n".join(lines)


def compare_all(
    kind: str,
    runs: Callable[[dict[str, Any], Path], dict[str, Any]],
    shown: Callable[[list[dict[str, Any]]], str],
    rows: list[dict[str, Any]],
    out: Path,
) -> None:
    """Run one of the comparisons at equal time for these rows, write each to its file, and print the table."""
    path = out / f"{kind}.json"
    found = {r["row"]: r for r in (json.loads(path.read_text()) if path.is_file() else [])}
    for row in rows:
        found[row["row"]] = runs(row, folder_of(out, row["row"]))
        write_json(path, list(found.values()))
    print(shown(list(found.values())), flush=True)


def folder_of(out: Path, name: str) -> Path:
    """A row's directory."""
    return out / name.replace(" ", "-").replace(":", "-").replace("%", "")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/degradations"))
    parser.add_argument("--only", choices=[row.name for row in ROWS], nargs="+", action="extend")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the default")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of remend recover; give its own --out"
    )
    parser.add_argument("--alone", action="store_true", help="the second table, for rows that are done")
    parser.add_argument("--repair-alone", action="store_true", help="the third table, for rows that are done")
    parser.add_argument("--tools", type=Path, help="rows of the tool-use SFT; by default remend writes tooluse-short")
    arguments = parser.parse_args()
    path = arguments.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else []
    for row in ROWS:
        done = any(r["row"] == row.name and made_with(r["steps"], arguments.steps) for r in results)
        if (arguments.only and row.name not in arguments.only) or done:
            continue
        fresh = run_row(row, folder_of(arguments.out, row.name), arguments.steps, arguments.tools, arguments.set)
        results = [r for r in results if r["row"] != row.name] + [fresh]
        write_json(path, results)
        print(table(results), flush=True)
    print(table(results))
    wanted = [r for r in results if r["repaired_kl"] is not None and r["row"] in (arguments.only or {r["row"]})]
    if arguments.alone:
        compare_all("alone", run_alone, alone_table, [r for r in wanted if r["row"] in ALONE], arguments.out)
    if arguments.repair_alone:
        compare_all("repair_alone", run_repair_alone, repair_alone_table, wanted, arguments.out)


if __name__ == "__main__":
    main()
