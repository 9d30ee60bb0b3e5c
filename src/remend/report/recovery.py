"""The page of a recovery: gap closed, training, samples side by side, how to rerun it. Reads run files only."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from remend.files.atomic import JsonRow
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST, RECIPE, TRACK, WORST, RunDirectory
from remend.report import samples
from remend.report.charts import Points, Scatter, Share, shortened
from remend.report.next_steps import next_steps
from remend.report.page import Answer, Block, Code, Facts, Figure, Page, Samples, Section, Table, Text, Tile
from remend.report.scores import Scores, score_section, scores_of
from remend.report.tracks import alignment
from remend.report.training import figures
from remend.report.words import last_part, machine_facts, number, percent
from remend.report.writing import write_page

Rows = Sequence[JsonRow]


def table(summary: JsonRow) -> list[dict[str, str]]:
    """The rows that terminal and page show: label, degraded, recovered, gap."""
    before, after, gap = summary["degraded"], summary["recovered"], summary["gap_closed"] or {}
    labels = (
        ("kl", "KL to the reference, on its answers (nats per token)", "{:.3f}"),
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
    row = {"label": label, "degraded": f"{before:.3f}", "recovered": f"{repair['kl']:.3f} (repaired)"}
    return [{**row, "gap": percent(1 - repair["kl"] / before) if before > 0 else "–"}]


def _stream(name: str, figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    labels = {
        "kl": "KL to its teacher (nats per token)",
        "nll": "negative log-likelihood of the answers (nats per token)",
    }
    before, after = figures["before"], figures["after"]
    return [
        {"label": f"{name}: {label}", "degraded": f"{before[key]:.3f}", "recovered": f"{after[key]:.3f}", "gap": "–"}
        for key, label in labels.items()
    ]


FEW = 16
"""An interval over fewer held-out prompts says too little to be shown."""

KEPT, NEARLY = 0.01, 0.25
"""Nats a token: a stream that holds the student to where it began was kept below the first, nearly kept below the
second. They are the limits below which a diagnosis calls damage none and mild."""


def gap_share(summary: JsonRow, name: str = "") -> Share:
    """The share of the KL gap that was closed, with its interval where enough prompts carry one."""
    few = summary["held_out_prompts"] < FEW
    ends = None if few else summary["gap_closed_kl_95"]
    return Share(name, (summary["gap_closed"] or {}).get("kl"), *(ends or (None, None)))


def kept_streams(summary: JsonRow) -> dict[str, float]:
    """The streams that hold the student to itself as it came in, with the KL that they ended at; it began at 0."""
    sides: Mapping[str, JsonRow] = summary.get("streams", {})
    return {
        name: float(side["after"]["kl"])
        for name, side in sides.items()
        if side.get("teacher", "initial") == "initial" and side["before"]["kl"] < 1e-3
    }


def kept_word(kl: float) -> str:
    """'kept', 'nearly kept' or 'not kept'."""
    return "kept" if kl < KEPT else "nearly kept" if kl < NEARLY else "not kept"


def verdict(summary: JsonRow) -> str:
    """Whether the task was kept, how much of the gap was closed, and what of that repair did and what training."""
    kept = [
        f"Stream {name}: {kept_word(kl)} (KL {kl:.3f} nats per token to the student as it came in)."
        for name, kl in kept_streams(summary).items()
    ]
    return " ".join([*kept, _closed(summary)])


def _closed(summary: JsonRow) -> str:
    share = gap_share(summary)
    if share.value is None:
        return (
            "No measurable damage: the KL to the reference is below 0.001 nats per token, so there is no gap to close."
        )
    count = summary["held_out_prompts"]
    text = f"{percent(share.value)} of the KL gap closed"
    if share.low is not None:
        text += f" (95% interval {percent(share.low)} to {percent(share.high)}, paired over {count} held-out prompts)"
    parts = _parts(summary)
    if parts:
        repaired, trained = parts
        rest = f"training {percent(trained)} more" if trained > -0.005 else f"training took {percent(-trained)} away"
        text += f": repair closed {percent(repaired)}, {rest if summary['steps'] else 'and nothing was trained'}"
    text += "."
    if share.value < 0:
        text += " The model is further from the reference than it was."
    if count < FEW:
        text += (
            f" {count} held-out prompt{'s are' if count > 1 else ' is'} too few for an interval: take {FEW} or more."
        )
    elif share.tone == "":
        text += " The interval holds 0%, so this may be chance."
    return text


def _parts(summary: JsonRow) -> tuple[float, float] | None:
    """What repair and what training closed of the KL gap; None where nothing was repaired."""
    repair, before = summary.get("repair"), summary["degraded"]["kl"]
    if not repair or not repair.get("kept", True) or before <= 0 or summary["gap_closed"] is None:
        return None
    repaired = 1 - repair["kl"] / before
    return repaired, summary["gap_closed"]["kl"] - repaired


def _worth(summary: JsonRow) -> list[Block]:
    """What repair and training took and won, and why training ended early."""
    lines: list[Block] = []
    if parts := _parts(summary):
        text = f"Repair took {summary['repair']['seconds']:.0f} s and closed {percent(parts[0])} of the gap."
        if summary["steps"]:
            text += f" Training took {summary['training_seconds']:.0f} s; it closed {percent(parts[1])} of the gap."
        lines.append(Text(text))
    if ended := summary.get("ended"):
        lines.append(Text(f"By steps: auto, {ended['why']}."))
    return lines


def write_report(directory: Path, summary: JsonRow) -> Path:
    """Write report.html, report.md and report.json beside the run's other files; what a model wrote is escaped."""
    return write_page(directory, recovery_page(directory, summary))


def recovery_page(directory: Path, summary: JsonRow) -> Page:
    """The page of the run in `directory`; its summary may not be written yet."""
    files, manifest = RunDirectory(directory), read_object(directory / MANIFEST)
    track, scores, worst = files.rows(TRACK), scores_of(directory, manifest), files.rows(WORST)
    sections = [
        _gap(files, summary, manifest),
        *score_section(scores),
        Section("What the three models say", "samples", [_samples(files.rows("samples.jsonl"), manifest)]),
        *([Section("The worst held-out prompts", "worst", [_worst(worst, files)])] if worst else []),
        Section("What to do next", "next", next_steps(directory, summary, manifest)),
        Section("Training", "training", [*_worth(summary), *figures(files, summary, manifest)]),
        *([alignment(track)] if track else []),
        Section("How to rerun this", "rerun", _rerun(directory, summary, manifest)),
    ]
    return Page(
        title=title(manifest),
        verdict=verdict(summary),
        about="Measured on the recovered model as saved and loaded again, on held-out prompts.",
        sections=sections,
        warnings=list(summary["warnings"]),
        tiles=_tiles(summary, scores),
    )


def title(manifest: JsonRow) -> str:
    """Of a recovery's page."""
    student, teacher = last_part(manifest["recipe"]["student"]), last_part(manifest["reference"])
    return f"{student}, recovered with {teacher} as teacher"


def _tiles(summary: JsonRow, scores: Scores) -> list[Tile]:
    """The figures that decide whether the model is used: the task, the gap, what is left of the damage."""
    tiles = []
    for name, kl in kept_streams(summary).items():
        tone: Literal["good", "bad", ""] = "good" if kl < KEPT else "" if kl < NEARLY else "bad"
        note = f"KL {kl:.3f} to the student as it came in; a task score says it better"
        tiles.append(Tile(f"Stream {name}", kept_word(kl), note, tone))
    for task, by_role in list(scores.items())[:2]:
        if "recovered" in by_role:
            others = [f"{role} {by_role[role].value:.1%}" for role in ("degraded", "reference") if role in by_role]
            tiles.append(Tile(f"Score on {task}", f"{by_role['recovered'].value:.1%}", ", ".join(others)))
    share = gap_share(summary)
    if share.value is not None:
        ends = f"95% interval {percent(share.low)} to {percent(share.high)}" if share.low is not None else "no interval"
        tiles.append(Tile("KL gap closed", percent(share.value), ends, share.tone))
    if parts := _parts(summary):
        trained = f"training {percent(parts[1])} more"
        tiles.append(
            Tile("Of that by repair", percent(parts[0]), trained if summary["steps"] else "nothing was trained")
        )
    before, after = summary["degraded"], summary["recovered"]
    tiles.append(Tile("KL to the reference", number(after["kl"]), f"degraded {number(before['kl'])}, nats per token"))
    agreed = f"degraded {before['top1_agreement']:.0%}, reference 100%"
    tiles.append(Tile("Same first choice", f"{after['top1_agreement']:.0%}", agreed))
    return tiles


LABELS = {
    "kl": "KL to the reference, on its answers (nats per token)",
    "kl_on_policy": "KL to the reference, on the student's own answers",
    "top1_agreement": "top-1 agreement with the reference",
    "perplexity": "perplexity of the reference's answers",
}
FORMS = {"kl": ".3f", "kl_on_policy": ".3f", "top1_agreement": ".1%", "perplexity": ".2f"}


def _gap(files: RunDirectory, summary: JsonRow, manifest: JsonRow) -> Section:
    before, after, gap = summary["degraded"], summary["recovered"], summary["gap_closed"] or {}
    repair = summary.get("repair") or {}
    theirs = {"kl": 0.0, "kl_on_policy": 0.0, "top1_agreement": 1.0, "perplexity": summary["reference_perplexity"]}
    share = gap_share(summary)
    rows, tones = [], []
    for key, label in LABELS.items():
        if before[key] is None:  # a cached reference can't score the student's own answers
            continue
        sides = [before[key], *([repair.get(key)] if repair else []), after[key], theirs[key]]
        closed = share.words() if key == "kl" else percent(gap.get(key))
        rows.append([label, closed, *(number(side, FORMS[key]) for side in sides)])
        tones.append(share.tone if key == "kl" else "")
    for name, side in summary.get("streams", {}).items():
        labels = {"kl": "KL to its teacher", "nll": "negative log-likelihood of the answers"}
        for key, label in labels.items():
            ends = number(side["before"][key]), *(["–"] if repair else []), number(side["after"][key])
            rows.append([f"{name}: {label} (nats per token)", "–", *ends, "–"])
            tones.append("")
    columns = ["on held-out prompts", "gap closed", "degraded", *(["repaired"] if repair else []), "recovered"]
    note = (
        f"KL is {summary['kl_direction']}, in nats per token over the full shared vocabulary of "
        f"{manifest['shared_vocabulary']} ids. Gap closed: 0% is the degraded student, 100% the reference; its "
        "interval is a 95% percentile bootstrap with prompts resampled in pairs. The other figures have none."
    )
    blocks: list[Block] = [Table([*columns, "reference"], rows, emphasis=1, tones=tones)]
    if repair:
        blocks.append(Text(_repaired(repair), "soft"))
    blocks.append(Text(note, "soft"))
    return Section("Gap closed", "gap", [*blocks, *_by_prompt(files)])


def _repaired(repair: JsonRow) -> str:
    """What the closed-form repair took, and what became of it."""
    fitted = f", where the text that it was fitted to has KL {own:.3f}" if (own := repair.get("kl_fitted")) else ""
    undone = "" if repair.get("kept", True) else " It made things worse, so it was undone before the first step."
    held_back, unexplained = (", ".join(map(str, repair.get(k) or ())) for k in ("held_back", "unexplained"))
    notes = f" It left blocks {held_back} as they came, since it did harm on text held apart." if held_back else ""
    notes += f" What blocks {unexplained} add to the residual stream is not known." if unexplained else ""
    took = f"Repaired: after the closed-form repair of {repair['seconds']:.0f} s, before the first step{fitted}."
    return took + undone + notes


def _by_prompt(files: RunDirectory) -> list[Figure]:
    """Each held-out prompt's KL before and after: whether all came nearer, and which are left behind."""
    rows = [row for row in files.rows("held_out.jsonl") if row["tokens"]]
    if not rows:
        return []
    texts = _prompt_texts(files)
    points = []
    for row in rows:
        before, after = (row[key] / row["tokens"] for key in ("kl_sum_degraded", "kl_sum_recovered"))
        said = f"{texts.get(row['id'], row['id'])}: KL {before:.3f} → {after:.3f}"
        points.append((before, after, said))
    better = sum(after < before for before, after, _ in points)
    chart = Scatter(
        "Each held-out prompt, before and after",
        [Points("a held-out prompt", points, joined=False)],
        "KL of the degraded model, nats per token",
        "KL of the recovered one",
        diagonal="no change",
    )
    return [
        Figure(
            [chart],
            see=f"{better} of {len(points)} prompts are below the line: there the model came nearer to the reference. "
            "The height of a point is what is left of the damage; those at the top are shown token by token below.",
            measured="KL to the reference over its answer to the prompt. Hover a point for its prompt.",
        )
    ]


def _prompt_texts(files: RunDirectory) -> dict[str, str]:
    """The prompts whose text a run's files keep, by id, each on one line and cut."""
    rows = [*files.rows("samples.jsonl"), *files.rows(WORST)]
    return {row["id"]: shortened(" ".join(row["prompt"].split()), 80) for row in rows}


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
        f"{limit}. Underlined words are not the reference's: another answer may be as good.",
    )


def _worst(rows: Rows, files: RunDirectory) -> Samples:
    """The prompts where the recovered model is furthest off, each token coloured by its KL."""
    sums = {row["id"]: row["kl_sum_degraded"] / row["tokens"] for row in files.rows("held_out.jsonl") if row["tokens"]}
    shown = []
    for row in rows:
        label = f"the reference's answer: KL {row['kl']:.3f}" + (
            f", degraded {sums[row['id']]:.3f}" if row["id"] in sums else ""
        )
        answers = [Answer("reference", "reference", [samples.coloured(row["reference"], label)])]
        if "own" in row:
            own = row["own"]
            mean = sum(token["kl"] for token in own) / len(own) if own else None
            label = f"its own answer, sampled: KL {number(mean)}"
            answers.append(Answer("recovered", "recovered", [samples.coloured(own, label)]))
        shown.append((row["prompt"], answers))
    return Samples(
        shown,
        f"The {len(rows)} held-out prompts with the highest KL of the recovered model on the reference's answer, worst "
        "first; its own answer was sampled at temperature 1. Colours: KL of the reference's next-token distribution "
        "from the recovered model's at that token. Hover a token for its figure. Longer answers are cut.",
        samples.SCALE,
        filter="Show prompts and answers with",
    )


def _rerun(directory: Path, summary: JsonRow, manifest: JsonRow) -> list[Block]:
    recipe, began = directory / RECIPE, manifest.get("directory")
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
    # paths in the recipe are relative to where the run began
    command = f"cd {shlex.quote(began)}\n" if began else ""
    command += shlex.join(["remend", "recover", str(recipe.absolute() if began else recipe), "out=NEW_DIRECTORY"])
    for segment in summary.get("segments", []):
        command += f"\nremend recover --resume NEW_DIRECTORY steps={segment['steps']}"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else json.dumps(manifest["recipe"], indent=2)
    return [
        Code(command),
        Facts([(name, str(value)) for name, value in facts]),
        Code(text.rstrip("\n"), folded=f"The recipe ({RECIPE})"),
        Code(json.dumps(manifest, indent=1, ensure_ascii=False), folded=f"The manifest ({MANIFEST})"),
    ]
