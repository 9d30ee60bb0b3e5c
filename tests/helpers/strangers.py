"""Opens an export as a stranger, without a process of its own: importing transformers anew takes seconds each time."""

from __future__ import annotations

from typing import Any


def ask(reader: str, request: dict[str, Any]) -> dict[str, Any]:
    """In place of `remend.exporting.check.ask_stranger`. llama.cpp is left out."""
    from remend.exporting import stranger

    return stranger.transformers(request) if reader == "transformers" else {"reader": reader}
