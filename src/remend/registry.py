"""Named things that a user can choose and a contributor can add: register, get, list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from remend.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of implementations under names. `entries` has them in the order in which they were registered.

    Example:
        >>> methods: Registry[Callable[..., object]] = Registry("quantization method")
        >>> @methods.register("rtn", source="round to nearest")
        ... def rtn(weight): ...
    """

    def __init__(self, kind: str, check: Callable[[str, T], None] | None = None) -> None:
        """`check` raises InputError for a name and an implementation that can't be used, when they are registered."""
        self.kind, self._check = kind, check
        self.entries: dict[str, T] = {}

    def register(self, name: str, *, source: str) -> Callable[[T], T]:
        """Decorator that files an implementation under `name`; a name taken twice is a ValueError.

        `source` is the address of the work that is implemented: it stands there for who reads the code.
        """

        def add(entry: T) -> T:
            if name in self.entries:
                raise ValueError(f'{self.kind} "{name}" is registered already')
            if self._check:
                self._check(name, entry)
            self.entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The implementation called `name`. Raises InputError that lists the known names."""
        if name not in self.entries:
            known = ", ".join(self.names())
            raise InputError(f'unknown {self.kind} "{name}"; known: {known}.{did_you_mean(name, self.entries)}')
        return self.entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.entries)


def register_all(package: str) -> None:
    """Import every module of a package, so that each registers what it adds: no list of imports is kept by hand."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
