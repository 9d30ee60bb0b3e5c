"""What the verbs print."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from remend.cli.show_check import size_in_words
from remend.console import PlainConsole
from remend.errors import printable
from remend.files.atomic import JsonRow
from remend.files.run_directory import MANIFEST, manifest_of

if TYPE_CHECKING:
    from remend.recovery.job import RecoverResult


def print_line(text: str) -> None:
    """One line on standard output, without what would steer a terminal."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def show_damage(model: str, out: str, done: JsonRow, seconds: float) -> None:
    """What a degradation of `model` made in so many seconds, on one line each, and what to do with it."""
    from remend.training.teachers import as_directory

    size = done["packed_bytes"] / 2**20
    bits = f"{done['bits_per_weight']:g} bits per weight, " if done.get("bits_per_weight") else ""
    what = " ".join(str(done[key]) for key in ("kind", "format", "method") if done.get(key))
    print_line(f"{out}: {what}: {bits}{size:.1f} MiB as packed, {seconds:.1f} s")
    if "matrices" in done and done["kind"] != "quantization":
        print_line(f"sparsity: {done['sparsity']:.2%} of the weights in {done['matrices']} matrices are zero")
    if decoder := done.get("decoder"):
        print_line(_reached(decoder))
    if names := done.get("calibration", {}).get("unreached"):
        how = "rounded to nearest" if done["kind"] == "quantization" else "pruned by magnitude"
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print_line(f"no calibration token came to {len(names)} matrices, {how}: {', '.join(names[:3])}{rest}")
    if probe := done.get("probe"):
        print_line(
            f"probe: KL {probe['kl']:.3f} nats per token, top-1 agreement {probe['top1_agreement']:.1%} "
            f"with the reference on {probe['prompts']} held-out prompts"
        )
    student, teacher = os.path.normpath(out), f"./{model}" if as_directory(model) else model
    pair = ["--student", student, "--teacher", teacher]
    _show_next(
        [
            ("See where the damage sits", _line("diagnose", *pair, "--out", f"{student}-diagnosis")),
            ("See what bringing it back takes; --data FILE names prompts of yours", _line("check", *pair)),
            ("Bring it back", _line("recover", *pair, "--out", f"{student}-recovered")),
        ]
    )


def _line(verb: str, *words: str) -> str:
    return shlex.join(["remend", verb, *words])


def _show_next(steps: Sequence[tuple[str, str]], page: Path | None = None) -> None:
    """What to do next: look at a page where there is one, and for each other thing the line or lines to copy."""
    print_line("\nWhat to do next:")
    if page:
        print_line(f"  Look at it: open {shlex.quote(str(page))} in a browser")
    for title, code in steps:
        print_line(f"  {title}:")
        for line in code.splitlines():
            print_line(f"    {line}")


def show_export(out: str, done: JsonRow) -> None:
    """What an export wrote, what read it, and how it is served."""
    from remend.report.card import HERE, ways_to_use

    check, file = done["check"], str(done.get("file", ""))
    print_line(f"{out}: {done['container']}, {size_in_words(done['bytes'])}")
    print_line(f"all weights equal bit for bit, logits too; opened by {check['read_by']}")
    if "note" in done:
        print_line(f"note: {done['note']}")
    place = os.path.normpath(out)
    ways = ways_to_use(gguf=file if file.endswith(".gguf") else "")
    steps = [(what, code.replace(HERE, shlex.quote(place))) for what, language, code in ways if language == "sh"]
    _show_next([*steps, ("Publish it, privately", _line("push", place, f"YOUR_NAME/{Path(out).absolute().name}"))])


def _reached(decoder: JsonRow) -> str:
    """Which of the decoder's weights were changed, and what stays dense by its nature."""
    words = {"on_grid": "on the grid", "masked": "under the mask"}
    parts = [f"{decoder[key]:.1%} {text}" for key, text in words.items() if key in decoder]
    dense = [f"{decoder[key]} weights of {key}" for key in ("routers", "towers") if decoder.get(key)]
    stays = f"; {' and '.join(dense)} stay dense" if dense else ""
    return f"decoder: {parts[0]}, {decoder['untouched']:.1%} untouched of {decoder['weights']} matrix weights{stays}"


def show_cache(out: str, done: JsonRow) -> None:
    """A cached teacher's size, and what cutting and rounding cost."""
    prompts, errors = done["prompts"], done["errors"]
    print_line(
        f"{out}: {prompts['train']} training and {prompts['held_out']} held-out completions, {done['tokens']} tokens, "
        f"{done['bytes_per_token']} bytes per token, {done['bytes'] / 2**20:.1f} MiB"
    )
    print_line(
        f"cut to the top {done['k']}: {errors['tail_mean']:.3%} of the probability is in the tail (at most "
        f"{errors['tail_max']:.1%}); {errors['entropy_lost']:.4f} of {errors['entropy']:.3f} nats of entropy per token "
        "are lost"
    )
    print_line(
        f"rounding of what is stored: KL {errors['rounding_kl']:.1e} nats per token, "
        f"no probability off by more than {errors['rounding_max']:.1e}"
    )


def show(result: RecoverResult) -> None:
    """The result's table, samples and paths."""
    from remend.report.next_steps import commands
    from remend.report.recovery import table, verdict

    console, summary = PlainConsole(), result.summary
    for sample in result.samples():
        console.rule(style="dim")
        console.print(sample["prompt"], style="bold")
        for name, style in (("reference", "cyan"), ("degraded", "red"), ("recovered", "green")):
            console.print(f"{name:>9}  ", style=style, end="")
            console.print(sample[name].strip() or "(nothing)")
    grid = Table("on held-out prompts", "degraded", "recovered", "gap closed", title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in table(summary):
        grid.add_row(row["label"], row["degraded"], row["recovered"], row["gap"])
    console.print(grid)
    console.print(verdict(summary), style="bold")
    for note in summary["notes"]:
        console.print(f"note: {note}")
    console.print(
        f"{summary['steps']} steps, {summary['tokens_trained']} tokens, {summary['seconds']:.0f} s, "
        f"peak memory {summary['peak_rss_mib']} MiB"
    )
    for name, path in (("model", result.model), ("report", result.report), ("summary", result.out / "summary.json")):
        console.print(f"{name:>7}  {path}", soft_wrap=True)
    steps = commands(result.out, result.summary, manifest_of(result.out))  # the page has more of them
    wanted = ("vllm ", "remend export", "remend eval")
    _show_next([(title.partition(" (")[0], code) for title, code in steps if code.startswith(wanted)], result.report)


def show_diagnosis(reference: str, students: Sequence[str], out: str, done: JsonRow) -> None:
    """Each student's severity and sentences, one line a layer for up to the eight worst, and what to do next."""
    console = PlainConsole(soft_wrap=True)
    for student in (done, *done["others"]):
        console.rule(f"{student['name']}: {student['severity']}", style="dim")
        for sentence in (*student["sentences"], student["recommendation"]):
            console.print(sentence["text"])
        grid = Table("worst layers", "CKA", "95%", "relative L2", "Procrustes", "shared neighbours")
        for index in student["ranking"][:8]:
            layer = student["layers"][index]
            interval = f"{_figure(layer['cka_low'])} to {_figure(layer['cka_high'])}"
            rest = [_figure(layer[key]) for key in ("l2", "procrustes", "knn")]
            grid.add_row(str(layer["layer"]), _figure(layer["cka"]), interval, *rest)
        console.print(grid)
    console.print(f"{out}/diagnosis.json\n{done['seconds']:.0f} s")
    steps = [
        (f"Bring {each['name']} back; --data FILE names prompts of yours", _recovering(student, reference))
        for student, each in zip(students, (done, *done["others"]), strict=True)
        if each["kind"] != "dense" and each["recommendation"]["text"].startswith("Recover it")
    ]
    _show_next(steps, Path(out) / "report.html")


def _recovering(student: str, reference: str) -> str:
    """The line that recovers a diagnosed student, which may be a run."""
    place = Path(student)
    model = str(place / "model") if (place / MANIFEST).is_file() else student
    out = f"{place}-recovered" if place.exists() else f"{place.name}-recovered"  # a hub id is no place
    return _line("recover", "--student", model, "--teacher", reference, "--out", out)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_track(rows: Sequence[JsonRow]) -> None:
    """One line a measurement: KL, agreement, mean CKA over layers, and the least."""
    grid = Table("step", "stage", "KL", "top-1 agreement", "mean CKA", "least CKA (layer)")
    for row in rows:
        known = [(value, layer) for layer, value in enumerate(row["cka"]) if value is not None]
        mean = sum(value for value, _ in known) / len(known) if known else None
        least = f"{min(known)[0]:.3f} ({min(known)[1]})" if known else "–"
        figures = (f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}", _figure(mean), least)
        grid.add_row(str(row["step"]), row["stage"], *figures)
    PlainConsole().print(grid)


def show_scores(out: str, done: JsonRow) -> None:
    """One line a task and grader: score, its interval, and what qualifies it."""
    parts = done.get("results", [done])
    names = {part["interval_method"] for part in parts}
    once = f" ({next(iter(names))})" if len(names) == 1 else ""
    grid = Table("task", "grader", "score", f"95% interval{once}", "n", "")
    for part in parts:
        low, high = part["interval_95"]
        by = "" if once else f" ({part['interval_method']})"
        figures = (f"{part['score']:.1%}", f"{low:.1%} to {high:.1%}{by}", str(part["n"]))
        grid.add_row(part["task"], part["grader"], *figures, "; ".join(_qualifiers(part)))
    console = PlainConsole()
    console.print(grid)
    console.print(f"{out}  {done['seconds']:.0f} s", soft_wrap=True)
    others = [str(path) for path in sorted(Path(out).parent.glob("*.json")) if path != Path(out) and _graded(path)]
    title = "Say whether the scores differ by more than chance"
    _show_next([(title, _line("compare", *(others or ["ANOTHER_MODEL.json"]), out))])


def _graded(path: Path) -> bool:
    """Whether a file holds graded results."""
    from remend.errors import RemendError
    from remend.evaluation.results_files import load

    try:
        return bool(load(path, path.name))
    except RemendError:
        return False


def _qualifiers(part: JsonRow) -> list[str]:
    """What a score must be read with: chance, pass@k, and answers that are no usual ones."""
    said = [f"pass@{k} {value:.1%}" for k, value in part.get("pass_at", {}).items()]
    if "metric" in part:
        said.append(part["metric"])
    if "chance" in part:
        verdict = "above chance" if part["p_shuffled"] < 0.05 else "not distinguishable from chance"
        figures = f"{part['chance']:.1%}; its letters at random {part['shuffled']:.1%}, p {part['p_shuffled']:.2g}"
        said.append(f"{verdict} ({figures})")
    said += [f"{part[key]} {key}" for key in ("clipped", "empty", "raised") if part.get(key)]
    return said + ([f"{len(part['dropped'])} dropped"] if part.get("dropped") else [])
