"""What a model's files say of its licence and of the model on the hub that it was made from, for a card's head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from remend.errors import FileError, InputError
from remend.files.reading import read_text
from remend.files.yaml_files import yaml_of
from remend.models.find import CARD, ModelSource
from remend.models.gguf_header import general

Origin = dict[str, str]
"""Of license, license_name, license_link and base_model those that are known."""

_LICENSE = ("license", "license_name", "license_link")
_WORD = re.compile(r"[\w.+-]{1,60}")
_REPO = re.compile(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)/?")


def origin_of(*sources: ModelSource) -> Origin:
    """Of several models from the nearest to the furthest: each field from the first that knows it."""
    known: Origin = {}
    for source in sources:
        one = _of_one(source)
        if "license" in known:  # a name or a link belongs to its own licence
            one = {key: value for key, value in one.items() if key not in _LICENSE}
        known = {**one, **known}
    return known


def _of_one(source: ModelSource) -> Origin:
    source = source.base or source
    if source.path is None:
        head: dict[str, Any] = {}
    elif source.kind == "gguf":
        head = _of_header(source.path)
    else:
        head = head_of(source.path / CARD)
    base = head.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    known = {"base_model": source.repo or _repo(base)}
    license_ = head.get("license")
    if isinstance(license_, str) and _WORD.fullmatch(license_):
        known |= {key: str(head[key]) for key in _LICENSE if isinstance(head.get(key), str)}
    return {key: value for key, value in known.items() if value}


def _repo(value: object) -> str | None:
    match = _REPO.fullmatch(value) if isinstance(value, str) else None
    return match[1] if match else None


def head_of(card: Path) -> dict[str, Any]:
    """The YAML head of a card; empty where there is no card, no head, or none that can be read."""
    try:
        text = read_text(card)
        match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
        head = yaml_of(match[1]) if match else None
    except (FileError, InputError):
        return {}
    return head if isinstance(head, dict) else {}


def _of_header(path: Path) -> dict[str, Any]:
    fields = general(path)
    base = next((fields[k] for k in ("base_model.0.repo_url", "source.repo_url", "repo_url") if k in fields), None)
    return {
        "license": fields.get("license"),
        "license_name": fields.get("license.name"),
        "license_link": fields.get("license.link"),
        "base_model": base,
    }
