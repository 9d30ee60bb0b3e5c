"""The page of a diagnosis: severity and sentences first, then behaviour, layers, answers, and how it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from remend.files.atomic import JsonRow
from remend.report import samples
from remend.report.charts import BARS, Forest, Lines, Series, Share
from remend.report.layers import changes, grids, layer_figures, layer_tables, norms, sites, student_style
from remend.report.page import Answer, Block, Code, Facts, Figure, Finding, Page, Samples, Section, Table, Text
from remend.report.pointers import traced
from remend.report.recovery import FEW
from remend.report.tracks import against, student_groups
from remend.report.words import last_part, machine_facts, number, percent
from remend.report.writing import write_page

Students = Sequence[JsonRow]


def write_diagnosis_report(directory: Path, diagnosis: JsonRow) -> Path:
    """Write report.html, report.md and report.json beside diagnosis.json.

    Args:
        directory: of the diagnosis.
        diagnosis: the content of diagnosis.json; numbers that were not finite are None.

    Returns:
        The path of report.html.
    """
    return write_page(directory, diagnosis_page(diagnosis))


def students_of(diagnosis: JsonRow) -> list[JsonRow]:
    """The first student, whose figures are at the top, and the others."""
    return [diagnosis, *diagnosis.get("others", [])]


def diagnosis_page(diagnosis: JsonRow) -> Page:
    """The page as data."""
    students = students_of(diagnosis)
    where: list[Block] = [*layer_figures(students, diagnosis["estimator"]), *changes(students)]
    where += [*layer_tables(students), grids(students, diagnosis["estimator"]), *sites(students)]
    sections = [
        Section("What was found", "found", _findings(students)),
        *_gap(students),
        Section("Behaviour", "behaviour", [_behaviour(students)]),
        Section("Layer by layer", "layers", where),
        Section("Along the answer", "along", _along(students)),
        Section("What the models say", "samples", [_samples(students)]),
        *_alignment(diagnosis),
        Section("Norms and outlier dimensions", "norms", norms(students)),
        Section("How this was measured", "measured", _measured(diagnosis)),
        Section("How to rerun this", "rerun", _rerun(diagnosis)),
    ]
    reference = last_part(diagnosis["reference"])
    names = " and ".join(student["name"] for student in students) if len(students) < 3 else f"{len(students)} models"
    return Page(
        title=f"Diagnosis of {names} against {reference}",
        verdict="; ".join(f"{s['name']}: {s['severity']}" for s in students) + ".",
        about=f"Measured on {diagnosis['sequences']} of the reference's own answers. Every sentence below names the "
        "places in diagnosis.json that are its evidence.",
        sections=sections,
        warnings=list(diagnosis["warnings"]),
    )


def _findings(students: Students) -> list[Block]:
    findings: list[Block] = []
    for i, student in enumerate(students):
        prefix = f"/others/{i - 1}" if i else ""
        said = [traced(sentence, student, prefix) for sentence in student["sentences"]]
        advice = traced(student["recommendation"], student, prefix)
        findings.append(Finding(student["name"], student["severity"], said, advice))
    return findings


def gaps_closed(students: Students, prefix: str = "") -> list[Share]:
    """What each student won back of the one that it is compared with."""
    pairs = [(student["name"], student["compared_with"]) for student in students if student.get("compared_with")]
    return [
        Share(
            f"{prefix}{name}, from {pair['name']}",
            pair.get("gap_closed_kl"),
            *((None if pair.get("rows", FEW) < FEW else pair.get("gap_closed_kl_95")) or (None, None)),
        )
        for name, pair in pairs
    ]


def _gap(students: Students) -> list[Section]:
    rows = gaps_closed(students)
    if not any(row.value is not None for row in rows):
        return []
    figure = Figure(
        [Forest("Gap closed in KL, with 95% intervals", rows, "share of the KL gap closed")],
        see="How far each model came back from the damaged one it is compared with (0%) to the reference (100%). "
        + BARS,
        measured="One minus the ratio of the two models' KL to the reference, on the same tokens; the interval is a "
        "percentile bootstrap with prompts resampled in pairs.",
    )
    return [Section("Gap closed", "gap", [figure])]


def _behaviour(students: Students) -> Table:
    def row(label: str, cell: Callable[[JsonRow], str], reference: str = "–") -> list[str]:
        return [label, reference, *(cell(student) for student in students)]

    def plain(key: str, form: str = ".3f") -> Callable[[JsonRow], str]:
        return lambda s: number(s["behaviour"][key], form)

    first = students[0]
    theirs, own = first["behaviour"], first["reference_answers"]
    rows = [
        row("KL(reference ‖ model), nats per token", plain("kl"), "0"),
        row("its 95% interval", _interval),
        row("reverse KL(model ‖ reference), nats per token", plain("reverse_kl"), "0"),
        row("same first choice (top-1 agreement)", plain("top1_agreement", ".1%"), "100%"),
        row("entropy of the next token, nats", plain("entropy"), number(theirs["reference_entropy"])),
        row(
            "perplexity of the reference's answers", plain("perplexity", ".3g"), number(theirs["reference_perplexity"])
        ),
        row("rank of the reference's token, median (0 is the first choice)", plain("median_rank", "g")),
        row("rank of the reference's token, mean", plain("mean_rank", ".1f")),
        row("own answers: repeated 4-grams", _own("repetition"), percent(own["repetition"])),
        row("own answers: cut at the length limit", _own("clipped_share"), percent(own["clipped_share"])),
    ]
    return Table(
        ["", "reference", *(student["name"] for student in students)],
        rows,
        caption=f"Over {theirs['tokens']} tokens of the reference's answers, the same for all models; repetition and "
        f"length over each model's own greedy answers to {first['own_answers']['answers']} prompts. Interval of KL: "
        "95%, bootstrap over sequences.",
    )


def _interval(student: JsonRow) -> str:
    ends = student["behaviour"]["kl_95"]
    return f"{number(ends[0])} to {number(ends[1])}" if ends else "–"


def _own(key: str) -> Callable[[JsonRow], str]:
    return lambda student: percent(student["own_answers"][key])


def _along(students: Students) -> list[Block]:
    def lines(key: str, title: str, label: str, high: float | None) -> Lines:
        series = []
        for i, student in enumerate(students):
            rows = student["positions"]
            said = [
                f"{student['name']}: {number(r[key])} at token {r['position']}, {r['sequences']} sequences"
                for r in rows
            ]
            points = [(float(r["position"]), r[key]) for r in rows]
            series.append(Series(student["name"], student_style(i), points, dots=True, titles=said))
        return Lines(title, series, x_label="token of the answer", y_label=label, high=high)

    counts = [row["sequences"] for row in students[0]["positions"]]
    reach = f"from {counts[0]} sequences at the first token to {counts[-1]} at the last" if counts else "no sequences"
    measured = f"Means over sequences, teacher-forced on the reference's answers, {reach}: the last ones are noisier."
    figures: list[Block] = [
        Figure(
            [lines("kl", "KL by token position", "KL, nats", None)],
            see="Where in an answer a model leaves the reference. A line that rises says that errors build up along "
            "the answer; a peak at the start says that it begins its answers otherwise.",
            measured=measured,
        ),
        Figure(
            [lines("top1_agreement", "Agreement by token position", "same first choice", 1.0)],
            see="The share of sequences in which both models would write the same next token. The reference is 1.",
            measured=measured,
        ),
    ]
    stretches = _stretches(students)
    return figures + ([stretches] if stretches else [])


def _stretches(students: Students) -> Table | None:
    parts = {(r["start"], r["end"]): r["rows"] for student in students for r in student["stretches"]}
    if not parts:
        return None
    by_student = [{(r["start"], r["end"]): r for r in student["stretches"]} for student in students]
    rows = [
        [
            f"{start} to {end} ({count} rows)",
            *(number(by[start, end]["cka"]) if (start, end) in by else "–" for by in by_student),
        ]
        for (start, end), count in sorted(parts.items())
    ]
    return Table(
        ["CKA by stretch of the answer, tokens", *(student["name"] for student in students)],
        rows,
        caption="Mean over layers of the debiased linear CKA of the rows taken in that stretch. Stretches with fewer "
        "than 16 rows are left out; few rows make it noisy.",
    )


def _samples(students: Students) -> Samples:
    first, shown = students[0], []
    for i, sample in enumerate(first["samples"]):
        answers = [Answer("reference", "reference", [samples.plain(sample["reference"])])]
        for k, student in enumerate(students):
            texts = []
            if i < len(student["samples"]):
                texts.append(samples.marked(student["samples"][i]["student"], sample["reference"], "its own answer"))
            if i < len(student["token_kl"]):
                texts.append(samples.coloured(student["token_kl"][i], "the reference's answer, by KL"))
            answers.append(Answer(student["name"], student_style(k), texts))
        shown.append((sample["prompt"], answers))
    return Samples(
        shown,
        "Greedy answers to the first prompts, none chosen by hand; “…” marks an answer that met the limit. Colours: "
        "KL of the reference's next-token distribution from the model's, hover a token for its figure. Underlined "
        "words are not the reference's: another answer may be as good.",
        samples.SCALE,
    )


def _alignment(diagnosis: JsonRow) -> list[Section]:
    if not diagnosis.get("others"):
        return []
    figure = against(student_groups(diagnosis), "a model; a line leads from a damaged one to what was made of it")
    return [Section("Recovery against alignment", "alignment", [figure])]


def _measured(diagnosis: JsonRow) -> list[Block]:
    estimator, kl, agreement = diagnosis["estimator"], *(diagnosis["limits"][k] for k in ("kl", "top1_agreement"))
    students = students_of(diagnosis)
    rows = "; ".join(f"{s['name']} {s['rows']} ({s['rows_left_out']} left out)" for s in students)
    facts = [
        ("estimator", estimator["name"]),
        ("site", estimator["site"]),
        ("rows", estimator["row_policy"]),
        ("rows used", rows),
        ("interval", estimator["interval"]),
        ("null", estimator["null"]),
        ("anchors", "the reference against itself on a re-run, and against the same architecture at random weights"),
        ("shared neighbours", f"of the {estimator['neighbours']} nearest rows, the share that both models have"),
        ("arithmetic", f"models in {estimator['dtype']}"),
        (
            "severity",
            f"KL below {kl[0]:g}, {kl[1]:g}, {kl[2]:g} nats per token and agreement from {agreement[0]:.0%}, "
            f"{agreement[1]:.0%}, {agreement[2]:.0%} are none, mild, severe; beyond, broken. The worse of both counts, "
            "and a model that loops is broken.",
        ),
        (
            "data",
            f"{diagnosis['data']}; {diagnosis['sequences']} sequences, at most {diagnosis['max_new_tokens']} tokens",
        ),
        ("data hash", diagnosis["data_hash"]),
        ("seed", str(diagnosis["seed"])),
    ]
    return [Text(diagnosis["disclaimer"]), Facts([(name, str(value)) for name, value in facts])]


def _rerun(diagnosis: JsonRow) -> list[Block]:
    facts = [
        ("reference", diagnosis["reference"]),
        *(
            (f"student {student['name']}", f"{student['student']}, {student['kind']}")
            for student in students_of(diagnosis)
        ),
        *machine_facts(diagnosis["environment"]),
        ("time", f"{diagnosis['seconds']:.0f} s"),
    ]
    hashes = [(name, str(value)) for name, value in diagnosis["reference_files"].items()]
    return [Code(command(diagnosis)), Facts(facts), Facts(hashes, folded="SHA-256 of the reference's files")]


def command(diagnosis: JsonRow) -> str:
    """The command line that makes this diagnosis again, into a new directory."""
    ran = [str(word) for word in diagnosis["environment"].get("command", [])]
    if "diagnose" in ran and any(word.partition("=")[0] == "--out" for word in ran):
        return shlex.join(["remend", *_elsewhere(ran[ran.index("diagnose") :])])  # it has what the file does not record
    words = ["remend", "diagnose", "--reference", diagnosis["reference"]]
    for student in students_of(diagnosis):
        words += ["--student", student["student"]]
    if not diagnosis["data"].startswith("bundled"):
        words += ["--data", diagnosis["data"]]
    if diagnosis["sites"]:
        words += ["--sites", ",".join(["residual", *diagnosis["sites"]])]
    words += ["--rows", str(diagnosis["sequences"]), "--max-new-tokens", str(diagnosis["max_new_tokens"])]
    return shlex.join([*words, "--seed", str(diagnosis["seed"]), "--out", "NEW_DIRECTORY"])


def _elsewhere(words: Sequence[str]) -> list[str]:
    """The words of a command with a new directory for --out."""
    moved, after = [], False
    for word in words:
        named = word.startswith("--out=")
        moved.append("--out=NEW_DIRECTORY" if named else "NEW_DIRECTORY" if after else word)
        after = word == "--out"
    return moved
