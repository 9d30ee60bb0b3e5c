"""Put another function in the place of one that several modules of remend have imported by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

Function = Callable[..., Any]


def without_the_harness_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, the harness knows the tasks of `include` alone: to list its own takes six seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def replace_everywhere(
    monkeypatch: pytest.MonkeyPatch, original: Callable[..., Any], other: Callable[..., Any]
) -> None:
    """Every name below remend that means `original` means `other` until the test ends."""
    places = [
        (module, name)
        for title, module in list(sys.modules.items())
        if title.partition(".")[0] == "remend"
        for name, value in list(vars(module).items())
        if value is original
    ]
    assert places, f"no module of remend has imported {original}"
    for module, name in places:
        monkeypatch.setattr(module, name, other)
