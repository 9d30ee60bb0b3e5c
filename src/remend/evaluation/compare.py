"""Graded results of the same items beside each other: what was lost, what was won back, what n items can't show.

    comparison = compare(["reference.json", "degraded.json", "recovered.json"])
    comparison["tasks"][0]["comparisons"][0]["verdict"]      # "worse"
    PlainConsole().print(table(comparison));  save(comparison, Path("comparison.md"))

A results file is `{"task", "grader", "items": [{"id", "correct", …}]}`, further keys being free, or
`{"results": [such objects]}` for several tasks. `correct` is true, false or a number from 0 to 1; items of one text or
problem may name it as `cluster`. The first file is the reference, the second the degraded model, later ones recovered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from remend.errors import InputError
from remend.evaluation.results_files import Graded, Key, Source, load, require_pairs
from remend.files.atomic import JsonObject, write_json, write_text
from remend.maths import paired
from remend.maths.intervals import Array
from remend.report.markdown import escape

Grid = tuple[list[str], list[list[str]]]  # header and rows of cells
FEW = 20
"""Below so many units a percentile bootstrap is visibly too narrow, and the printed result says so."""
BETTER, WORSE, SAME = "better", "worse", "not distinguishable"


class Choices(NamedTuple):
    """How to count: see `compare`."""

    level: float
    power: float
    resamples: int
    seed: int


def compare(
    results: Sequence[Source],
    *,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    power: float = 0.8,
    resamples: int = 10_000,
    seed: int = 0,
) -> JsonObject:
    """Compare two or more models' graded answers to the same items (statistics as in arXiv 2411.00640).

    Pairs are each later file against the first, and each file against the one before it. "better" and "worse" need
    both a p-value below 1 − level, adjusted by Holm over the tasks for each pair of files, and an interval without
    zero. The order of items in a file plays no part, and exchanging two files changes signs only.

    Args:
        results: paths or loaded results, the reference first.
        names: one for each; by default from the file names.
        level: coverage of all intervals, and 1 − level the errors that the verdicts allow.
        power: of the minimum detectable effect.
        resamples, seed: of bootstrap and sign flips.

    Returns:
        Plain values, ready for JSON: files, level, power, resamples, seed, and for each task: task, grader, n,
        clusters, scores [{name, score, interval, method}], comparisons [{from, to, difference (to − from), interval,
        method, test, p, p_holm, flips {gained, lost}, minimum_detectable_effect, identical, verdict}] and, from the
        third file on, gap_closed [{name, value, interval, gap, gap_interval, reason}].

    Raises:
        InputError: fewer than two files, one that is no results file, or files of other tasks, graders or items.
        FileError: a file can't be read.
    """
    count = 1 if isinstance(results, str | Path | Mapping) else len(results)
    if count < 2:
        raise InputError(f"got {count} results file(s); a comparison needs two or more, the reference first")
    labels = _labels(results, names)
    choices = Choices(level, power, resamples, seed)
    loaded = [load(source, label) for source, label in zip(results, labels, strict=True)]
    require_pairs(loaded, labels)
    tasks = [_task(key, [file[key] for file in loaded], labels, choices) for key in loaded[0]]
    _adjust(tasks, level)
    paths = [None if isinstance(source, Mapping) else str(source) for source in results]
    files = [{"name": label, "path": path} for label, path in zip(labels, paths, strict=True)]
    return {"files": files, **choices._asdict(), "tasks": tasks}


def table(comparison: JsonObject) -> Group:
    """What `compare` found, for a rich console; piped, it is plain text."""
    parts: list[Text | Table] = []
    for task in comparison["tasks"]:
        title, grids, lines = _section(task, f"{comparison['level']:.0%}")
        parts.append(Text(title, style="bold"))
        for header, rows in grids:
            grid = Table(*(Column(name, overflow="fold") for name in header))  # no name is cut short
            for row in rows:
                grid.add_row(*(Text(cell) for cell in row))  # Text, since a name may look like rich's markup
            parts.append(grid)
        parts += [Text(line) for line in (*lines, "")]
    return Group(*parts, *(Text(line, style="dim") for line in _notes(comparison)))


def markdown(comparison: JsonObject) -> str:
    """What `compare` found, as markdown; names are escaped, so that none becomes markup."""
    page: list[str] = []
    for task in comparison["tasks"]:
        title, grids, lines = _section(task, f"{comparison['level']:.0%}")
        page += [f"## {escape(title)}", ""]
        for header, rows in grids:
            names, *cells = ([escape(cell) for cell in row] for row in (header, *rows))
            page += ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *cells)]
            page.append("")
        page += [f"- {escape(line)}" for line in lines] + [""] * bool(lines)
    return "\n".join(page + [f"- {escape(note)}" for note in _notes(comparison)]) + "\n"


def save(comparison: JsonObject, path: Path) -> None:
    """Write what `compare` found as .json or .md, whole or not at all. Raises InputError as `require_target`."""
    require_target(path)
    if path.suffix == ".json":
        write_json(path, comparison)
    else:
        write_text(path, markdown(comparison))


def require_target(path: Path) -> None:
    """Raises InputError unless `path` ends in .json or .md and is a new file: nothing is overwritten."""
    if path.suffix not in (".json", ".md"):
        raise InputError(f'{path} ends in "{path.suffix}"; allowed: .json or .md. Name the file so')
    if path.exists():
        raise InputError(f"{path} is there already and is left as it is; name a new file")


def _labels(results: Sequence[Source], names: Sequence[str] | None) -> list[str]:
    """Given names, or the shortest of file name, directory and path that tells the files apart."""
    count = len(results)
    if names is not None:
        if len(names) != count or len(set(names)) < count or not all(names):
            raise InputError(
                f"got the names {list(names)} for {count} results; give each one name of its own, in order"
            )
        return list(names)
    paths = [
        Path(f"results {i}" if isinstance(source, Mapping) else source) for i, source in enumerate(results, start=1)
    ]
    choices = [[p.stem for p in paths], [p.parent.name for p in paths], [str(p) for p in paths]]
    fallback = [f"{path.stem} ({i})" for i, path in enumerate(paths, start=1)]
    return next((labels for labels in choices if all(labels) and len(set(labels)) == count), fallback)


def _task(key: Key, graded: Sequence[Graded], labels: Sequence[str], choices: Choices) -> JsonObject:
    ids = sorted(graded[0].scores)
    named: dict[str, str] = next((file.clusters for file in graded if file.clusters), {})
    clusters = [named[name] for name in ids] if named else None
    scores = [np.array([file.scores[name] for name in ids]) for file in graded]
    intervals = [paired.score_interval(values, clusters, choices.level) for values in scores]
    rows = [{"name": name, **interval} for name, interval in zip(labels, intervals, strict=True)]
    pairs = dict.fromkeys([*((0, i) for i in range(1, len(labels))), *itertools.pairwise(range(len(labels)))])
    draws = (choices.seed, choices.resamples)
    closed = [
        paired.gap_closed(scores[0], scores[1], later, *draws, level=choices.level, clusters=clusters)
        for later in scores[2:]
    ]
    return {
        "task": key[0],
        "grader": key[1],
        "n": len(ids),
        "clusters": len(set(clusters)) if clusters else None,
        "scores": rows,
        "comparisons": [
            {"from": labels[i], "to": labels[j], **_pair(scores[i], scores[j], clusters, choices)} for i, j in pairs
        ],
        "gap_closed": [{"name": name, **asdict(gap)} for name, gap in zip(labels[2:], closed, strict=True)],
    }


def _pair(first: Array, later: Array, clusters: Sequence[str] | None, choices: Choices) -> JsonObject:
    draws, level, power = (choices.seed, choices.resamples), choices.level, choices.power
    difference, n = later - first, len(first)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    units = len(set(clusters)) if clusters else n
    test, p = paired.paired_test(first, later, *draws, clusters=clusters)
    effect: float | None = None
    if test == "exact McNemar":
        method, interval = "Bonett-Price", paired.paired_share_interval(gained, lost, n, level)
        effect = paired.minimum_detectable_effect(n, (gained + lost) / n, power, level)
    elif units < 2:
        method, interval = "none: one unit shows nothing", (-1.0, 1.0)
    else:
        method = f"paired bootstrap of {'clusters' if clusters else 'items'}"
        interval = paired.paired_bootstrap(first, later, *draws, level=level, clusters=clusters)
        if (error := paired.standard_error(difference, clusters)) > paired.TINY:
            effect = paired.detectable_difference(error, power, level)
    return {
        "difference": float(difference.mean()) + 0.0,  # no minus zero
        "interval": interval,
        "method": method,
        "test": test,
        "p": p,
        "flips": {"gained": gained, "lost": lost},
        "minimum_detectable_effect": effect,
        "identical": not difference.any(),
    }


def _adjust(tasks: Sequence[JsonObject], level: float) -> None:
    """Add Holm's p-values and the verdicts, and take back a gap closed whose loss does not outlast the adjustment."""
    for same_pair in zip(*(task["comparisons"] for task in tasks), strict=True):
        adjusted = paired.holm([row["p"] for row in same_pair])
        for row, p in zip(same_pair, adjusted.tolist(), strict=True):
            row["p_holm"] = p
            row["verdict"] = _verdict(row, level)
    for task in tasks:
        if (loss := task["comparisons"][0])["verdict"] != WORSE:
            reason = f"the loss is {SAME} from zero, adjusted for {len(tasks)} tasks (p {loss['p_holm']:.2g})"
            for gap in task["gap_closed"]:
                gap |= {"value": None, "interval": None, "reason": gap["reason"] or reason}


def _verdict(row: JsonObject, level: float) -> str:
    low, high = row["interval"]
    if row["identical"]:
        return f"identical: {SAME}"
    if row["p_holm"] >= 1 - level or low <= 0 <= high:
        return SAME
    return BETTER if row["difference"] > 0 else WORSE


def _section(task: JsonObject, level: str) -> tuple[str, list[Grid], list[str]]:
    """Title, tables and lines below them."""
    by, shown = _methods(task["scores"], "{:.1f}%")
    scores = [[row["name"], f"{row['score']:.1%}", cell] for row, cell in zip(task["scores"], shown, strict=True)]
    change_by, changes = _methods(task["comparisons"])
    pairs = [
        [
            f"{row['from']} → {row['to']}",
            _points([row["difference"]]),
            cell,
            "<0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}",
            f"{row['flips']['gained']} / {row['flips']['lost']}",
            "–" if (effect := row["minimum_detectable_effect"]) is None else f"{100 * effect:.1f}",
        ]
        for row, cell in zip(task["comparisons"], changes, strict=True)
    ]
    lines = [f"{row['from']} → {row['to']}: {row['verdict']}" for row in task["comparisons"]]
    lines += [f"gap closed by {gap['name']}: {_gap(gap, level)}" for gap in task["gap_closed"]]
    clusters = f" in {task['clusters']} clusters" if task["clusters"] else ""
    return (
        f"{task['task']} (grader {task['grader']}), {task['n']} items{clusters}",
        [
            (["model", "score", f"{level} interval{by}"], scores),
            (["from → to", "points", f"{level} interval{change_by}", "p", "gained / lost", "detectable"], pairs),
        ],
        lines,
    )


def _methods(rows: Sequence[JsonObject], form: str = "{:+.1f}") -> tuple[str, list[str]]:
    """(of the header, cells): how the intervals were made is said once where it is the same for all rows."""
    several = len({row["method"] for row in rows}) > 1
    cells = [_points(row["interval"], form) + (f" ({row['method']})" if several else "") for row in rows]
    return ("" if several or not rows else f" ({rows[0]['method']})"), cells


def _gap(gap: JsonObject, level: str) -> str:
    if gap["value"] is None:
        return f"not given, since {gap['reason']}"
    share, loss = f"{100 * gap['value']:.0f}%".replace("-", "−"), 100 * gap["gap"]
    return f"{share} ({level} {_points(gap['interval'], '{:.0f}%')}) of a loss of {loss:.1f} points"


def _notes(comparison: JsonObject) -> list[str]:
    rows = [row for task in comparison["tasks"] for row in task["comparisons"]]
    tests = " and ".join(dict.fromkeys(row["test"] for row in rows))
    holm = f", adjusted by Holm over {len(comparison['tasks'])} tasks" if len(comparison["tasks"]) > 1 else ""
    notes = [
        f"p: {tests}{holm}; better and worse need p below {1 - comparison['level']:.3g} and an interval without zero.",
        f"detectable: the least difference that such a test finds on these items with {comparison['power']:.0%} power.",
    ]
    drawn = [
        task for task in comparison["tasks"] if task["gap_closed"] or "bootstrap" in task["comparisons"][0]["method"]
    ]
    if any((task["clusters"] or task["n"]) < FEW for task in drawn):
        notes.append(f"bootstrap intervals of fewer than {FEW} items or clusters are too narrow; the p-values hold.")
    return notes


def _points(shares: Sequence[float], form: str = "{:+.1f}") -> str:
    return " to ".join(form.format(100 * end) for end in shares).replace("-", "−")
