"""What repair and training win back on small trained models of other architectures than Llama.

python benchmarks/architectures.py --out runs/architectures [--only gemma3 olmo2] [--damage depth] [--steps auto]
python benchmarks/architectures.py --page

Each model of `remend.studies.tiny_model` is made once (minutes), damaged in each way of DAMAGES, and recovered. The
table has the held-out KL degraded, repaired and recovered, and the shares of it that repair and both won back, with 95%
intervals over the held-out prompts. Each cell is kept as one JSON in docs/measurements/records/architectures/, and is
not run again when it is there. The table ends with what is asked of the whole: no cell worse after repair than before
it by more than its interval, and the median share that was won back. `--page` writes docs/measurements/architectures.md
from the cells that are kept, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import remend
from kept_rows import RECORDS, keep, kept, place, rows
from record import ROOT
from remend.files.atomic import write_text
from remend.maths.gap import bootstrap_gap_closed
from remend.studies import tiny_model

DAMAGES: dict[str, Callable[..., Any]] = {
    "int3-g64": partial(remend.quantize, format="int3-g64"),
    "int4-g32-sym": partial(remend.quantize, format="int4-g32-sym"),
    "2:4": partial(remend.prune, method="magnitude", sparsity="2:4"),
    "depth": partial(remend.prune, method="depth", layers=2),
    "width": partial(remend.prune, method="width", ffn=0.25),
}
"""The last two take a quarter of the layers, and of the feed-forward width."""

GRIDS = ("int3-g64", "int4-g32-sym")


COLUMNS = (
    *("architecture", "damage", "degraded", "repaired", "recovered"),
    *("won by repair (95%)", "gap closed (95%)", "blocks held back"),
)


PAGE = ROOT / "docs" / "measurements" / "architectures.md"

HEAD = """# Does recovery help architectures that nobody tuned it for?

<!-- Written by `python benchmarks/architectures.py --page` from records/architectures. Run that to change it. -->

Small models of other architectures than Llama, 2 to 5 million parameters, trained here for minutes until they speak a
little (`remend.studies.tiny_model`), damaged in five ways and recovered with a healthy teacher, by the defaults of a
recipe (`steps: auto`). KL is that of the held-out prompts.
The commands are in benchmarks/architectures.py; hardware, seed 0 and commit stand in each cell's record.

"""


def cell(architecture: str, damage: str, made: dict[str, str], out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Damage, recover, and what the run's files say."""
    folder = out / architecture / damage.replace(":", "-")
    student, run = folder / "student", folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    if not student.exists():
        DAMAGES[damage](made["model"], student, data=made["train"]) if damage not in GRIDS else DAMAGES[damage](
            made["model"], student
        )
    data = {"data": made["train"], "eval_data": made["held_out"]}
    summary = remend.recover(student=student, teacher=made["model"], out=run, **data, **recipe).summary
    rows = [_rows(run / f"{name}.jsonl") for name in ("held_out", "held_out_repaired")]
    before = [row["kl_sum_degraded"] for row in rows[0]]
    return {
        "architecture": architecture,
        "damage": damage,
        "degraded": summary["degraded"]["kl"],
        "repaired": summary["repair"]["kl"],
        "kept": summary["repair"]["kept"],
        "held_back": summary["repair"]["held_back"],
        "unexplained": summary["repair"]["unexplained"],
        "recovered": summary["recovered"]["kl"],
        "won_by_repair": bootstrap_gap_closed(before, [row["kl_sum"] for row in rows[1]], seed=0),
        "gap_closed": summary["gap_closed"] and summary["gap_closed"]["kl"],
        "gap_closed_95": summary["gap_closed_kl_95"],
        "seconds": summary["seconds"],
    }


def _share(share: float, span: list[float]) -> str:
    return f"{share:.2f} ({span[0]:.2f} to {span[1]:.2f})"


def _steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(cells: list[dict[str, Any]]) -> str:
    """Of the cells, with what is asked of the whole."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for c in cells:
        won = _share(1 - c["repaired"] / c["degraded"], c["won_by_repair"])
        closed = "no gap to close" if c["gap_closed"] is None else _share(c["gap_closed"], c["gap_closed_95"])
        repaired = f"{c['repaired']:.4f}" + ("" if c["kept"] else " (undone)")
        numbers = f"{c['degraded']:.4f} | {repaired} | {c['recovered']:.4f}"
        held_back = ", ".join(map(str, c["held_back"])) or "–"
        lines.append(f"| {c['architecture']} | {c['damage']} | {numbers} | {won} | {closed} | {held_back} |")
    worse = [f"{c['architecture']} {c['damage']}" for c in cells if c["won_by_repair"][1] < 0]
    lines += ["", f"Worse after repair than before, by more than the interval: {', '.join(worse) or 'none'}."]
    for name, some in (("grids", GRIDS), ("the rest", tuple(d for d in DAMAGES if d not in GRIDS))):
        shares = [c["gap_closed"] for c in cells if c["damage"] in some and c["gap_closed"] is not None]
        if shares:
            lines.append(f"Median gap closed on {name}: {statistics.median(shares):.2f} ({len(shares)} cells).")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="for models and runs")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--only", nargs="*", default=[name for name in tiny_model.SHAPES if name != tiny_model.LLAMA])
    parser.add_argument("--damage", nargs="*", default=list(DAMAGES), choices=list(DAMAGES))
    parser.add_argument("--steps", type=_steps, default="auto", help="a number, or auto as in a recipe")
    parser.add_argument("--answers", type=int, default=300, help="that repair is fitted to")
    parser.add_argument("--records", type=Path, default=RECORDS / "architectures", help="where cells are kept")
    given = parser.parse_args()
    if given.page:
        write_text(PAGE, page(given.records))
        return
    if not given.out:
        parser.error("--out is where models and runs go")
    settings = {"steps": given.steps, "repair_samples": given.answers}
    cells = []
    for architecture in given.only:
        for damage in given.damage:
            file = place(given.records, architecture, damage)
            found = kept(file, settings)
            if not found:
                made = tiny_model.make(given.out / "models" / architecture, architecture=architecture)
                found = keep(file, settings, cell(architecture, damage, made, given.out, settings))
            cells.append(found)
            print(table(cells[-1:]).splitlines()[2], flush=True)
    print(table(cells))


def page(records: Path) -> str:
    """docs/measurements/architectures.md, of the cells that are kept."""
    cells = rows(records)
    made = sorted({f"{c['machine']}, {c['date']}, commit {c['commit']}" for c in cells})
    return f"{HEAD}{table(cells)}\n\nMade on: {'; '.join(made) or 'nothing was run yet'}.\n"


if __name__ == "__main__":
    main()
