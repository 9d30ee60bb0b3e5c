"""How sure a study's figures are: over items and over seeds apart, adjusted for all tests of its table.

rows    each trained method against the degraded student: gap closed of KL and of agreement, points of each graded task
pairs   an on-policy method of a group and each other method, the first minus the second, on the seeds and items that
        both have: gap closed of KL, and points of the group's own task

A measure is a table of values, one row a seed and one column an item, whose mean it is (remend.maths.seeds). Holm's
adjustment goes over all rows of the study, and over all its pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from remend.evaluation.compare import BETTER, SAME, WORSE
from remend.files.atomic import JsonObject
from remend.maths import paired
from remend.maths.gap import MEASURABLE_KL
from remend.maths.intervals import Array
from remend.maths.seeds import by_cluster, certainty, gap_values
from remend.studies.cell import GRADES
from remend.studies.grid import Group, Study
from remend.studies.parts import Done, Key, parts_of, prompts_of

LEVEL, POWER = 0.95, 0.8
GAPS = {
    "KL": ("kl_sum_degraded", "kl_sum_recovered"),
    "agreement": ("disagree_degraded", "disagree_recovered"),
}
"""Measures that are a gap closed, 1 − after / before, with the sums that they are of."""


@dataclass(frozen=True)
class Sums:
    """A cell's sums before and after, by prompt, of one of GAPS."""

    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """What the cells of a method and group measured, by seed.

    gaps: by measure and seed. scores: by task with grader, seed and item. clusters: of items that have one.
    """

    gaps: Mapping[str, Mapping[int, Sums]]
    scores: Mapping[Key, Mapping[int, Mapping[str, float]]]
    clusters: Mapping[Key, Mapping[str, str]]


def certainties(study: Study, done: Sequence[Done]) -> JsonObject:
    """Of all finished cells, as plain values.

    Returns:
        level, power; rows and pairs. Each has group, measure, unit (share of a gap, or points of a score as a share),
        what remend.maths.seeds.Certainty has, test, p, p_holm and verdict. A row has method; a pair first and second.
    """
    rows: list[JsonObject] = []
    pairs: list[JsonObject] = []
    for group in dict.fromkeys(d.cell.group for d in done):
        mine = [d for d in done if d.cell.group == group]
        idle = [d for d in mine if not d.cell.method.trained]
        if not idle:
            continue
        start = measured(study, group, idle)
        methods = [m for m in study.methods.values() if m.trained]
        cells = {m.name: [d for d in mine if d.cell.method == m] for m in methods}
        known = {name: measured(study, group, found) for name, found in cells.items() if found}
        for name, one in known.items():
            rows += [{"group": group.name, "method": name, **row} for row in _against_start(one, start)]
        for first, second in itertools.combinations(known, 2):
            if not any(study.methods[name].base == "on-policy" for name in (first, second)):
                continue
            pairs += [
                {"group": group.name, "first": first, "second": second, **row}
                for row in _against(known[first], known[second], group.task)
            ]
    for family in (rows, pairs):
        _adjust(family)
    return {"level": LEVEL, "power": POWER, "rows": rows, "pairs": pairs}


def measured(study: Study, group: Group, cells: Sequence[Done]) -> Measured:
    """What the files of some cells of one method say, by seed."""
    gaps: dict[str, dict[int, Sums]] = {}
    scores: dict[Key, dict[int, Mapping[str, float]]] = {}
    clusters: dict[Key, dict[str, str]] = {}
    for done in cells:
        prompts = prompts_of(done.place)
        tokens = sum(row["tokens"] for row in prompts.values())
        for name, (before, after) in GAPS.items():
            # as for a gap closed: files that don't have the sums give none, nor does damage that can't be measured
            known = prompts and all(before in row for row in prompts.values())
            if known and sum(row[before] for row in prompts.values()) >= MEASURABLE_KL * tokens:
                sums = Sums(*({at: row[key] for at, row in prompts.items()} for key in (before, after)))
                gaps.setdefault(name, {})[done.cell.seed] = sums
        for key, part in parts_of(study, group, [done.place / GRADES], done.ungraded).items():
            if part["items"]:
                graded = {item["id"]: float(item["correct"]) for item in part["items"]}
                scores.setdefault(key, {})[done.cell.seed] = graded
                named = {item["id"]: item["cluster"] for item in part["items"] if "cluster" in item}
                clusters.setdefault(key, {}).update(named)
    return Measured(gaps, scores, clusters)


def _against_start(one: Measured, start: Measured) -> list[JsonObject]:
    """A method against the degraded student."""
    rows = []
    for name, by_seed in one.gaps.items():
        cells = list(by_seed.values())
        before, after = _tables(cells, _shared([sums.before for sums in cells]))
        if before.size and before.mean() > 0:
            values = gap_values(before, after)
            rows.append(_entry(f"{name} gap closed", "share", values))
    for key, seeds in one.scores.items():
        if key not in start.scores:
            continue
        (degraded,) = start.scores[key].values()
        ids = [at for at in degraded if all(at in graded for graded in seeds.values())]
        if ids:
            ours = np.array([[graded[at] for at in ids] for graded in seeds.values()])
            values = ours - np.array([degraded[at] for at in ids])
            rows.append(_entry(_points(key), "points", values, _clusters(one, key, ids)))
    return rows


def _against(first: Measured, second: Measured, task: str) -> list[JsonObject]:
    """A method minus another, on the seeds and items of both, by KL and by points of the group's own task."""
    rows = []
    ours_by_seed, theirs_by_seed = (side.gaps.get("KL", {}) for side in (first, second))
    both = [(ours, theirs_by_seed[seed]) for seed, ours in ours_by_seed.items() if seed in theirs_by_seed]
    prompts = _shared([sums.before for pair in both for sums in pair])
    if prompts:
        (before, ours), (also_before, theirs) = (_tables(side, prompts) for side in zip(*both, strict=True))
        if before.mean() > 0 and also_before.mean() > 0:
            rows.append(_entry("KL gap closed", "share", gap_values(before, ours) - gap_values(also_before, theirs)))
    for key in (key for key in first.scores if key in second.scores and key[0] == task):
        seeds = [seed for seed in first.scores[key] if seed in second.scores[key]]
        ids = _shared([side.scores[key][seed] for side in (first, second) for seed in seeds])
        if seeds and ids:
            ours, theirs = (
                np.array([[side.scores[key][seed][at] for at in ids] for seed in seeds]) for side in (first, second)
            )
            rows.append(_entry(_points(key), "points", ours - theirs, _clusters(first, key, ids)))
    return rows


def _points(key: Key) -> str:
    return f"{key[0]} ({key[1]}) points"


def _shared(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Ids that all have, in the order of the first."""
    return [at for at in rows[0] if all(at in row for row in rows)] if rows else []


def _tables(seeds: Sequence[Sums], prompts: Sequence[str]) -> tuple[Array, Array]:
    """[S, N] of before and after, on these prompts."""
    before, after = (
        np.array([[getattr(sums, when)[at] for at in prompts] for sums in seeds], dtype=np.float64)
        for when in ("before", "after")
    )
    return before, after


def _clusters(one: Measured, key: Key, ids: Sequence[str]) -> list[str] | None:
    named = one.clusters.get(key, {})
    return [named.get(at, at) for at in ids] if named else None


def _entry(measure: str, unit: str, values_SN: Array, clusters: Sequence[str] | None = None) -> JsonObject:
    """A measure with its intervals and its test.

    The test is Student's, of the error over both, or with one seed over items. Grades of one seed, which are right or
    wrong, have the exact test of McNemar and the interval of Bonett and Price instead.
    """
    facts = asdict(
        certainty(values_SN if clusters is None else by_cluster(values_SN, clusters), level=LEVEL, power=POWER)
    )
    test, p_value = "Student's t", facts.pop("p_value")
    graded = unit == "points" and clusters is None and np.isin(values_SN, (-1.0, 0.0, 1.0)).all()
    if len(values_SN) == 1 and graded:
        gained, lost = int((values_SN > 0).sum()), int((values_SN < 0).sum())
        test, p_value = "exact McNemar", paired.mcnemar_exact(gained, lost)
        facts["over_items"] = paired.paired_share_interval(gained, lost, values_SN.size, LEVEL)
    interval = facts["over_both"] if len(values_SN) > 1 else facts["over_items"]
    return {"measure": measure, "unit": unit, **facts, "interval": interval, "test": test, "p": p_value}


def _adjust(entries: Sequence[JsonObject]) -> None:
    """Add Holm's p-values over all that have one, and the verdicts."""
    tested = [entry for entry in entries if entry["p"] is not None]
    for entry, p in zip(tested, paired.holm([entry["p"] for entry in tested]).tolist(), strict=True):
        entry["p_holm"] = p
    for entry in entries:
        entry.setdefault("p_holm", None)
        entry["verdict"] = _verdict(entry)


def _verdict(entry: JsonObject) -> str:
    low, high = entry["interval"] or (0.0, 0.0)
    if entry["p_holm"] is None or entry["p_holm"] >= 1 - LEVEL or low <= 0 <= high:
        return SAME
    return BETTER if entry["value"] > 0 else WORSE
