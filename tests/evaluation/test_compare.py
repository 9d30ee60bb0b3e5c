"""Comparison of results files: what is computed, identical and exchanged files, what is printed, and bad input."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from remend.errors import FileError, InputError
from remend.evaluation.compare import compare, markdown, save, table
from remend.maths import paired


def result(correct: list[Any], *, task: str = "tooluse", grader: str = "paper", **more: list[Any]) -> dict[str, Any]:
    columns = {"correct": correct, **more}
    items = [{"id": f"q{i}"} | {k: column[i] for k, column in columns.items()} for i in range(len(correct))]
    return {"task": task, "grader": grader, "items": items}


def right(share: float, n: int = 100, seed: int = 0) -> list[bool]:
    rng = random.Random(seed)
    return [rng.random() < share for _ in range(n)]


REFERENCE, DEGRADED, RECOVERED = result(right(0.8)), result(right(0.3, seed=1)), result(right(0.6, seed=2))


def text(found: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(table(found))
    return stream.getvalue()


def test_three_files() -> None:
    found = compare([REFERENCE, DEGRADED, RECOVERED], names=["reference", "degraded", "recovered"])
    (task,) = found["tasks"]
    assert (task["task"], task["grader"], task["n"], task["clusters"]) == ("tooluse", "paper", 100, None)
    counts = [sum(item["correct"] for item in file["items"]) for file in (REFERENCE, DEGRADED, RECOVERED)]
    for row, count in zip(task["scores"], counts, strict=True):
        assert row["score"] == count / 100
        assert row["interval"] == paired.wilson(count, 100)
    pairs = [(row["from"], row["to"], row["verdict"]) for row in task["comparisons"]]
    assert pairs == [
        ("reference", "degraded", "worse"),
        ("reference", "recovered", "worse"),
        ("degraded", "recovered", "better"),
    ]
    loss = task["comparisons"][0]
    before, after = ([item["correct"] for item in file["items"]] for file in (REFERENCE, DEGRADED))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    assert loss["flips"] == {"gained": gained, "lost": lost}
    assert loss["difference"] == pytest.approx((gained - lost) / 100)
    assert loss["p"] == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue)
    assert loss["p_holm"] == loss["p"]
    assert loss["minimum_detectable_effect"] == paired.minimum_detectable_effect(100, (gained + lost) / 100)
    (gap,) = task["gap_closed"]
    assert gap["name"] == "recovered"
    assert gap["value"] == pytest.approx((counts[2] - counts[1]) / (counts[0] - counts[1]))
    assert gap["interval"][0] < gap["value"] < gap["interval"][1]


def test_every_later_file_against_the_reference_and_its_predecessor() -> None:
    found = compare([REFERENCE, DEGRADED, RECOVERED, REFERENCE], names=list("abcd"))
    pairs = [(row["from"], row["to"]) for row in found["tasks"][0]["comparisons"]]
    assert pairs == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("c", "d")]
    assert [gap["name"] for gap in found["tasks"][0]["gap_closed"]] == ["c", "d"]
    assert found["tasks"][0]["gap_closed"][1]["value"] == 1.0


@pytest.mark.parametrize("form", [bool, lambda c: 0.5 * c])
def test_identical_files_say_so(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "same.json"
    path.write_text(json.dumps(result([form(c) for c in right(0.5)])))
    found = compare([path, path])
    (row,) = found["tasks"][0]["comparisons"]
    assert row["identical"]
    assert (row["difference"], row["p"], row["verdict"]) == (0.0, 1.0, "identical: not distinguishable")
    assert row["interval"][0] <= 0 <= row["interval"][1]
    assert "same (1) → same (2): identical: not distinguishable" in text(found)
    assert "- same (1) → same (2): identical: not distinguishable" in markdown(found)


@pytest.mark.parametrize("kind", ["binary", "numbers", "clusters", "both"])
def test_exchanged_files_change_signs_only(kind: str) -> None:
    rng = random.Random(3)
    more = {"cluster": [i // 3 for i in range(100)]} if kind in {"clusters", "both"} else {}
    scores: list[Any] = [0.0, 0.25, 0.7, 1.0] if kind in {"numbers", "both"} else [False, True]
    first, later = (
        result(rng.choices(scores, weights=range(1, len(scores) + 1)[::step], k=100), **more) for step in (1, -1)
    )
    shuffled = {**later, "items": rng.sample(later["items"], 100)}  # the order in a file plays no part
    forth = compare([first, later], names=["a", "b"])["tasks"][0]
    back = compare([shuffled, first], names=["b", "a"])["tasks"][0]
    assert back["scores"] == forth["scores"][::-1]
    (one,), (other,) = forth["comparisons"], back["comparisons"]
    low, high = one["interval"]
    assert one["difference"] != 0
    assert other == one | {
        "from": "b",
        "to": "a",
        "difference": -one["difference"],
        "interval": (-high, -low),
        "flips": {"gained": one["flips"]["lost"], "lost": one["flips"]["gained"]},
        "verdict": {"better": "worse", "worse": "better"}.get(one["verdict"], one["verdict"]),
    }


def test_what_few_items_cannot_show() -> None:
    """Three of eight lost is a fall of 38 points, and chance (p 1/4)."""
    found = compare([result([1] * 8), result([0] * 3 + [1] * 5), result([1] * 8)])
    task = found["tasks"][0]
    assert [row["verdict"] for row in task["comparisons"]] == [
        "not distinguishable",
        "identical: not distinguishable",
        "not distinguishable",
    ]
    assert task["comparisons"][0]["p"] == 0.25
    assert task["comparisons"][0]["minimum_detectable_effect"] > 0.375
    assert task["gap_closed"][0]["value"] is None
    assert "not given, since the loss of 37.5 points" in text(found, width=200)
    assert "fewer than 20 items or clusters are too narrow" in text(found, width=200)


def shifted(n: int, flips: int, **names: str) -> tuple[dict[str, Any], ...]:
    """Reference, degraded, recovered: `flips` of n items are lost, and all of them won back."""
    degraded = [i >= flips for i in range(n)]
    return tuple(result(correct, **names) for correct in ([True] * n, degraded, [True] * n))


def test_holm_goes_over_the_tasks_of_a_pair() -> None:
    """Six flips of one kind are p 1/32: enough alone, not among three tasks. The gap closed follows the verdict."""
    alone = compare(shifted(60, 6))["tasks"][0]
    assert alone["comparisons"][0]["verdict"] == "worse"
    assert alone["gap_closed"][0]["value"] == 1.0
    files = [
        {"results": list(parts)}
        for parts in zip(shifted(60, 6), shifted(60, 20, task="b"), shifted(60, 0, grader="robust"), strict=True)
    ]
    weak, strong, none = compare(files)["tasks"]
    first = [task["comparisons"][0] for task in (weak, strong, none)]
    assert [row["p_holm"] for row in first] == paired.holm([row["p"] for row in first]).tolist()
    assert [row["verdict"] for row in first] == ["not distinguishable", "worse", "identical: not distinguishable"]
    assert weak["gap_closed"][0]["value"] is None
    assert (
        weak["gap_closed"][0]["reason"] == "the loss is not distinguishable from zero, adjusted for 3 tasks (p 0.062)"
    )
    assert strong["gap_closed"][0]["value"] == 1.0
    assert "adjusted by Holm over 3 tasks" in markdown(compare(files))


def test_numbers_are_compared_by_paired_bootstrap() -> None:
    rng = random.Random(4)
    before = [rng.random() for _ in range(60)]
    after = [min(1.0, value + 0.1 * rng.random()) for value in before]
    (task,) = compare([result(before), result(after)], resamples=2000, seed=5)["tasks"]
    (row,) = task["comparisons"]
    assert (row["method"], row["test"], row["verdict"]) == ("paired bootstrap of items", "sign flips", "better")
    ids = sorted(range(60), key=lambda i: f"q{i}")
    expected = paired.paired_bootstrap([before[i] for i in ids], [after[i] for i in ids], 5, 2000)
    assert row["interval"] == expected
    assert task["scores"][0]["method"] == "t"
    changes = [b - a for a, b in zip(before, after, strict=True)]
    error = stats.sem(changes)
    assert row["minimum_detectable_effect"] == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * error)


def test_clusters_widen() -> None:
    before, after = [i % 10 > 2 for i in range(10)], [i % 10 > 6 for i in range(10)]
    copies = [i // 8 for i in range(80)]  # ten items, each eight times over
    wide = compare([result([x for x in part for _ in range(8)], cluster=copies) for part in (before, after)])
    narrow = compare([result([x for x in part for _ in range(8)]) for part in (before, after)])
    assert wide["tasks"][0]["clusters"] == 10
    assert [wide["tasks"][0]["scores"][0][k] for k in ("method", "score")] == ["clustered Wilson", 0.7]
    for row, other in zip(wide["tasks"][0]["scores"], narrow["tasks"][0]["scores"], strict=True):
        assert row["interval"][1] - row["interval"][0] > 2 * (other["interval"][1] - other["interval"][0])
    (row,), (other,) = wide["tasks"][0]["comparisons"], narrow["tasks"][0]["comparisons"]
    assert (row["test"], row["p"], row["verdict"]) == ("sign flips of clusters", 0.125, "not distinguishable")
    assert (other["test"], other["verdict"]) == ("exact McNemar", "worse")
    assert "80 items in 10 clusters" in text(wide)


def test_one_file_may_name_the_clusters_for_all() -> None:
    names = [i // 5 for i in range(100)]
    one = compare([result(right(0.8), cluster=names), DEGRADED])
    all_of_them = compare([result(right(0.8), cluster=names), result(right(0.3, seed=1), cluster=names)])
    assert one["tasks"] == all_of_them["tasks"]


def test_a_single_cluster_shows_nothing() -> None:
    found = compare([result([1] * 50, cluster=["a"] * 50), result([0] * 50, cluster=["a"] * 50)])
    (row,) = found["tasks"][0]["comparisons"]
    assert (row["interval"], row["p"], row["verdict"]) == ((-1.0, 1.0), 1.0, "not distinguishable")
    assert row["minimum_detectable_effect"] is None
    assert "–" in text(found)
    low, high = found["tasks"][0]["scores"][0]["interval"]
    assert (low, high) == paired.wilson(1, 1)


def test_scores_without_spread() -> None:
    """A mean of 0.3s is rounded: that is no spread, gives no interval of width zero and shows no effect of zero."""
    (task,) = compare([result([0.3] * 30), result([0.4] * 30)])["tasks"]
    assert task["scores"][0]["interval"] == pytest.approx(paired.wilson(9, 30))
    assert task["comparisons"][0]["minimum_detectable_effect"] is None


def test_level_power_and_seed_have_their_effect() -> None:
    numbers = [result([random.Random(s + i).random() for i in range(40)]) for s in (0, 100)]
    pair = [REFERENCE, DEGRADED]
    wide, narrow = (compare(pair, level=level)["tasks"][0]["comparisons"][0] for level in (0.99, 0.8))
    assert wide["interval"][0] < narrow["interval"][0] < narrow["interval"][1] < wide["interval"][1]
    strong, weak = (compare(pair, power=p)["tasks"][0]["comparisons"][0] for p in (0.95, 0.5))
    assert strong["minimum_detectable_effect"] > weak["minimum_detectable_effect"]
    intervals = {compare(numbers, seed=s, resamples=100)["tasks"][0]["comparisons"][0]["interval"] for s in (0, 0, 1)}
    assert len(intervals) == 2
    assert "99% interval" in markdown(compare(pair, level=0.99))


def test_files_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "results.json", tmp_path / "b" / "results.json", tmp_path / "b" / "other.json"]
    for path, file in zip(paths, (REFERENCE, DEGRADED, RECOVERED), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(file))

    def names(*files: Any) -> list[str]:
        return [file["name"] for file in compare(files)["files"]]

    assert names(paths[0], paths[2]) == ["results", "other"]
    assert names(*paths[:2]) == ["a", "b"]
    assert names(*paths) == list(map(str, paths))
    assert names(paths[0], str(paths[0])) == ["results (1)", "results (2)"]
    assert names(REFERENCE, DEGRADED) == ["results 1", "results 2"]
    assert compare(paths[:2], names=["x", "y"])["files"][0] == {"name": "x", "path": str(paths[0])}


def test_names_are_no_markup() -> None:
    found = compare([REFERENCE | {"task": "[red]t|x[/]"}, DEGRADED | {"task": "[red]t|x[/]"}], names=["[b]a|", "[/b]"])
    assert "[red]t|x[/] (grader paper), 100 items" in text(found)
    assert "[b]a| → [/b]: worse" in text(found)
    assert r"| \[b\]a\| → \[/b\] |" in markdown(found)
    assert r"## \[red\]t\|x\[/\] (grader paper), 100 items" in markdown(found)


def test_printed_figures() -> None:
    found = compare([REFERENCE, DEGRADED, RECOVERED], names=["reference", "degraded", "recovered"])
    printed, page = text(found, width=120), markdown(found)
    loss, gap = found["tasks"][0]["comparisons"][0], found["tasks"][0]["gap_closed"][0]
    for part in (
        f"{100 * loss['difference']:+.1f}".replace("-", "−"),
        f"{loss['flips']['gained']} / {loss['flips']['lost']}",
        f"gap closed by recovered: {gap['value']:.0%} (95% {gap['interval'][0]:.0%} to {gap['interval'][1]:.0%})",
        "reference → degraded: worse",
        "p: exact McNemar;",
        "<0.001",
    ):
        assert part in printed
        assert part.replace("<", "&lt;") in page
    assert page.startswith(
        "## tooluse (grader paper), 100 items\n\n| model | score | 95% interval (Wilson) |\n| --- | --- | --- |\n"
    )


def test_save(tmp_path: Path) -> None:
    found = compare([REFERENCE, DEGRADED, RECOVERED])
    save(found, tmp_path / "new" / "c.json")
    read = json.loads((tmp_path / "new" / "c.json").read_text())
    assert read == json.loads(json.dumps(found))
    save(found, tmp_path / "c.md")
    assert (tmp_path / "c.md").read_text() == markdown(found)
    with pytest.raises(InputError, match=re.escape('ends in ".txt"; allowed: .json or .md')):
        save(found, tmp_path / "c.txt")
    before = (tmp_path / "c.md").read_text()
    with pytest.raises(InputError, match="is there already and is left as it is"):
        save({**found, "level": 0.9}, tmp_path / "c.md")
    assert (tmp_path / "c.md").read_text() == before


def test_the_method_of_an_interval_is_said_by_row_where_they_differ() -> None:
    half = {"task": "t", "grader": "g", "items": [{"id": str(i), "correct": i % 2 * 0.5} for i in range(10)]}
    whole = {**half, "items": [{"id": str(i), "correct": i % 2 == 0} for i in range(10)]}
    page = markdown(compare([half, whole]))
    assert "| model | score | 95% interval |" in page
    assert re.search(r"\| results 1 \| 25\.0% \| \S+ to \S+ \(t\) \|", page)
    assert re.search(r"\| results 2 \| 50\.0% \| \S+ to \S+ \(Wilson\) \|", page)
    assert "95% interval (paired bootstrap of items)" in page


def test_comparing_does_not_wait_for_torch() -> None:
    code = "import sys; import remend.evaluation.compare; print('torch' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def changed(index: int = 0, **values: Any) -> dict[str, Any]:
    items = [dict(item) for item in DEGRADED["items"]]
    items[index] |= values
    return {**DEGRADED, "items": items}


WITHOUT_ID = {**DEGRADED, "items": [{"correct": True}, *DEGRADED["items"]]}
OTHERS = {**DEGRADED, "items": [{"id": f"r{i}", "correct": True} for i in range(5)] + DEGRADED["items"][1:]}
TWO = [i % 2 for i in range(100)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([REFERENCE], "got 1 results file(s); a comparison needs two or more, the reference first"),
        (
            [REFERENCE, {**DEGRADED, "task": "science"}],
            "results 2 holds science (grader paper), but results 1 holds tooluse",
        ),
        (
            [REFERENCE, {"results": [DEGRADED, {**DEGRADED, "task": "b"}]}],
            "results 2 holds b (grader paper), tooluse (grader paper), but results 1 holds tooluse (grader paper)",
        ),
        (
            [REFERENCE, OTHERS],
            "results 2 and results 1 can't be paired on tooluse: they hold other items, 5 only in results 2 "
            "(r0, r1, r2, …) and 1 only in results 1 (q0). Evaluate both on the same data",
        ),
        ([REFERENCE, {**DEGRADED, "items": DEGRADED["items"][:98]}], "2 only in results 1 (q98, q99). Evaluate both"),
        ([REFERENCE, changed(id="q7")], "results 2: the id q7 stands twice; items are paired by id"),
        ([REFERENCE, {"results": [DEGRADED, DEGRADED]}], "results 2 holds task tooluse (grader paper) twice"),
        ([REFERENCE, {**DEGRADED, "items": []}], "results 2 has no items; a results file is"),
        ([REFERENCE, {"results": []}], 'results 2: "results" must be a list of one or more results'),
        ([REFERENCE, {"results": [[]]}], "results 2, result 1 holds a list; a results file is"),
        ([REFERENCE, {"items": DEGRADED["items"], "n": 100}], "results 2 has no task, grader (it has: items, n)"),
        ([REFERENCE, {**DEGRADED, "task": None}], "results 2: task is None; it must be a name, as text"),
        ([REFERENCE, WITHOUT_ID], "results 2, item 1: id or correct is missing (got correct)"),
        ([REFERENCE, changed(id=None)], "results 2, item 1: id is None; it must be a text or a whole number"),
        (
            [REFERENCE, changed(correct="yes")],
            "results 2, item q0: correct is 'yes'; allowed: true, false, or a number",
        ),
        ([REFERENCE, changed(correct=1.5)], "results 2, item q0: correct is 1.5; allowed"),
        ([REFERENCE, changed(correct=math.nan)], "results 2, item q0: correct is nan; allowed"),
        ([REFERENCE, changed(cluster="a")], "results 2: 1 of 100 items name a cluster; name it in all of them or none"),
        (
            [result(right(0.5), cluster=TWO), result(right(0.5), cluster=[0, 0, *TWO[2:]])],
            "results 2 and results 1 put the item q1 of tooluse into other clusters; make them agree",
        ),
    ],
)
def test_bad_results_are_refused(files: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compare(files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 95}, "level or power is 95; allowed is a share between 0 and 1"),
        ({"power": 0}, "level or power is 0; allowed"),
        ({"resamples": 10}, "got 10 resamples and seed 0; allowed: 100 or more"),
        ({"seed": -1}, "got 10000 resamples and seed -1"),
        ({"names": ["a"]}, "got the names ['a'] for 3 results; give each one name of its own"),
        ({"names": ["a", "a", "b"]}, "got the names ['a', 'a', 'b'] for 3 results"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compare([REFERENCE, DEGRADED, RECOVERED], **options)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(REFERENCE))
    for content, message in (
        ("id,correct\n1,true", "is not JSON: "),
        ("", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ("[1]", "holds a list; a results file is"),
        ("null", "holds a NoneType; a results file is"),
    ):
        bad.write_text(content)
        with pytest.raises(InputError, match=re.escape(f"{bad} {message}")):
            compare([good, bad])
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="no UTF-8 text at byte 0; a results file is"):
        compare([good, bad])
    with pytest.raises(InputError, match=re.escape("got 1 results file(s)")):
        compare(str(good))
    with pytest.raises(FileError, match=r"missing.json can't be read: No such file"):
        compare([good, tmp_path / "missing.json"])
    with pytest.raises(FileError, match="can't be read: Is a directory"):
        compare([good, tmp_path])
