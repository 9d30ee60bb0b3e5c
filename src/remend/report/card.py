"""README.md beside a model's weights: the card that people and the hub read. Every command that writes one uses this.

Text that comes from files is escaped: it can't become markup. Of paths only the last part is told, since a card is
published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from remend.files.atomic import JsonRow
from remend.report import markdown
from remend.report.next_steps import loading, serving
from remend.report.recovery import table, verdict
from remend.report.scores import ROLES, Scores
from remend.report.words import last_part

HERE = "THIS_DIRECTORY"
"""In commands: where the card lies, or the id that it was pushed to."""

UNKNOWN = "not known from the files that this model was made from; name it before you publish the model"


@dataclass(frozen=True)
class Part:
    """A section: a paragraph, bullets and a table (columns, rows), each where there is one."""

    title: str
    text: str = ""
    bullets: Sequence[str] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


@dataclass(frozen=True)
class Card:
    """What a card says.

    origin: license, license_name, license_link, base_model, as far as they are known.
    relation: to the base model, in the hub's words: 'quantized', 'finetune', 'adapter'; '' names none.
    library: that the hub says loads it.
    use: (what, language, code) of each way to load or serve it.
    """

    title: str
    lead: str
    parts: Sequence[Part]
    origin: Mapping[str, str] = field(default_factory=dict)
    relation: str = ""
    library: str = "transformers"
    use: Sequence[tuple[str, str, str]] = ()

    def markdown(self) -> str:
        """The file's content, with a YAML head that the hub reads."""
        head: dict[str, object] = {**self.origin}
        if self.relation and "base_model" in head:
            head["base_model_relation"] = self.relation
        head |= {"library_name": self.library, "pipeline_tag": "text-generation", "tags": ["remend"]}
        lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
        lines += [f"# {escape(self.title)}", "", escape(self.lead, 1000), ""]
        for part in self.parts:
            lines += [f"## {escape(part.title)}", ""]
            lines += [escape(part.text, 1000), ""] if part.text else []
            lines += [*(f"- {escape(bullet)}" for bullet in part.bullets), ""] if part.bullets else []
            lines += [*markdown.grid(*part.table), ""] if part.table else []
        lines += ["## How to use it", ""] if self.use else []
        for what, language, code in self.use:
            lines += [f"{what}:", "", f"```{language}", code, "```", ""]
        known = [f"base model: {self.origin.get('base_model', 'not known')}"]
        known += [f"licence: {self.origin.get('license_name', self.origin.get('license', UNKNOWN))}"]
        return "\n".join([*lines, "## Origin", "", *(f"- {escape(line)}" for line in known), ""])


def escape(value: object, length: int = 200) -> str:
    """One line of plain text in Markdown, of `length` characters at most."""
    return markdown.escape(str(value)[:length])


def named(spec: object) -> str:
    """A model as a card names it: a hub id as it is, of a path its last part."""
    text = str(spec)
    return text if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?", text) else last_part(text)


_SETTINGS = ("steps", "batch_size", "learning_rate", "beta", "seed")


def parts_of_run(summary: JsonRow, manifest: JsonRow, scores: Scores | None = None) -> list[Part]:
    """How a recovery was done, and what was measured, with intervals; nothing of a run that is not complete."""
    recipe: JsonRow = manifest.get("recipe") or {}
    if not recipe:
        return []
    facts = [
        f"student: {named(recipe['student'])}",
        f"teacher: {named(manifest.get('reference') or recipe.get('teacher'))}",
        *([f"held by training: {summary['constraint']}"] if summary.get("constraint") else []),
        *([f"loss: {summary['training_loss']}"] if summary.get("training_loss") else []),
        *(f"{key}: {_setting(key, summary, recipe)}" for key in _SETTINGS if recipe.get(key) is not None),
    ]
    if summary.get("repair"):
        facts.insert(2, f"repair: closed-form, before training ({summary['repair']['seconds']:.0f} s)")
    what = "Brought nearer to its healthy teacher by training on its own answers (remend recover)."
    parts = [Part("Recovery", what, facts)]
    if summary:
        parts.append(_measured(summary))
    if scores:
        graded = [[task, *(by[role].words() if role in by else "–" for role in ROLES)] for task, by in scores.items()]
        parts.append(Part("Task scores", "With 95% intervals.", table=(["task", *ROLES], graded)))
    return parts


def _measured(summary: JsonRow) -> Part:
    title, columns = "Measured on held-out prompts", ["", "degraded", "recovered", "gap closed"]
    try:
        rows = [[row["label"], row["degraded"], row["recovered"], row["gap"]] for row in table(summary)]
        return Part(title, verdict(summary), table=(columns, rows))
    except (KeyError, TypeError):
        return Part(title, "The run's summary.json is of another version of remend and can't be shown here.")


def _setting(key: str, summary: JsonRow, recipe: JsonRow) -> object:
    """What was done: the summary knows the steps and the rate, the recipe the rest."""
    return summary.get(key, recipe[key]) if key in ("steps", "learning_rate") else recipe[key]


def part_of_damage(record: JsonRow, title: str) -> Part:
    """A student's degradation.json in bullets, with what its probe measured."""
    hidden = {"seconds", "sha256"} | (
        {"sparsity"} if record.get("kind") == "quantization" else set()
    )  # zeros that fell out of it
    shown = {key: value for key, value in record.items() if key not in hidden}
    facts = [f"{key}: {value}" for key, value in shown.items() if isinstance(value, (str, int, float))]
    if isinstance(reference := record.get("reference"), Mapping):
        facts.insert(0, f"made from: {named(reference.get('model'))}")
    if probe := record.get("probe"):
        facts.append(
            f"KL {probe['kl']:.3f} nats per token and top-1 agreement {probe['top1_agreement']:.1%} with the model "
            f"that it was made from, on {probe['prompts']} held-out prompts, without an interval"
        )
    return Part(title, bullets=facts)


def ways_to_use(*, adapter_of: str = "", gguf: str = "") -> list[tuple[str, str, str]]:
    """How to load and serve what lies beside the card: a plain directory, an adapter on a base, or a GGUF file."""
    if gguf:
        return [("Serve it with llama.cpp", "sh", f"llama-server -m {HERE}/{gguf}")]
    loads = ("Load it in Python", "python", loading(HERE, adapter=bool(adapter_of)))
    if adapter_of:
        return [loads, ("Serve it on its base with vLLM", "sh", serving(adapter_of, adapter=HERE))]
    return [loads, ("Serve it with vLLM", "sh", serving(HERE))]


def relation_of(record: JsonRow, *, trained: bool = False) -> str:
    """To the base model, by what degradation.json says and whether it was trained since; '' where no word fits."""
    kinds = {"quantization": "quantized", "fine-tuning": "finetune"}
    return kinds.get(str(record.get("kind")), "finetune" if trained else "")


def left_out(about: str, names: Sequence[str]) -> list[Part]:
    """The parts of a model's files that the model lacks; nothing where it lacks none."""
    return [Part("Left out", about, names)] if names else []
