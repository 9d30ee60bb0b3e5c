"""How much memory do the verbs hold while a model's blocks stay on the disk? Models with random weights.

    python benchmarks/by_block.py --out DIR --size 1.5b [--layers 2] [--records FOLDER] [VERB …]
    python benchmarks/by_block.py --page

A model of the size is written shard by shard in bfloat16, and each verb (degrade, recover, diagnose, export; all of
them where none is named) runs in a process of its own with `placement: disk`. Every 10 ms the anonymous memory
(RssAnon + RssShmem of /proc/PID/status) of that process and its children is added up; files that are mapped don't
count. The imports do: the figure is all that the verb holds. Once a second the bytes that it has on the disk are
counted, temporary files and remend's cache among them.

A verb whose row lies in docs/measurements/records/scale/ is not run again, unless a later one wants its result and it
is not in DIR. One that was interrupted goes on where remend goes on; its row has the highest peak and the sum of the
seconds. --layers: a model of the size with so many layers, in place of its own number. --page writes the table in
docs/measurements/scale.md from the rows, and runs nothing; a test says when it is out of date. Weights are random:
nothing is said of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kept_rows import RECORDS, keep, kept, place, rows
from record import ROOT
from remend.files.atomic import write_json
from remend.files.run_directory import MANIFEST
from scale import LLAMA, prepare_prompts, write_model
from time_tables import markdown

ROWS = RECORDS / "scale"
PAGE = ROOT / "docs" / "measurements" / "scale.md"
BEGINS = "<!-- Written by `python benchmarks/by_block.py --page` from records/scale. Run that to change it. -->"
ENDS = "<!-- Written until here. -->"

QWEN: Mapping[str, str] = {"0.5b": "Qwen2.5-0.5B", "1.5b": "Qwen2.5-1.5B", "3b": "Qwen2.5-3B", "7b": "Qwen2.5-7B"}

VERBS: Mapping[str, tuple[str, ...]] = {
    "degrade": ("degrade quantize OUT/teacher --format int4-g64-sym --placement disk --out OUT/student",),
    "recover": (
        "recover student=OUT/student teacher=OUT/teacher data=OUT/prompts.jsonl out=OUT/run repair_samples=16 steps=0 "
        "held_out=4 max_new_tokens=8 placement=disk",
        "recover --resume OUT/run",
    ),
    "diagnose": (
        "diagnose --reference OUT/teacher --student OUT/student --data OUT/prompts.jsonl --rows 16 --placement disk "
        "--out OUT/diagnosis",
    ),
    "export": ("export OUT/run --format compressed-tensors --placement disk --out OUT/packed",),
}
"""What each runs; a second line goes on with what the first one began."""

RESULTS: Mapping[str, str] = {
    "degrade": "student/degradation.json",
    "recover": "run/summary.json",
    "diagnose": "diagnosis/diagnosis.json",
    "export": "packed/config.json",
}
"""What is there once a verb has ended well."""

NEEDS: Mapping[str, Sequence[str]] = {"recover": ["degrade"], "diagnose": ["degrade"], "export": ["degrade", "recover"]}

EVERY, DISK_EVERY = 0.01, 1.0
"""Seconds between two samples, of memory and of the disk."""

SEED = 0
"""Of every verb, which is remend's default."""


def tree(process: int) -> list[int]:
    """A process and those that it started, and so on."""
    found, at = [process], 0
    while at < len(found):
        try:
            for children in Path(f"/proc/{found[at]}/task").glob("*/children"):
                found += [int(child) for child in children.read_text(encoding="ascii").split()]
        except OSError:  # it has ended
            pass
        at += 1
    return found


def anonymous(process: int) -> int:
    """Bytes of a process that no file stands behind; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def on_disk(folder: Path) -> int:
    """Bytes that everything below a folder takes on the disk."""
    taken = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                taken += 512 * Path(base, name).lstat().st_blocks
            except OSError:  # it was temporary
                continue
    return taken


def measured(words: Sequence[str], folder: Path, notes: Path) -> dict[str, Any]:
    """Carry out a line of remend's, and what it held; added to what `notes` has of earlier, interrupted tries."""
    fresh = {"seconds": 0.0, "peak": 0, "disk": 0, "disk_before": on_disk(folder), "tries": 0}
    seen: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else fresh
    earlier, seen["tries"] = seen["seconds"], seen["tries"] + 1
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "REMEND_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        began, looked, family = time.monotonic(), 0.0, list[int]()
        command = [sys.executable, "-m", "remend", *words]
        running = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while running.poll() is None:
                now = time.monotonic()
                if now - looked >= DISK_EVERY:
                    looked, family = now, tree(running.pid)
                    seen["disk"] = max(seen["disk"], on_disk(folder) - seen["disk_before"])
                    seen["seconds"] = earlier + now - began
                    write_json(notes, seen)
                seen["peak"] = max(seen["peak"], sum(map(anonymous, family)))
                time.sleep(EVERY)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGTERM)
                running.wait()
    seen["seconds"] = earlier + time.monotonic() - began
    write_json(notes, seen)
    if running.returncode:
        text = (folder / "output.txt").read_text(encoding="utf-8")
        sys.exit(f"remend {' '.join(words)} ended with {running.returncode}:\n{text[-3000:]}")
    return seen


def carry_out(verb: str, folder: Path) -> dict[str, Any]:
    """Run a verb in its folder, or go on with it. A result that was never measured whole is made anew."""
    first, *again = VERBS[verb]
    notes, result = folder / f"{verb}.tries.json", folder / RESULTS[verb]
    if result.exists():
        shutil.rmtree(result.parent)
        notes.unlink(missing_ok=True)
    line = again[0] if again and (result.parent / MANIFEST).exists() else first
    seen = measured([word.replace("OUT", str(folder)) for word in line.split()], folder, notes)
    notes.unlink()
    written = on_disk(folder) - seen["disk_before"]
    mib = {"peak_mib": seen["peak"], "written_mib": written, "disk_peak_mib": max(seen["disk"], written)}
    row = {"verb": verb, "seconds": round(seen["seconds"], 1), "tries": seen["tries"]}
    return {**row, **{name: round(number / 2**20) for name, number in mib.items()}}


def run(size: str, layers: int | None, verbs: Sequence[str], out: Path, records: Path) -> None:
    """Every verb of a size that has no row yet, and those before it whose results are missing."""
    folder = (out / (size if layers is None else f"{size}-{layers}-layers")).absolute()
    settings = {
        verb: {"size": size, "layers": layers, "verb": verb, "seed": SEED, "commands": list(VERBS[verb])}
        for verb in verbs
    }
    files = {verb: place(records, folder.name, verb) for verb in VERBS}
    missing = [verb for verb in verbs if kept(files[verb], settings[verb]) is None]
    wanted = {*missing, *(need for verb in missing for need in NEEDS.get(verb, ()))}
    for verb in [verb for verb in VERBS if verb in wanted]:
        if (folder / RESULTS[verb]).exists() and verb not in missing:
            continue
        if not (folder / "teacher" / "config.json").exists():  # which is written last
            print(f"{folder.name}: writing the model", flush=True)
            write_model(QWEN.get(size, size), folder / "teacher", layers)
        prepare_prompts(folder / "prompts.jsonl")
        print(f"{folder.name}: {verb}", flush=True)
        row = carry_out(verb, folder)
        if verb in missing:
            config = json.loads((folder / "teacher" / "config.json").read_text(encoding="utf-8"))
            row |= {"size": size, "layers": config["num_hidden_layers"]}
            print(json.dumps(keep(files[verb], settings[verb], row)), flush=True)


def table(kept_rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    order = sorted(kept_rows, key=lambda row: (_number(row["size"]), row["layers"], list(VERBS).index(row["verb"])))
    columns = ("model", "layers", "verb", "peak, MiB", "seconds", "written, MiB", "most on the disk, MiB", "commit")
    lines = [
        [
            QWEN.get(row["size"], row["size"]),
            str(row["layers"]),
            f"`{row['verb']}`",
            f"{row['peak_mib']:,}",
            f"{row['seconds']:,.0f}" + ("" if row["tries"] == 1 else f" in {row['tries']} tries"),
            f"{row['written_mib']:,}",
            f"{row['disk_peak_mib']:,}",
            row["commit"],
        ]
        for row in order
    ]
    machines = sorted({f"{row['machine']}, {row['date']}" for row in order})
    return markdown(columns, lines) + "\n\nMeasured on: " + "; ".join(machines) + f". Seed {SEED}."


def _number(size: str) -> float:
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


def page(before: str, kept_rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with its table anew."""
    head, _, rest = before.partition(BEGINS)
    written = table(kept_rows) if kept_rows else "Not yet measured."
    return f"{head}{BEGINS}\n\n{written}\n\n{ENDS}{rest.partition(ENDS)[2]}"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where models and results lie")
    parser.add_argument("--size", choices=[*LLAMA, *QWEN])
    parser.add_argument("--layers", type=int, help="in place of the size's own number")
    parser.add_argument("--records", type=Path, default=ROWS, help="where rows are kept")
    parser.add_argument("--page", action="store_true", help="write the page's table, and run nothing")
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=", ".join(VERBS))
    args = parser.parse_args()
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows(args.records)), encoding="utf-8")
        return
    unknown = [verb for verb in args.verbs if verb not in VERBS]
    if unknown or args.out is None or args.size is None:
        parser.error(f"give --out, --size and verbs among {', '.join(VERBS)}")
    run(args.size, args.layers, args.verbs or list(VERBS), args.out, args.records)


if __name__ == "__main__":
    main()
