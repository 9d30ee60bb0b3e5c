"""Figures and names as every page writes them."""

from __future__ import annotations

import math
import re

from remend.files.atomic import JsonRow


def number(value: float | None, form: str = ".3f") -> str:
    """A number as text with a true minus, a dash for None or what is not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form).replace("-", "−")


def percent(value: float | None) -> str:
    """'57%', with a true minus; a dash for None."""
    return "–" if value is None else f"{value:.0%}".replace("-", "−")


def last_part(spec: str) -> str:
    """Of a path or hub id."""
    return spec.rstrip("/").split("/")[-1] or spec


def machine_facts(about: JsonRow, dtype: str | None = None) -> list[tuple[str, str]]:
    """On what something ran: `hardware`, `versions` and `git_commit` as a manifest has them."""
    hardware = about.get("hardware", {})
    words = [hardware.get("processor", "–"), f"{hardware.get('threads', '–')} threads"]
    words += [f"{dtype} arithmetic"] if dtype else []
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
    return [
        ("hardware", ", ".join([*words, *hardware.get("gpus", [])])),
        ("versions", versions),
        ("commit", str(about.get("git_commit") or "–")),
    ]


def minus(text: str) -> str:
    """The text with a minus sign, and no hyphen, before its negative numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)
