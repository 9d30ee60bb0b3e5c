"""Every verb on every model of the zoo, and a table of what worked, was refused, broke, or was silently wrong.

    python tests/campaign/table.py --out DIR                      (make zoo)
    python tests/campaign/table.py mixtral gpt-oss --cells rtn,gptq --out DIR

Each model runs in a process of its own, and in it each command and each check in another: what crashes or hangs is a
mark in the table and no end. Broken off and called again, it goes on with the models that are missing. DIR gets
table.json, table.md, and a file for each model. The exit code is 1 where a cell broke or was silently wrong, or is
refused though it worked at the commit of before.json.

The remend that is tried is the one that Python finds, so PYTHONPATH chooses another commit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.update({**QUIET, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from campaign.cells import CELLS, NEEDS, Job, Place, write_data  # noqa: E402
from campaign.zoo import MODELS, make  # noqa: E402
from helpers import strangers  # noqa: E402
from record import machine  # noqa: E402

Row = dict[str, dict[str, Any]]
"""Of one model: for each cell its mark, its seconds, and what each of its commands came to."""

BEFORE = HERE / "before.json"
OF_RTN = ("dense", "c-t", "gguf")
"""Cells that export the student of rtn."""

PAGE = ROOT / "docs" / "measurements" / "zoo.md"
LONGEST = 240
"""Characters of a reason in the table; table.json has all of it."""
LIMIT = 120
"""Seconds of one command or check, unless another limit is given."""
ALONE = multiprocessing.get_context("fork")

WORSE = ("S", "X", "r!", "r", "ok")
"""Marks of one command, the worst first; the worst is the cell's."""
MEANING = {
    "ok": "works, and was checked with transformers alone",
    "r": "refused, with a reason",
    "r!": "refused, with a reason that speaks of the insides",
    "X": "broke: a traceback, a crash, or no end",
    "S": "silently wrong: it says that it went well, and the check says otherwise",
    "-": "nothing to try, since no student for it could be made",
}
INSIDES = re.compile(r"above report|state_dict|Missing key|size mismatch|skip  leaves|CONVERSION")
"""What a reason must not say: words of other libraries about what a user never wrote."""

CLASS = re.compile(r"\b[A-Z]\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel)\b|\b(a|an) \w+(?= model\b)")
"""How a reason names the model that it is about."""


# one command ---------------------------------------------------------------------------------------------------------


def apart(work: Callable[[], list[str]], seconds: float, log: Path) -> list[str]:
    """What `work` returns (a mark and a text), done in a fork, whose output goes to the log."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    process = ALONE.Process(target=_in_fork, args=(work, log, answer))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return ["X", f"no end after {seconds:.0f} s"]
    if not answer.is_file():
        return ["X", f"the process died with {process.exitcode}"]
    mark, text = json.loads(answer.read_text(encoding="utf-8"))
    return [mark, text]


def _in_fork(work: Callable[[], list[str]], log: Path, answer: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    result = work()
    sys.stdout.flush()
    sys.stderr.flush()
    answer.write_text(json.dumps(result), encoding="utf-8")


def call(words: Sequence[object], log: Path) -> list[str]:
    """One call of the command line, in this process: the mark, and the reason where it did not go well."""
    from remend.cli import main

    with contextlib.suppress(ImportError):  # of code that has no strangers yet
        from remend.exporting import check

        check.ask_stranger = strangers.ask
    sys.argv = ["remend", *map(str, words)]
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        traceback.print_exc()
        steps = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(s.filename).name}:{s.lineno}" for s in steps if "/remend/" in s.filename]
        return ["X", f"{type(error).__name__}: {str(error)[:300]} at {' > '.join(ours[-4:])}"]
    if not code:
        return ["ok", ""]
    sys.stderr.flush()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reason = "\n".join(line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    if code != 2 or not reason:  # a wrong option of this program, say
        return ["X", f"ended with {code}: {' '.join(lines[-5:])[:300]}"]
    return ["r!" if INSIDES.search(reason) else "r", reason]


def judge(check: Callable[[], str]) -> list[str]:
    """A check of what was written: silently wrong where it finds a fault, or can't read what it needs."""
    try:
        fault = check()
    except Exception as error:
        traceback.print_exc()
        fault = f"{type(error).__name__}: {str(error)[:300]}"
    return ["S", fault] if fault else ["ok", ""]


def do(job: Job, logs: Path, limit: float) -> list[str]:
    """A command and its check, each in a process of its own, since nothing of the first may help the second."""
    log = logs / f"{re.sub(r'[^a-z0-9]+', '-', job.name)}-{len([*logs.iterdir()])}"
    mark, text = apart(lambda: call(job.words, log.with_suffix(".log")), limit, log.with_suffix(".log"))
    if mark != "ok":
        return [mark, text]
    return apart(lambda: judge(job.check), limit, log.with_suffix(".check"))


# one model -----------------------------------------------------------------------------------------------------------


def try_model(name: str, cells: Sequence[str], out: Path, limit: float, keep: bool) -> None:
    """All cells of one model → OUT/NAME.json."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    zoo, work = out / "zoo" / name, out / "work" / name
    for directory in (zoo, work):
        shutil.rmtree(directory, ignore_errors=True)
    (work / "logs").mkdir(parents=True)
    make(name, zoo)
    place = Place(zoo, work, out / "prompts.jsonl", out / "pairs.jsonl")
    row: Row = {}
    for cell in cells:
        began = time.monotonic()
        jobs = {job.name: do(job, work / "logs", limit) for job in CELLS[cell](place)}
        marks = {mark for mark, _ in jobs.values()}
        worst = next((mark for mark in WORSE if mark in marks), "-")
        mark = f"{worst}/ok" if worst != "ok" and "ok" in marks else worst
        texts = {job: [mark, _plain(text, out)] for job, (mark, text) in jobs.items()}
        row[cell] = {"mark": mark, "seconds": round(time.monotonic() - began, 1), "jobs": texts}
        reasons = {text for _, text in texts.values() if text}
        print(f"{name:15} {cell:9} {mark:5} {' | '.join(sorted(reasons))[:200]}", flush=True)
    (out / f"{name}.json").write_text(json.dumps(row, indent=1), encoding="utf-8")
    if not keep:
        shutil.rmtree(work)
        shutil.rmtree(zoo)


def _plain(text: str, out: Path) -> str:
    """Without the places of this run, which say nothing to a reader."""
    text = re.sub(rf"{re.escape(str(out))}/(zoo|work)/", "", text)
    text = re.sub(r"\.[\w-]+\.[a-z0-9_]{8}\b", "…", text)  # what is written before it is moved into place
    return re.sub(r"/\S*/(?=[\w.-]+)", "…/", text)


def run(names: Sequence[str], cells: Sequence[str], out: Path, *, limit: float = LIMIT, keep: bool = False) -> None:
    """The models whose file is missing in OUT, one after another."""
    import peft  # noqa: F401  (what many commands import, imported once)

    import remend
    import remend.cli

    for lazy in remend.__all__:
        getattr(remend, lazy)
    for name in names:
        if (out / f"{name}.json").is_file():
            continue
        process = ALONE.Process(target=try_model, args=(name, cells, out, limit, keep))
        process.start()
        process.join()
        if process.exitcode:  # the zoo's own fault: no command can do that
            sys.exit(f"{name} could not be made or tried: its process ended with {process.exitcode}")


# the table -----------------------------------------------------------------------------------------------------------


def counts(rows: dict[str, Row]) -> dict[str, int]:
    """How many cells have each mark."""
    found = collections.Counter(cell["mark"] for row in rows.values() for cell in row.values())
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def lost(rows: dict[str, Row], before: dict[str, dict[str, str]]) -> list[str]:
    """Cells that worked before and don't now. An export of a student that was silently wrong then had not worked."""
    return [
        f"{name} {cell} ({now['mark']})"
        for name, row in rows.items()
        for cell, now in row.items()
        if before.get(name, {}).get(cell) == "ok" and now["mark"] != "ok"
        if not (cell in OF_RTN and before[name].get("rtn") == "S")
    ]


def as_markdown(rows: dict[str, Row], worked_before: Sequence[str]) -> str:
    """The table, what worked before, and the reasons, each with the cells that have it."""
    cells = [cell for cell in CELLS if any(cell in row for row in rows.values())]
    lines = [f"| model | {' | '.join(cells)} |", f"| --- |{' --- |' * len(cells)}"]
    lines += [f"| {n} | {' | '.join(row[c]['mark'] if c in row else '' for c in cells)} |" for n, row in rows.items()]
    lines += ["", *(f"- {mark}: {meaning}" for mark, meaning in MEANING.items())]
    lines += ["- X/ok and the like: the worst of several commands, of which another went well", ""]
    if worked_before:
        lines += ["## What worked before", "", *(f"- {cell}" for cell in worked_before), ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        for cell, now in row.items():
            for job, (mark, text) in now["jobs"].items():
                if mark != "ok":
                    first = CLASS.sub("MODEL", text.replace(name, "MODEL").partition("\n")[0])
                    first = re.sub(r"\b\d+(\.\d+)?(e-\d+)?\b", "N", first)
                    where = f"{name} {cell}" + (f" ({job})" if len(now["jobs"]) > 1 else "")
                    reasons.setdefault((mark, first.replace("|", "/")), []).append(where)
    for mark in WORSE[:-1]:
        own = sorted((key for key in reasons if key[0] == mark), key=lambda key: -len(reasons[key]))
        if own:
            lines += [f"## {mark}: {MEANING[mark]}", ""]
            lines += [f"- `{key[1].replace('`', '')[:LONGEST]}`: {', '.join(reasons[key])}" for key in own]
            lines.append("")
    return "\n".join(lines)


def record(about: dict[str, str], rows: dict[str, Row], table: str) -> None:
    """Put a run of all models into docs/measurements/zoo.md: a row of counts, and its table in place of the last."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    again = f"| {about['commit']} |"
    runs = [line for line in page.splitlines() if re.match(r"\| \d{4}-", line) and again not in line]
    found = counts(rows)
    partly = sum(number for mark, number in found.items() if "/" in mark)
    numbers = [sum(found.values()), *(found.get(mark, 0) for mark in ("ok", "r", "r!")), partly]
    numbers += [found.get(mark, 0) for mark in ("X", "S", "-")]
    runs.append(f"| {' | '.join([*about.values(), *map(str, numbers)])} |")
    head = (
        "# The zoo: every verb on many architectures\n\n"
        "Tiny models with random weights go through every verb, and what comes out is checked with transformers\n"
        "alone. `make zoo` writes this page; `tests/campaign/cells.py` says what is asked and how it is checked. The\n"
        "marks are explained below the table, and the minutes are of a machine that did other work too. An export\n"
        "counts as having worked before only where its student was not silently wrong then.\n\n"
        "| date | commit | machine | minutes | cells | ok | r | r! | partly | X | S | - |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    last = f"\n\n## The last run, of commit {about['commit']}\n\n"
    table = re.sub(r" at \w+\.py:\w+( > \w+\.py:\w+)*", "", table)  # places that move with the next change
    PAGE.write_text(head + "\n".join(runs) + last + table.replace("\n## ", "\n### "), encoding="utf-8")


def tried_commit() -> str:
    """The commit of the remend that is tried, with a plus where files differ from it."""
    import remend

    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=7"]
    where = Path(remend.__file__).parent
    return subprocess.run(described, cwd=where, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--cells", default="", help=f"of {','.join(CELLS)}; by default all")
    parser.add_argument("--out", type=Path, required=True, help="a directory; models that it has are not tried again")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one command or check")
    parser.add_argument("--keep", action="store_true", help="keep what was written, with the logs")
    parser.add_argument("--before", type=Path, default=BEFORE, help="marks of an earlier run")
    parser.add_argument("--record", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--record-before", action="store_true", help="keep these marks as those of before")
    chosen = parser.parse_args()
    names, asked = chosen.models or [*MODELS], chosen.cells.split(",") if chosen.cells else [*CELLS]
    if unknown := [word for word in [*names, *asked] if word not in MODELS and word not in CELLS]:
        parser.error(f"neither a model nor a cell: {', '.join(unknown)}")
    if (chosen.record or chosen.record_before) and (chosen.models or chosen.cells):
        parser.error("only a run of all models and cells is recorded; leave the names out")
    needed = {*asked, *(need for cell in asked for need in NEEDS.get(cell, ()))}
    cells = [cell for cell in CELLS if cell in needed]
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = tried_commit()
    sign = {"commit": commit, "cells": cells}
    signed = out / "about.json"
    if signed.is_file() and json.loads(signed.read_text(encoding="utf-8")) != sign:
        parser.error(f"{out} holds cells of another commit, or other cells; give an empty directory")
    signed.write_text(json.dumps(sign), encoding="utf-8")
    write_data(out)
    began = time.monotonic()
    run(names, cells, out, limit=chosen.limit, keep=chosen.keep)
    rows = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    minutes = sum(cell["seconds"] for row in rows.values() for cell in row.values()) / 60
    date = str(datetime.datetime.now(datetime.UTC).date())
    about = {"date": date, "commit": commit, "machine": machine(), "minutes": f"{minutes:.0f}"}
    before: dict[str, dict[str, str]] = {}
    with contextlib.suppress(FileNotFoundError):
        before = json.loads(chosen.before.read_text(encoding="utf-8"))
    worse = lost(rows, before)
    table = as_markdown(rows, worse)
    (out / "table.md").write_text(table, encoding="utf-8")
    whole = {"about": about, "counts": counts(rows), "worked_before": worse, "models": rows}
    (out / "table.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    if chosen.record:
        record(about, rows, table)
    if chosen.record_before:
        marks = {name: {cell: now["mark"] for cell, now in row.items()} for name, row in rows.items()}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(own)}" for name, own in marks.items())
        BEFORE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(table)
    print(f"{commit}: {counts(rows)}, {len(worse)} worked before, {(time.monotonic() - began) / 60:.1f} minutes")
    return int(bool(worse) or any(mark[0] in "XS" for mark in counts(rows)))


if __name__ == "__main__":
    sys.exit(main())
