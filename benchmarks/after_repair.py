"""What is worth doing with a student after its repair? Ideas beside each other, for about the same seconds.

python benchmarks/after_repair.py --out runs/after [--only int3-g64 2:4] [--idea "all weights" scales] [--seconds 150]
python benchmarks/after_repair.py --page

Each format of FORMATS damages SmolLM2 once and is repaired once, with the defaults. Every idea then trains the
repaired student, without repairing it again; "twice the text" repairs the damaged one on twice the answers instead. An
idea gets as many steps as fit into --seconds, by the seconds of its own first steps. The table has each idea's seconds,
and the share of the repaired student's KL that it won, with a 95% interval paired over the held-out prompts.

Each row is kept as one JSON in docs/measurements/records/after-repair/; one that is there is not run again, and what
was interrupted is resumed. `--page` writes docs/measurements/after-repair.md from the rows that are kept, and runs
nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from kept_rows import RECORDS, keep, kept, place, rows
from record import ROOT
from remend.files.atomic import write_text
from remend.files.run_directory import MANIFEST, SUMMARY, RunDirectory
from remend.maths.gap import bootstrap_gap_closed
from remend.studies.demo import write_prompts

MODEL = "smollm2"
FORMATS = {
    "int3-g64": ("quantize", "--format", "int3-g64"),
    "int4-g32-sym": ("quantize", "--format", "int4-g32-sym"),
    "gguf:q4_0": ("quantize", "--format", "gguf:q4_0"),
    "nvfp4": ("quantize", "--format", "nvfp4"),
    "2:4": ("prune", "--method", "wanda", "--sparsity", "2:4"),
    "width": ("prune", "--method", "width", "--ffn", "0.25"),
}
RATES = {
    "int3-g64": "1e-4",
    "int4-g32-sym": "5e-5",
    "gguf:q4_0": "5e-5",
    "nvfp4": "5e-5",
    "2:4": "2e-4",
    "width": "1e-4",
}
"""What `all weights` is trained with: the defaults after a repair."""

IDEAS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "scales, 1e-3": ("train=scales", "learning_rate=1e-3"),
    "scales, 3e-4": ("train=scales", "learning_rate=3e-4"),
    "norms, 1e-3": ("train=norms", "learning_rate=1e-3"),
    "norms, 3e-3": ("train=norms", "learning_rate=3e-3"),
    "half off-policy": ("policy=0.5",),
    "half off-policy, twice the rate": ("policy=0.5", "learning_rate=2x"),
    "32 rows a step": ("batch_size=8", "prompts_per_step=32"),
    "32 rows a step, twice the rate": ("batch_size=8", "prompts_per_step=32", "learning_rate=2x"),
}
"""Words of the recipe over those that all share. 2x is twice the format's rate."""

ANSWERS = {"int4-g32-sym": 400, "gguf:q4_0": 400, "nvfp4": 400}
"""That repair is fitted to by default; 600 where no number stands here."""

TWICE = "twice the text"
TABLE = ("| format | idea | steps | seconds | repaired | KL after | won over repair (95%) |", "|" + " --- |" * 7)

PAGE = ROOT / "docs" / "measurements" / "after-repair.md"

HEAD = """# What is worth doing after a repair?

<!-- Written by `python benchmarks/after_repair.py --page` from records/after-repair. Run that to change it. -->

SmolLM2, damaged and repaired with the defaults; then each idea trains the repaired student for about the same seconds.
KL is that of the held-out prompts. "Won" is the share of the repaired student's KL that the idea took away, with a 95%
interval paired over the held-out prompts. Hardware, seed 0 and commit stand in each row's record.

"""

TRIED = 4
"""Steps by which an idea's pace is told; the first round of sampling is left out."""


def remend(*words: str) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True)


def recover(out: Path, *words: str) -> dict[str, Any]:
    """Run a recovery, or go on with it; its summary."""
    if not (out / SUMMARY).is_file():
        remend("recover", *(["--resume", str(out)] if (out / MANIFEST).is_file() else [*words, f"out={out}"]))
    return dict(json.loads((out / SUMMARY).read_text(encoding="utf-8")))


def prepared(folder: Path, name: str, text: int) -> tuple[list[str], dict[str, Any]]:
    """The words that name models and prompts, and the summary of the repair alone."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = write_prompts(folder)
    if not (folder / "student" / "degradation.json").is_file():
        verb, *rest = FORMATS[name]
        remend("degrade", verb, MODEL, *rest, "--no-probe", "--out", str(folder / "student"))
    common = [f"teacher={MODEL}", f"data={train}", f"eval_data={held_out}"]
    summary = recover(
        folder / "repaired", *common, f"student={folder / 'student'}", "steps=0", f"repair_samples={text}"
    )
    return common, summary


def words_of(name: str, idea: str, common: list[str]) -> list[str]:
    """An idea's recipe."""
    own = [f"learning_rate={2 * float(RATES[name]):g}" if w == "learning_rate=2x" else w for w in IDEAS[idea]]
    if not any(word.startswith("learning_rate") for word in own):
        own.append(f"learning_rate={RATES[name]}")
    if "policy=0.5" not in own:
        return [*common, *own]
    # the share of the student's own answers is a stream's key
    data, held_out = (next(w.partition("=")[2] for w in common if w.startswith(key)) for key in ("data=", "eval_data="))
    stream = f"streams={{recover: {{teacher: {MODEL}, data: {data}, eval_data: {held_out}, policy: 0.5}}}}"
    return [stream, *(word for word in own if word != "policy=0.5")]


def run(name: str, idea: str, given: Any) -> dict[str, Any]:
    """One row, for a format and an idea."""
    folder = given.out / name.replace(":", "-")
    answers = given.answers or ANSWERS.get(name, 600)
    common, repaired = prepared(folder, name, answers)
    place = folder / idea.replace(" ", "-").replace(",", "")
    if idea == TWICE:
        words = [*common, f"student={folder / 'student'}", "steps=0", f"repair_samples={2 * answers}"]
        summary = recover(place / "run", *words)
        spent = summary["repair"]["seconds"] - repaired["repair"]["seconds"]
    else:
        words = [*words_of(name, idea, common), f"student={folder / 'repaired' / 'model'}", "repair=false"]
        first = place / "first-steps"
        if not (first / SUMMARY).is_file():
            shutil.rmtree(first, ignore_errors=True)
            recover(first, *words, f"steps={TRIED}", "save_every=0")
        pace = statistics.mean(list(RunDirectory(first).step_seconds().values())[2:])
        summary = recover(place / "run", *words, f"steps={max(2, round(given.seconds / pace))}")
        spent = summary["training_seconds"]
    sums = [_sums(folder / "repaired"), _sums(place / "run")]
    ids = [prompt for prompt in sums[0] if prompt in sums[1]]
    before, after = ([some[prompt] for prompt in ids] for some in sums)
    return {
        "format": name,
        "idea": idea,
        "repaired": repaired["recovered"]["kl"],
        "kl": summary["recovered"]["kl"],
        "steps": summary["steps"],
        "seconds": spent,
        "won": 1 - sum(after) / sum(before),
        "won_95": bootstrap_gap_closed(before, after, seed=0),
        "peak_rss_mib": summary["peak_rss_mib"],
    }


def _sums(run: Path) -> dict[str, float]:
    """KL of the recovered model by held-out prompt."""
    return {row["id"]: row["kl_sum_recovered"] for row in RunDirectory(run).rows("held_out.jsonl")}


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    low, high = row["won_95"]
    numbers = f"{row['repaired']:.3f} | {row['kl']:.3f} | {row['won']:.1%} ({low:.1%} to {high:.1%})"
    return f"| {row['format']} | {row['idea']} | {row['steps']} | {row['seconds']:.0f} | {numbers} |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="for students and runs")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--only", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--idea", nargs="*", default=[*IDEAS, TWICE], choices=[*IDEAS, TWICE])
    parser.add_argument("--seconds", type=float, default=150, help="of training, for each idea")
    parser.add_argument(
        "--answers", type=int, help="that repair is fitted to; by default as many as a recipe's default"
    )
    parser.add_argument("--records", type=Path, default=RECORDS / "after-repair", help="where rows are kept")
    given = parser.parse_args()
    if given.page:
        write_text(PAGE, page(given.records))
        return
    if not given.out:
        parser.error("--out is where students and runs go")
    print("\n".join(TABLE), flush=True)
    settings = {"seconds": given.seconds, "answers": given.answers}
    for name in given.only:
        for idea in given.idea:
            if idea.startswith("scales") and name in ("nvfp4", "2:4", "width"):
                continue  # no grid, or one whose scales have few values
            file = place(given.records, name, idea)
            print(line(kept(file, settings) or keep(file, settings, run(name, idea, given))), flush=True)


def page(records: Path) -> str:
    """docs/measurements/after-repair.md, of the rows that are kept."""
    found = rows(records)
    made = sorted({f"{row['machine']}, {row['date']}, commit {row['commit']}" for row in found})
    lines = [*TABLE, *(line(row) for row in sorted(found, key=lambda row: (row["format"], row["idea"])))]
    return HEAD + "\n".join(lines) + f"\n\nMade on: {'; '.join(made) or 'nothing was run yet'}.\n"


if __name__ == "__main__":
    main()
