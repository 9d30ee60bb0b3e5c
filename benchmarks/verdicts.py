"""The rules by which a study's results say what became of each claim of arXiv 2604.15794; claims.py writes the page.

Every rule goes by intervals of the study's results (remend.studies.certainties): over seeds and items where a cell has
several seeds, else over items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from remend.report.words import minus

Results = Mapping[str, Any]
Entry = Mapping[str, Any]

SEEN, NOT_SEEN, CONTRADICTED, NOT_TESTABLE, NOT_MEASURED = (
    "seen",
    "not seen",
    "contradicted",
    "not testable here",
    "not yet measured",
)

OURS = ("off-then-on", "sdft", "repair-sdft")
"""Methods that stand for the paper's, the first that a group has: off- then on-policy is the paper's own."""

QUANTIZED, PRUNED, FORGOTTEN = ("nf4", "int3-g64"), ("ffn-10", "wanda-2-4", "depth-5"), ("forgetting",)
"""Degradations of paper-small by what the claims call them."""

POINTS = 0.15
"""The least of the claimed 15 to 22 points."""

HALF = 0.5
"""Share of what was lost that has to be back for it to be called back."""

MARGIN = 0.05
"""Points of the task that may be lost where it is said to be kept."""

STRONG = 0.7
"""A strong correlation (Schober et al. 2018, Anesth. Analg. 126:1763)."""

ALPHA = 0.05


@dataclass(frozen=True)
class Judged:
    """A verdict, what it rests on in figures, and on which groups and seeds."""

    verdict: str
    measured: Sequence[str] = ()
    on: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """What was claimed, on what, by which rule it is judged, which options name its cells, and the judge."""

    name: str
    claimed: str
    on: str
    rule: str
    cells: str
    judge: Callable[[Figures], Judged] = field(repr=False)


class Figures:
    """A study's results, asked for by degradation."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.rows: list[Entry] = results["certainty"]["rows"]
        self.pairs: list[Entry] = results["certainty"]["pairs"]
        self.table: list[Entry] = results["rows"]

    def groups(self, degradations: Sequence[str]) -> list[str]:
        """Those of these degradations that the paper's method, or its stand-in, was measured on."""
        names = [row["group"] for row in self.table if row["degradation"] in degradations]
        return [name for name in dict.fromkeys(names) if self.method(name) is not None]

    def method(self, group: str) -> str | None:
        """The first of OURS that a group has."""
        there = {row["method"] for row in self.rows if row["group"] == group}
        return next((name for name in OURS if name in there), None)

    def gap(self, group: str) -> Entry | None:
        """KL gap closed by that method."""
        return self._row(group, "KL gap closed")

    def points(self, group: str) -> Entry | None:
        """Points of the group's own task by that method."""
        task = next(row["task"] for row in self.table if row["group"] == group)
        mine = [r for r in self.rows if r["group"] == group and r["measure"].startswith(f"{task} (")]
        return next((row for row in mine if row["method"] == self.method(group)), None)

    def damage(self, group: str) -> Entry | None:
        """What the degraded student lost of its task's score: difference and interval, both below zero for a loss."""
        idle = next((row for row in self.table if row["group"] == group and row["how"] == "none"), None)
        graded = [g for g in idle["grades"] if g["ability"] == "task" and g["change"]] if idle else []
        return graded[0]["damage"] if graded else None

    def pair(self, group: str, first: str, second: str, measure: str) -> Entry | None:
        """A comparison of two methods, the first less the second."""
        for row in self.pairs:
            if row["group"] == group and row["measure"] == measure and {row["first"], row["second"]} == {first, second}:
                return row if row["first"] == first else turned(row)
        return None

    def _row(self, group: str, measure: str) -> Entry | None:
        ours = self.method(group)
        mine = (r for r in self.rows if r["group"] == group and r["method"] == ours and r["measure"] == measure)
        return next(mine, None)


def turned(row: Entry) -> Entry:
    """A comparison seen from the other side."""
    low, high = row["interval"] or (None, None)
    other = {"better": "worse", "worse": "better"}
    return {
        **row,
        "value": -row["value"],
        "interval": None if low is None or high is None else (-high, -low),
        "verdict": other.get(row["verdict"], row["verdict"]),
    }


def ends(entry: Entry) -> tuple[float, float]:
    """The interval, or the value itself where nothing varies."""
    low, high = entry["interval"] or (entry["value"], entry["value"])
    return low, high


def as_points(entry: Entry) -> str:
    """'+12.5 points (8.0 to 17.0)'."""
    low, high = ends(entry)
    return minus(f"{100 * entry['value']:+.1f} points ({100 * low:.1f} to {100 * high:.1f})")


def as_share(entry: Entry) -> str:
    """'86% (84% to 88%)'."""
    low, high = ends(entry)
    return minus(f"{entry['value']:.0%} ({low:.0%} to {high:.0%})")


def on_what(figures: Figures, group: str, entry: Entry) -> str:
    """The group, the method, and how many seeds and items."""
    seeds = f"{entry['seeds']} seed{'s' * (entry['seeds'] != 1)}"
    return f"{group} by {figures.method(group)}, {seeds}, {entry['items']} items"


def quantization(figures: Figures) -> Judged:
    """Claim (a)."""
    measured, on, testable = [], [], []
    for group in figures.groups(QUANTIZED):
        points, damage = figures.points(group), figures.damage(group)
        if points is None or damage is None:
            continue
        lost = -100 * damage["difference"]
        learned = figures.pair(group, str(figures.method(group)), "sft", points["measure"])
        beside = f"; {as_points(learned)} beside SFT at equal tokens" if learned else ""
        measured.append(f"{group}: {as_points(points)} of {lost:.1f} lost{beside}")
        on.append(on_what(figures, group, points))
        if -damage["interval"][1] >= POINTS:
            testable.append(ends(points))
    if not measured:
        return Judged(NOT_MEASURED)
    if not testable:
        return Judged(NOT_TESTABLE, measured, on)
    if all(low > 0 and high >= POINTS for low, high in testable):
        return Judged(SEEN, measured, on)
    return Judged(CONTRADICTED if all(high < POINTS for _, high in testable) else NOT_SEEN, measured, on)


def forgetting(figures: Figures) -> Judged:
    """Claim (b)."""
    measured, on, back, broken = [], [], [], []
    for group in figures.groups(FORGOTTEN):
        gap, points = figures.gap(group), figures.points(group)
        if gap is None or points is None:
            continue
        measured.append(f"{group}: {as_share(gap)} of the KL gap closed, task {as_points(points)}")
        on.append(on_what(figures, group, points))
        back.append(ends(gap)[0] > HALF and ends(points)[0] > -MARGIN)
        broken.append(ends(gap)[1] < HALF or ends(points)[1] < -MARGIN)
    if not measured:
        return Judged(NOT_MEASURED)
    return Judged(SEEN if all(back) else CONTRADICTED if all(broken) else NOT_SEEN, measured, on)


def pruning(figures: Figures) -> Judged:
    """Claim (c)."""
    measured, on, back, short = [], [], [], []
    for group in figures.groups(PRUNED):
        gap, points, damage = figures.gap(group), figures.points(group), figures.damage(group)
        if gap is None or points is None or damage is None:
            continue
        lost = -damage["difference"]
        sure = -damage["interval"][1] > 0
        measured.append(
            f"{group}: {as_share(gap)} of the KL gap closed, {as_points(points)} of {100 * lost:.1f} lost on the task"
        )
        on.append(on_what(figures, group, points))
        back.append(ends(gap)[0] > HALF and (not sure or ends(points)[0] > HALF * lost))
        short.append(ends(gap)[1] < HALF or (sure and ends(points)[1] < HALF * lost))
    if not measured:
        return Judged(NOT_MEASURED)
    return Judged(SEEN if all(back) else CONTRADICTED if all(short) else NOT_SEEN, measured, on)


def correlation(figures: Figures) -> Judged:
    """Claim (d)."""
    found = figures.results["correlation"]
    if "overall" not in found:
        return Judged(NOT_MEASURED)
    levels = [found["overall"][level]["spearman"] for level in ("within", "between")]
    on = [f"{found['checkpoints']} checkpoints of {len(found['cells'])} cells"]
    if any(one["coefficient"] is None for one in levels):
        return Judged(NOT_MEASURED, found["quotable"][:1], on)
    chance = [max(one["p_value"], one["shift_p_value"] or 0.0) for one in levels]
    if all(one["coefficient"] >= STRONG and p <= ALPHA for one, p in zip(levels, chance, strict=True)):
        return Judged(SEEN, found["quotable"], on)
    weak = all(one["high"] is not None and one["high"] < STRONG for one in levels)
    return Judged(CONTRADICTED if weak else NOT_SEEN, found["quotable"], on)


def bootstrap(figures: Figures) -> Judged:
    """Claim (e)."""
    measured, on, verdicts = [], [], []
    for group in dict.fromkeys(row["group"] for row in figures.table):
        pair = figures.pair(group, "off-then-on", "sdft", "KL gap closed")
        if pair is not None:
            measured.append(f"{group}: {as_share(pair)} of the KL gap, {pair['verdict']}")
            on.append(f"{group}, {pair['seeds']} seed{'s' * (pair['seeds'] != 1)}, {pair['items']} prompts")
            verdicts.append(pair["verdict"])
    if not verdicts:
        return Judged(NOT_MEASURED)
    better, worse = verdicts.count("better"), verdicts.count("worse")
    if 2 * better >= len(verdicts) and not worse:
        return Judged(SEEN, measured, on)
    return Judged(CONTRADICTED if 2 * worse >= len(verdicts) and not better else NOT_SEEN, measured, on)


CLAIMS = (
    Claim(
        "quantization",
        "+15 to 22 points of task accuracy won back after quantization",
        "Qwen2.5 3B and 7B, NF4; tool use and science",
        f"Of each quantized student that lost {100 * POINTS:.0f} points for sure (the end of its loss's interval), the "
        f"interval of the points won back. Seen: above 0 and reaching {100 * POINTS:.0f} in all. Contradicted: ending "
        f"below {100 * POINTS:.0f} in all. Not testable here: none lost so much.",
        "--only 'nf4-*' --only 'int3-g64-*'",
        quantization,
    ),
    Claim(
        "forgetting",
        "prior capability comes back after fine-tuning, and the task is kept",
        "Qwen2.5 3B and 7B",
        f"Seen: of every task, the interval of the KL gap closed lies above {HALF:.0%}, and that of the task's change "
        f"above −{100 * MARGIN:.0f} points. Contradicted: of every task, one of them lies wholly below its bound.",
        "--only 'forgetting-*'",
        forgetting,
    ),
    Claim(
        "pruning",
        "capability comes back after pruning (others read from its table 4: MMLU stays 2.55 points below)",
        "Qwen2.5 3B and 7B, 10% of the feed-forward width",
        f"Seen: of every pruned student, the interval of the KL gap closed lies above {HALF:.0%} and, where the task's "
        f"loss is beyond chance, that of the points won back above {HALF:.0%} of it. Contradicted: of every one, "
        "either lies wholly below.",
        "--only 'ffn-10-*' --only 'wanda-2-4-*' --only 'depth-5-*'",
        pruning,
    ),
    Claim(
        "CKA",
        "a strong correlation between recovery and CKA",
        "Qwen2.5 3B and 7B, near the last layer",
        f"Seen: Spearman's coefficient over all layers is {STRONG} or more, within cells and between them, with p ≤ "
        f"{ALPHA} by permutation (within: also by shifts). Contradicted: both intervals end below {STRONG}.",
        "",
        correlation,
    ),
    Claim(
        "bootstrap",
        "off-policy steps before on-policy ones help small models",
        "models that can't yet answer well themselves",
        "Off- then on-policy against on-policy at equal tokens, by the KL gap closed, after Holm over all comparisons "
        "of methods. Seen: better in at least half of the groups and worse in none. Contradicted: the reverse.",
        "--only '*/off-then-on/*' --only '*/sdft/*'",
        bootstrap,
    ),
)
