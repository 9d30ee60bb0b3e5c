"""What a test registers or imports is forgotten after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remend import plugins
from remend.registry import Registry


@contextmanager
def restored(*registries: Registry[Any]) -> Iterator[None]:
    """Inside, more may be registered and more modules be asked for; afterwards all is as it was."""
    before = [dict(registry.entries) for registry in registries]
    asked_for = list(plugins.asked_for)
    try:
        yield
    finally:
        plugins.asked_for[:] = asked_for
        for registry, entries in zip(registries, before, strict=True):
            registry.entries.clear()
            registry.entries.update(entries)
