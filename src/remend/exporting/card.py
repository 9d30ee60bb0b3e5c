"""README.md of an exported model: what it is, how it was made, what was measured."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from remend.compression.containers import Measured
from remend.files.atomic import JsonObject
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST, SUMMARY
from remend.models.accounting import LEFT_OUT
from remend.models.load import CARD_OF_PARTS
from remend.models.origin import origin_of
from remend.report.card import Card, Part, left_out, part_of_damage, parts_of_run, relation_of, ways_to_use
from remend.report.scores import scores_of


def write_card(measured: Measured, facts: Mapping[str, str], check: JsonObject) -> str:
    """The card's text; `facts` are the container's: what it is, its file if it is one, a note on what it can't hold."""
    summary, manifest = _json(measured, SUMMARY), _json(measured, MANIFEST)
    grid = f"its linear weights lie on the grid {measured.grid}" if measured.stored else "its weights are free"
    where, file = measured.run or measured.source.path, facts.get("file", "")
    damage = measured.degradation or {}
    return Card(
        title=where.name if where else measured.source.spec,
        lead=f"Exported by remend {importlib.metadata.version('remend')} as {facts['container']}; {grid}.",
        parts=[
            *left_out(CARD_OF_PARTS, list(getattr(measured.model.config, LEFT_OUT, None) or [])),
            *([part_of_damage(damage, "Compression")] if damage else []),
            *parts_of_run(summary, manifest, scores_of(measured.run, manifest) if measured.run else None),
            Part("This file", _checked(check)),
            *([Part("Note", facts["note"])] if facts.get("note") else []),
        ],
        origin=origin_of(measured.source),
        relation="quantized" if measured.stored else relation_of(damage, trained=bool(manifest)),
        library="gguf" if file.endswith(".gguf") else "transformers",
        use=ways_to_use(gguf=file if file.endswith(".gguf") else ""),
    ).markdown()


def _json(measured: Measured, name: str) -> JsonObject:
    path = measured.run / name if measured.run else None
    content = read_object(path) if path and path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _checked(check: JsonObject) -> str:
    return (
        "Read back and compared with the model that was measured: "
        f"{'all weights equal bit for bit' if check['weights_equal'] else 'weights differ'}, "
        f"largest logit difference {check['max_logit_difference']:g} over {check['tokens_compared']} tokens. "
        f"Opened by {check['read_by']}."
    )
