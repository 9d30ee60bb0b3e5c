"""README.md of a recovered model: how it was made, and what was measured."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from remend.files.atomic import JsonRow, write_text
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST
from remend.models.accounting import LEFT_OUT
from remend.models.find import CARD
from remend.models.load import CARD_OF_PARTS
from remend.models.origin import origin_of
from remend.recovery.plan import Plan
from remend.report.card import Card, left_out, named, part_of_damage, parts_of_run, relation_of, ways_to_use


def write_model_card(run: Path, plan: Plan, summary: JsonRow) -> None:
    """Write the card of the run's saved model, from its summary."""
    student, adapter = plan.config.student, (run / "model" / "adapter_config.json").is_file()
    files = [source for teacher in plan.teachers.values() if (source := getattr(teacher, "source", None))]
    damage = plan.facts.record
    config = run / "model" / "config.json"
    lacks = read_object(config).get(LEFT_OUT) if config.is_file() else None
    text = Card(
        title=f"{named(student)}, recovered",
        lead=f"A degraded model brought back by remend {importlib.metadata.version('remend')}, with "
        f"{named(plan.reference)} as its healthy teacher.",
        parts=[
            *left_out(CARD_OF_PARTS, lacks or []),
            *([part_of_damage(damage, "Compression")] if damage else []),
            *parts_of_run(summary, read_object(run / MANIFEST)),
        ],
        origin=origin_of(plan.student, *files),
        relation="adapter" if adapter else relation_of(damage, trained=True),
        library="peft" if adapter else "transformers",
        use=ways_to_use(adapter_of=named(student) if adapter else ""),
    ).markdown()
    write_text(run / "model" / CARD, text)
