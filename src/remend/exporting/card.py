"""README.md of an exported model: what it is, how it was made, what was measured."""

from __future__ import annotations

import importlib.metadata
import re

from remend.compression.containers import Measured
from remend.files.atomic import JsonObject, read_json
from remend.files.run_directory import MANIFEST, SUMMARY
from remend.models.accounting import LEFT_OUT
from remend.models.load import CARD_OF_PARTS

_SETTINGS = ("student", "teacher", "steps", "batch_size", "learning_rate", "beta", "seed")


def write_card(measured: Measured, container: str, check: JsonObject, note: str | None = None) -> str:
    """Markdown with a YAML head; the note is on what the container can't hold.

    Text that comes from files is escaped: it can't become markup.
    """
    summary = _json(measured, SUMMARY)
    manifest = _json(measured, MANIFEST)
    recipe = manifest.get("recipe", {})
    lines = ["---", "tags:", "- remend", "---", "", f"# {escape(_title(measured))}", ""]
    grid = f"its linear weights lie on the grid {escape(measured.grid)}" if measured.stored else "its weights are free"
    lines += [f"Exported by remend {importlib.metadata.version('remend')} as {escape(container)}; {grid}.", ""]
    lacks = getattr(measured.model.config, LEFT_OUT, None)
    if lacks:
        lines += ["## Left out", "", CARD_OF_PARTS, ""] + [f"- `{escape(name)}`" for name in lacks] + [""]
    if measured.degradation:
        lines += ["## Compression", ""]
        lines += [f"- {escape(k)}: {escape(v)}" for k, v in measured.degradation.items() if _plain(v)] + [""]
    if recipe:
        lines += ["## Recovery", "", "Trained on its own answers against its healthy teacher (remend recover).", ""]
        if recipe.get("loss"):
            recipe = {**recipe, "beta": f"none; the loss is {manifest['kl_direction']}"}
        lines += [f"- {k}: {escape(recipe[k])}" for k in _SETTINGS if k in recipe] + [""]
    if summary:
        lines += ["## Measured on held-out prompts", ""]
        lines += [f"- {escape(k)}: {escape(v)}" for k, v in _figures(summary)] + [""]
    lines += ["## This file", "", _checked(check), ""] + ([f"Note: {escape(note, 1000)}", ""] if note else [])
    return "\n".join(lines)


def escape(value: object, length: int = 200) -> str:
    """One line of plain text in Markdown: no markup, no HTML, no link; of `length` characters at most."""
    text = " ".join(str(value).split())[:length]
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}|#!~])", r"\\\1", text)


def _json(measured: Measured, name: str) -> JsonObject:
    path = measured.run / name if measured.run else None
    content = read_json(path) if path and path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _title(measured: Measured) -> str:
    where = measured.run or measured.source.path
    return where.name if where else measured.source.spec


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _figures(summary: JsonObject) -> list[tuple[str, str]]:
    """Numbers of summary.json, one level deep: 'recovered.kl' and the like, six at most a group."""
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{k}", _number(v)) for k, v in value.items() if isinstance(v, (int, float))][:6]
        elif _plain(value):
            rows.append((key, _number(value)))
    return rows


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checked(check: JsonObject) -> str:
    return (
        "Read back and compared with the model that was measured: "
        f"{'all weights equal bit for bit' if check['weights_equal'] else 'weights differ'}, "
        f"largest logit difference {check['max_logit_difference']:g} over {check['tokens_compared']} tokens. "
        f"Opened by {escape(check['read_by'])}."
    )
