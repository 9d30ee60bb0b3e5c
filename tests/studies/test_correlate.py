"""`remend correlate` on synthetic runs: what is read, what is said, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from remend.errors import FileError, InputError
from remend.files.atomic import write_json
from remend.files.run_directory import MANIFEST, RECIPE, SUMMARY, TRACK
from remend.studies.correlate import CAUTION, correlate, lines

LEVELS, MEASURES = ("pooled", "within", "between"), ("spearman", "pearson")


def row(step: int, kl: float | None, cka: Sequence[float | None], stage: str = "training", **more: Any) -> dict:
    layers = list(range(len(cka)))
    return {
        "step": step,
        "stage": stage,
        "kl": kl,
        "top1_agreement": 0.5,
        "cka": cka,
        "reference_layers": layers,
    } | more


def make_run(
    path: Path,
    rows: Sequence[dict] | None,
    *,
    degraded: float | None = 2.0,
    student: str = "student",
    reference: str = "a",
    text: str | None = None,
) -> Path:
    path.mkdir(parents=True)
    (path / RECIPE).write_text("student: x\n")
    manifest = {"recipe": {"student": student}, "constraint": "grid", "models": {"teacher": {"w": reference}}}
    write_json(path / MANIFEST, manifest)
    if degraded is not None:
        write_json(path / SUMMARY, {"degraded": {"kl": degraded}})
    if rows is not None:
        (path / TRACK).write_text("".join(json.dumps(r) + "\n" for r in rows) if text is None else text)
    return path


def curve(points: int, *, level: float = 0.0, damage: float = 2.0, noise: float = 0.0, seed: int = 0) -> list[dict]:
    """KL falls from `damage` and CKA rises from 0.5 + level, over two layers."""
    rng = np.random.default_rng(seed)
    rows = []
    for t in range(points):
        done = t / points + noise * rng.normal()
        cka = [0.5 + level + 0.2 * done, 0.4 + level + 0.3 * done + noise * rng.normal()]
        rows.append(row(10 * t, damage * (1 - 0.8 * done) if t else damage, cka, "training" if t else "degraded"))
    return rows


def texts(result: dict) -> list[str]:
    return [sentence["text"] for sentence in result["sentences"]]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        make_run(
            tmp_path / name, curve(8, level=0.05 * i, damage=2.0 + i, noise=0.05, seed=i), degraded=9.0, student=name
        )
        for i, name in enumerate(("one", "two", "three"))
    ]


def test_the_figures_are_those_of_the_checkpoints(three: list[Path]) -> None:
    result = correlate(three, permutations=200)
    recovery, alignment, layer_1, groups = [], [], [], []
    for path in three:
        rows = [json.loads(line) for line in (path / TRACK).read_text().splitlines()]
        for r in rows:  # the track's own degraded row counts, as it is measured like the rest
            recovery.append(1 - r["kl"] / rows[0]["kl"])
            alignment.append(sum(r["cka"]) / 2)
            layer_1.append(r["cka"][1])
            groups.append(path.name)
    overall = result["overall"]
    for x, one in ((alignment, overall), (layer_1, result["layers"][1])):
        assert one["pooled"]["spearman"]["coefficient"] == pytest.approx(stats.spearmanr(x, recovery).statistic)
        assert one["pooled"]["pearson"]["coefficient"] == pytest.approx(stats.pearsonr(x, recovery).statistic)
        centred = []
        for values in (x, recovery):
            parts = np.array(values).reshape(3, 8)
            centred.append((parts - parts.mean(axis=1, keepdims=True)).ravel())
        assert one["within"]["pearson"]["coefficient"] == pytest.approx(stats.pearsonr(*centred).statistic)
        means = [np.array(values).reshape(3, 8).mean(axis=1) for values in (x, recovery)]
        assert one["between"]["spearman"]["coefficient"] == pytest.approx(stats.spearmanr(*means).statistic)
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    assert result["checkpoints"] == overall["pooled"]["spearman"]["n"] == overall["within"]["pearson"]["n"] == 24
    assert overall["between"]["pearson"]["n"] == 3
    assert overall["within"]["spearman"]["shift_p_value"] > 0
    assert [p["recovery"] for p in result["points"]] == pytest.approx(recovery)
    assert [p["alignment"] for p in result["points"]] == pytest.approx(alignment)
    assert [p["run"] for p in result["points"]] == groups
    assert result["points"][0]["recovery"] == 0
    about = result["runs"][2]
    assert (about["name"], about["student"], about["constraint"], about["degraded_kl"]) == (
        "three",
        "three",
        "grid",
        4.0,
    )
    assert (about["checkpoints"], about["layers"], about["left_out"], about["finished"]) == (8, [0, 1], [], True)
    assert overall["disagree"] == {"spearman": False, "pearson": False}
    assert result["notes"] == [
        "Intervals resample checkpoints as if independent and are too narrow; with 8 runs or more they resample whole "
        "runs."
    ]


def test_sentences_say_what_was_found_and_where_it_stands(three: list[Path]) -> None:
    result = correlate(three, permutations=2000)
    within, between, pooled, layers, caution = texts(result)
    spearman = result["overall"]["within"]["spearman"]
    assert within.startswith("Within runs (24 checkpoints of 3 runs) recovery and alignment rise and fall together: a ")
    assert f"Spearman {spearman['coefficient']:.2f} (95% interval {spearman['low']:.2f} to " in within
    assert f"{spearman['shift_p_value']:.2g} by circular shifts, which keep the checkpoints' order" in within
    assert between.startswith(
        "Between runs (3 run means) no relation of recovery and alignment can be told from chance."
    )
    assert between.endswith("With 3 runs Spearman's p-value can't be below 0.33.")
    assert pooled.endswith("This mixes the two above and takes every checkpoint for independent.")
    assert layers.startswith("By layer, Spearman within runs goes from ")
    assert layers.endswith("the layers' p-values are not adjusted for being 2.")
    assert caution == CAUTION
    assert "nothing of cause" in caution
    for sentence in result["sentences"]:
        for pointer in sentence["rests_on"]:
            at: Any = result
            for part in pointer.split("/")[1:]:
                at = at[int(part)] if isinstance(at, list) else at[part]
            assert at is not None


def test_simpsons_paradox_is_flagged(tmp_path: Path) -> None:
    """Each run realigns as it recovers; runs that start better aligned recover less."""
    paths = []
    for g in range(4):
        rows = [row(t, 2.0 * (0.2 + 0.2 * g - 0.02 * t), [0.2 + 0.2 * g + 0.01 * t]) for t in range(1, 7)]
        paths.append(make_run(tmp_path / f"run{g}", rows))
    result = correlate(paths, permutations=500)
    for key in MEASURES:
        signs = [np.sign(result["overall"][level][key]["coefficient"]) for level in LEVELS]
        assert signs == [-1, 1, -1]
        assert result["overall"]["disagree"][key] is True
        assert result["layers"][0]["disagree"][key] is True
    said = next(text for text in texts(result) if "Simpson" in text)
    assert said.startswith("Pooled and within runs differ in sign (Spearman and Pearson): ")
    assert "move against each other: a " in next(text for text in texts(result) if text.startswith("Pooled ("))
    # the runs have no row of the degraded student, so its KL is the summary's
    assert result["points"][0]["recovery"] == pytest.approx(0.82)


def test_one_run_has_no_between_and_says_how_little_it_shows(tmp_path: Path) -> None:
    result = correlate([make_run(tmp_path / "run", curve(6))])
    within, layers, _ = texts(result)
    assert layers.startswith("By layer")
    assert "(6 checkpoints of 1 run) no relation of recovery and alignment can be told from chance" in within
    assert within.endswith("With so few checkpoints the p-value of shifts can't be below 0.17.")
    assert result["overall"]["within"]["spearman"]["p_value"] == pytest.approx(2 / math.factorial(6))
    assert result["overall"]["pooled"]["spearman"]["coefficient"] == pytest.approx(1.0)
    assert result["overall"]["between"]["spearman"]["coefficient"] is None
    assert "1 run; a correlation between runs needs 3 or more" in "\n".join(lines(result))


def test_autocorrelation_can_outweigh_a_small_p_of_shuffling(tmp_path: Path) -> None:
    """Two slow waves a quarter out of step after a common turn: half of all shifts are as extreme."""
    t = np.arange(40)
    x, y = np.sin(2 * np.pi * t / 40), np.sin(2 * np.pi * t / 40 + 0.9)
    rows = [row(int(i), 1.0 - 0.4 * b, [0.5 + 0.4 * a]) for i, a, b in zip(t, x, y, strict=True)]
    result = correlate([make_run(tmp_path / "run", rows)], permutations=999)
    spearman = result["overall"]["within"]["spearman"]
    assert spearman["p_value"] <= 0.01
    assert spearman["shift_p_value"] > 0.2
    assert "can be told from chance" in texts(result)[0]
    assert texts(result)[0].endswith("the p-value of shifts counts here.")


def test_the_recovered_model_counts_once(tmp_path: Path) -> None:
    rows = [*curve(5), row(40, 0.7, [0.7, 0.7], "recovered")]
    result = correlate([make_run(tmp_path / "again", rows)])
    assert result["checkpoints"] == 5
    why = "the checkpoint of this step, measured again after saving"
    assert result["runs"][0]["left_out"] == [{"step": 40, "stage": "recovered", "why": why}]
    assert f"again, step 40 (recovered), left out: {why}." in result["notes"]
    rows = [*curve(5), row(45, 0.7, [0.7, 0.7], "recovered")]
    assert correlate([make_run(tmp_path / "new", rows)])["checkpoints"] == 6
    rows = [row(0, 2.0, [0.5, 0.5], "degraded"), row(0, 1.0, [0.6, 0.6], "repaired"), *curve(5)[1:]]
    assert correlate([make_run(tmp_path / "repaired", rows)])["checkpoints"] == 6


def test_missing_values_leave_out_what_they_touch(tmp_path: Path) -> None:
    rows = curve(6)
    rows[2]["kl"] = None
    rows[3]["cka"][1] = None
    for r in rows:
        r["cka"].append(None)  # a layer without CKA anywhere is no layer of the mean
        r["reference_layers"] = [0, 1, 2]
    result = correlate([make_run(tmp_path / "run", rows)])
    assert result["checkpoints"] == 4
    assert [layer["pooled"]["spearman"]["n"] for layer in result["layers"]] == [5, 4]
    assert result["runs"][0]["left_out"] == [
        {"step": 20, "stage": "training", "why": "KL is not a number"},
        {"step": 30, "stage": "training", "why": "1 of 2 layers have no CKA"},
    ]
    assert [p["alignment"] is None for p in result["points"]] == [False, False, True, False, False]


def test_layers_are_the_references(tmp_path: Path) -> None:
    """A student of two layers out of three, beside one of three."""
    pruned = make_run(tmp_path / "pruned", [r | {"reference_layers": [0, 2]} for r in curve(5)])
    rows = [r | {"cka": [*r["cka"], 0.9 + r["step"] / 1000], "reference_layers": [0, 1, 2]} for r in curve(5)]
    full = make_run(tmp_path / "full", rows)
    result = correlate([pruned, full], permutations=50)
    assert [(one["layer"], one["pooled"]["spearman"]["n"]) for one in result["layers"]] == [(0, 10), (1, 5), (2, 10)]
    assert [about["layers"] for about in result["runs"]] == [[0, 2], [0, 1, 2]]


def test_constant_alignment_is_said(tmp_path: Path) -> None:
    rows = [row(t, 2.0 - 0.1 * t, [0.5, 0.5]) for t in range(5)]
    result = correlate([make_run(tmp_path / "run", rows)])
    assert texts(result) == [
        "Within runs there is no correlation to give: alignment is the same all along each run.",
        CAUTION,
    ]
    assert result["layers"][0]["pooled"]["pearson"]["reason"] == "CKA is the same at every point"
    assert "alignment is the same at every point" in "\n".join(lines(result))


def test_notes_on_runs_that_belong_together(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", curve(5)), make_run(tmp_path / "b", curve(5, level=0.1), reference="other")]
    paths.append(make_run(tmp_path / "c", curve(5, level=0.2), degraded=None))
    notes = correlate(paths, permutations=50)["notes"]
    assert "The 3 runs start from 1 student: they are not independent." in notes
    assert any("compared with 2 references; layers of one number are the same layer only where" in n for n in notes)
    assert "c is unfinished; its checkpoints so far are used." in notes


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "run", curve(4)) for folder in "ab"]
    assert [about["name"] for about in correlate(paths, permutations=20)["runs"]] == [str(path) for path in paths]


def test_the_file_is_the_result(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "place"
    result = correlate([str(path) for path in three], str(out), permutations=100, seed=3)
    assert json.loads((out / "correlation.json").read_text()) == result
    assert [path.name for path in out.iterdir()] == ["correlation.json"]
    assert (result["permutations"], result["seed"], result["confidence"]) == (100, 3, 0.95)
    again = correlate(three, out, permutations=100, seed=3)
    assert again == result
    assert correlate(three, permutations=100, seed=4) != result


def test_lines_hold_the_tables_sentences_and_notes(three: list[Path]) -> None:
    result = correlate(three, permutations=200)
    shown = lines(result)
    assert shown[0].startswith("recovery: 1 - KL / KL of the degraded student")
    assert shown[1].startswith("alignment: mean CKA")
    assert all(len(line) <= 80 for line in shown[:15])  # the tables; sentences wrap
    assert [line.split()[0] for line in shown[4:10:2]] == ["pooled", "within", "between"]
    spearman = result["overall"]["within"]["spearman"]
    assert f"{spearman['coefficient']:.2f}  {spearman['low']:.2f} to {spearman['high']:.2f}" in shown[6]
    assert shown[13].split() == [
        "0",
        *[f"{result['layers'][0][a][b]['coefficient']:.2f}" for a in LEVELS for b in MEASURES],
    ]
    for text in texts(result):
        assert text in shown
    assert f"note: {result['notes'][0]}" in shown


def test_paths_and_settings_that_are_refused(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = three[0]
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: correlate([]), "no run is given; name the directories of one or more recovery runs"),
        (lambda: correlate([*three, tmp_path / "nowhere"]), r"nowhere is no remend run: it has no manifest\.json"),
        (
            lambda: correlate([one, one.parent / "two" / ".." / "one"]),
            r"one and .*one are the same run; name each once",
        ),
        (lambda: correlate(three, tmp_path / "file"), r"out .*file is a file; name a directory, correlation\.json is"),
        (lambda: correlate(three, permutations=0), "permutations is 0"),
        (lambda: correlate(three, seed=-1), "seed -1"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


BARE = [row(t, 1.0 - 0.1 * t, [0.5 + 0.1 * t]) for t in range(4)]


@pytest.mark.parametrize(
    ("rows", "degraded", "message"),
    [
        (None, 2.0, r"run has no track\.jsonl; measure it with: remend track .*run"),
        ([], 2.0, r"run has no track\.jsonl; measure it with: remend track .*run"),
        (curve(2), 2.0, r"2 measurements in all; a correlation needs 3 or more\. Give more runs, or"),
        (curve(1), 2.0, "1 measurement in all"),
        ([row(i, 1.0, [None]) for i in range(3)], 2.0, "0 measurements in all"),
        (BARE, None, "does not say the degraded student's KL"),
        ([row(0, None, [0.5], "degraded"), *BARE[1:]], 2.0, "does not say the degraded student's KL"),
        (BARE, 0.0004, r"has no measurable damage: the degraded student's KL is 0\.0004 nats per token"),
        ("[]\n", 2.0, r"track\.jsonl, line 1, can't be read: it holds a list"),
        ("{nothing\n", 2.0, r"track\.jsonl, line 1, can't be read: not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_that_are_refused(
    tmp_path: Path, rows: list[dict] | str | None, degraded: float | None, message: str
) -> None:
    text = rows if isinstance(rows, str) else None
    run = make_run(tmp_path / "run", [] if isinstance(rows, str) else rows, degraded=degraded, text=text)
    with pytest.raises((InputError, FileError), match=message):
        correlate([run])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": "high"}, "kl = 'high'. A row needs step, stage, kl, and for each of"),
        ({"cka": [0.5]}, r"1 values of cka for the reference_layers \[0, 1\]"),
        ({"cka": 3, "kl": "x"}, "kl = 'x', cka = 3"),
        ({"cka": [0.5, "x"]}, r"cka = \[0.5, 'x'\]"),
        ({"reference_layers": [1, 1]}, r"2 values of cka for the reference_layers \[1, 1\]"),
    ],
)
def test_rows_that_can_not_be_read(tmp_path: Path, change: dict, message: str) -> None:
    rows = curve(4)
    rows[1] |= change
    with pytest.raises(InputError, match=rf"track\.jsonl, row 2: missing or wrong: {message}"):
        correlate([make_run(tmp_path / "run", rows)])


def test_a_manifest_that_can_not_be_read(tmp_path: Path) -> None:
    damaged = make_run(tmp_path / "damaged", curve(4))
    (damaged / MANIFEST).write_text("{")
    with pytest.raises(FileError, match=r"manifest\.json can't be read"):
        correlate([damaged])
