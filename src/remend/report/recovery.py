"""The page of a recovery: gap closed, training, samples side by side, how to rerun it. Reads run files only."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from remend.files.atomic import JsonRow, read_json
from remend.files.run_directory import MANIFEST, RECIPE, TRACK, RunDirectory
from remend.maths.gap import bootstrap_gap_closed
from remend.report import samples
from remend.report.charts import Forest, Share
from remend.report.page import Answer, Block, Code, Facts, Figure, Page, Samples, Section, Table, Text
from remend.report.tracks import alignment
from remend.report.training import figures
from remend.report.words import last_part, machine_facts, percent
from remend.report.writing import write_page

Rows = Sequence[JsonRow]


def table(summary: JsonRow) -> list[dict[str, str]]:
    """The rows that terminal and page show: label, degraded, recovered, gap."""
    before, after, gap = summary["degraded"], summary["recovered"], summary["gap_closed"] or {}
    labels = (
        ("kl", "KL to the reference, on its answers (nats a token)", "{:.3f}"),
        ("kl_on_policy", "KL to the reference, on the student's own answers", "{:.3f}"),
        ("top1_agreement", "top-1 agreement with the reference", "{:.1%}"),
        ("perplexity", "perplexity of the reference's answers", "{:.2f}"),
    )
    rows = _repair_row(summary) + [
        {
            "label": label,
            "degraded": form.format(before[key]),
            "recovered": form.format(after[key]),
            "gap": percent(gap.get(key))
            if key != "perplexity"
            else f"reference: {summary['reference_perplexity']:.2f}",
        }
        for key, label, form in labels
        if before[key] is not None  # a cached reference can't score the student's own answers
    ]
    return rows + [row for name, sides in summary.get("streams", {}).items() for row in _stream(name, sides)]


def _repair_row(summary: JsonRow) -> list[dict[str, str]]:
    repair, before = summary.get("repair"), summary["degraded"]["kl"]
    if not repair:
        return []
    when = "before the first step" if repair.get("kept", True) else "undone, since it made things worse"
    fitted = f"; {own:.3f} on the text it was fitted to" if (own := repair.get("kl_fitted")) is not None else ""
    label = f"KL after one-shot repair ({repair['seconds']:.0f} s{fitted}), {when}"
    row = {"label": label, "degraded": f"{before:.3f}", "recovered": f"{repair['kl']:.3f}"}
    return [{**row, "gap": percent(1 - repair["kl"] / before) if before > 0 else "–"}]


def _stream(name: str, figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    labels = {"kl": "KL to its teacher (nats a token)", "nll": "negative log-likelihood of the answers (nats a token)"}
    before, after = figures["before"], figures["after"]
    return [
        {"label": f"{name}: {label}", "degraded": f"{before[key]:.3f}", "recovered": f"{after[key]:.3f}", "gap": "–"}
        for key, label in labels.items()
    ]


def verdict(summary: JsonRow) -> str:
    """One sentence: how much of the gap was closed, with its interval."""
    gap, interval = summary["gap_closed"], summary["gap_closed_kl_95"]
    if gap is None:
        return "No measurable damage: the KL to the reference is below 0.001 nats a token, so there is no gap to close."
    text = f"{percent(gap['kl'])} of the KL gap closed"
    if interval:
        low, high = map(percent, interval)
        text += f" (95% interval {low} to {high}, paired over {summary['held_out_prompts']} held-out prompts)"
    return text + "."


def write_report(directory: Path, summary: JsonRow) -> Path:
    """Write report.html, report.md and report.json beside the run's other files; what a model wrote is escaped."""
    return write_page(directory, recovery_page(directory, summary))


def recovery_page(directory: Path, summary: JsonRow) -> Page:
    """The page of the run in `directory`; its summary may not be written yet."""
    files, manifest = RunDirectory(directory), read_json(directory / MANIFEST)
    track = files.rows(TRACK)
    sections = [
        _gap(files, summary, manifest),
        Section("Training", "training", figures(files, summary, manifest)),
        Section("What the three models say", "samples", [_samples(files.rows("samples.jsonl"), manifest)]),
        *([alignment(track)] if track else []),
        Section("How to rerun this", "rerun", _rerun(directory, summary, manifest)),
    ]
    student, teacher = last_part(manifest["recipe"]["student"]), last_part(manifest["reference"])
    return Page(
        title=f"{student}, recovered with {teacher} as teacher",
        verdict=verdict(summary),
        about="Measured on the recovered model as saved and loaded again, on held-out prompts.",
        sections=sections,
        warnings=list(summary["warnings"]),
    )


def _gap(files: RunDirectory, summary: JsonRow, manifest: JsonRow) -> Section:
    rows = [_with_reference(row) for row in table(summary)]
    note = (
        f"KL is {summary['kl_direction']}, in nats a token over the full shared vocabulary of "
        f"{manifest['shared_vocabulary']} ids. Gap closed: 0% is the degraded student, 100% the reference."
    )
    grid = Table(["on held-out prompts", "degraded", "recovered", "reference", "gap closed"], rows, emphasis=4)
    if summary["gap_closed"] is None:
        return Section("Gap closed", "gap", [grid, Text(note, "soft")])
    figure = Figure(
        [Forest("Gap closed, with 95% intervals", _intervals(files, summary), "share of the gap closed")],
        see="How far from the degraded student (0%) to the reference (100%) each measure came back. Bars that do not "
        "cross 0% are recovery beyond chance.",
        measured=f"On {summary['held_out_prompts']} held-out prompts. Bars: percentile bootstrap with prompts "
        "resampled in pairs. An open marker has no interval: it was measured once.",
    )
    return Section("Gap closed", "gap", [figure, grid, Text(note, "soft")])


def _with_reference(row: Mapping[str, str]) -> list[str]:
    """The row's cells with the reference's own figure in a column of its own."""
    label, gap = row["label"], row["gap"]
    if gap.startswith("reference: "):
        theirs, gap = gap.removeprefix("reference: "), "–"
    else:
        theirs = "0" if label.startswith("KL ") else "100%" if label.startswith("top-1") else "–"
    return [label, row["degraded"], row["recovered"], theirs, gap]


def _intervals(files: RunDirectory, summary: JsonRow) -> list[Share]:
    gap, ends = summary["gap_closed"], summary["gap_closed_kl_95"] or (None, None)
    rows = []
    repair, before = summary.get("repair"), summary["degraded"]["kl"]
    if repair and before > 0:
        rows.append(Share("KL after repair alone", 1 - repair["kl"] / before, *(_repaired(files) or (None, None))))
    rows.append(Share("KL, on the reference's answers", gap.get("kl"), *ends))
    rows.append(Share("KL, on its own answers", gap.get("kl_on_policy")))
    rows.append(Share("top-1 agreement", gap.get("top1_agreement")))
    return [row for row in rows if row.value is not None]


def _repaired(files: RunDirectory) -> tuple[float, float] | None:
    """The interval of what repair alone closed, from the sums by prompt; None where they are not there."""
    before = {r["id"]: r["kl_sum_degraded"] for r in files.rows("held_out.jsonl")}
    after = {r["id"]: r["kl_sum"] for r in files.rows("held_out_repaired.jsonl")}
    both = [i for i in before if i in after]
    return bootstrap_gap_closed([before[i] for i in both], [after[i] for i in both]) if both else None


def _samples(rows: Rows, manifest: JsonRow) -> Samples:
    shown = []
    for row in rows:
        reference = row["reference"]
        answers = [Answer("reference", "reference", [samples.plain(reference)])]
        answers += [Answer(name, name, [samples.marked(row[name], reference)]) for name in ("degraded", "recovered")]
        shown.append((row["prompt"], answers))
    limit = f" of {manifest['answer_tokens']} tokens" if manifest.get("answer_tokens") else ""
    return Samples(
        shown,
        "Greedy answers to the first held-out prompts, none chosen by hand; “…” marks an answer that met the limit"
        f"{limit}. Marked words are not the reference's: another answer may be as good.",
    )


def _rerun(directory: Path, summary: JsonRow, manifest: JsonRow) -> list[Block]:
    recipe = directory / RECIPE
    facts = [
        ("student", manifest["recipe"]["student"]),
        ("teacher", manifest["reference"]),
        ("constraint held", summary["constraint"]),
        ("training loss", f"{summary['training_loss']}, on the student's own rollouts"),
        (
            "budget",
            f"{summary['steps']} steps, {summary['tokens_trained']} completion tokens, {summary['seconds']:.0f} s in "
            f"all ({summary['training_seconds']:.0f} s training), {summary['peak_rss_mib']} MiB peak memory",
        ),
        ("prompts", f"{manifest['prompts']['train']} for training, {manifest['prompts']['held_out']} held out"),
        ("seed", str(manifest["recipe"]["seed"])),
        *machine_facts(manifest, manifest["dtype"]),
        *(("note", note) for note in summary["notes"]),
    ]
    command = shlex.join(["remend", "recover", str(recipe), "out=NEW_DIRECTORY"])
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else json.dumps(manifest["recipe"], indent=2)
    return [
        Code(command),
        Facts([(name, str(value)) for name, value in facts]),
        Code(text.rstrip("\n"), folded=f"The recipe ({RECIPE})"),
        Code(json.dumps(manifest, indent=1, ensure_ascii=False), folded=f"The manifest ({MANIFEST})"),
    ]
