"""README.md of an exported model: what it is, how it was made, what was measured."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

from remend.compression.containers import Measured
from remend.files.atomic import JsonObject
from remend.files.reading import understood
from remend.files.run_directory import MANIFEST, SUMMARY, manifest_of, summary_of
from remend.models.accounting import LEFT_OUT
from remend.models.load import CARD_OF_PARTS
from remend.models.origin import origin_of
from remend.report.card import Card, Part, left_out, part_of_damage, parts_of_run, relation_of, ways_to_use
from remend.report.scores import scores_of


def told_of(measured: Measured) -> list[Part]:
    """What the files of a model or run say of it. Raises FileError where they are none that can be understood."""
    damage = measured.degradation or {}
    parts = left_out(CARD_OF_PARTS, list(getattr(measured.model.config, LEFT_OUT, None) or []))
    with understood(measured.source.path or measured.source.spec):
        parts += [part_of_damage(damage, "Compression")] if damage else []
    if measured.run:
        with understood(measured.run):
            summary = summary_of(measured.run) if (measured.run / SUMMARY).is_file() else {}
            manifest = manifest_of(measured.run) if (measured.run / MANIFEST).is_file() else {}
            parts += parts_of_run(summary, manifest, scores_of(measured.run, manifest))
    return parts


def write_card(measured: Measured, told: Sequence[Part], facts: Mapping[str, str], check: JsonObject) -> str:
    """The card's text.

    Args:
        told: what `told_of` gives.
        facts: of the container: what it is, its file if it is one, a note on what it can't hold.
        check: what reading it back showed.
    """
    grid = f"its linear weights lie on the grid {measured.grid}" if measured.stored else "its weights are free"
    where, file = measured.run or measured.source.path, facts.get("file", "")
    damage = measured.degradation or {}
    return Card(
        title=where.name if where else measured.source.spec,
        lead=f"Exported by remend {importlib.metadata.version('remend')} as {facts['container']}; {grid}.",
        parts=[
            *told,
            Part("This file", _checked(check)),
            *([Part("Note", facts["note"])] if facts.get("note") else []),
        ],
        origin=origin_of(measured.source),
        relation="quantized" if measured.stored else relation_of(damage, trained=measured.run is not None),
        library="gguf" if file.endswith(".gguf") else "transformers",
        use=ways_to_use(gguf=file if file.endswith(".gguf") else ""),
    ).markdown()


def _checked(check: JsonObject) -> str:
    return (
        "Read back and compared with the model that was measured: "
        f"{'all weights equal bit for bit' if check['weights_equal'] else 'weights differ'}, "
        f"largest logit difference {check['max_logit_difference']:g} over {check['tokens_compared']} tokens. "
        f"Opened by {check['read_by']}."
    )
