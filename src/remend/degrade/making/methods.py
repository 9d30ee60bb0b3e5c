"""A registry of ways to change one matrix, some of which look at what enters it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from remend.registry import Registry

Apply = TypeVar("Apply", bound=Callable[..., object])


@dataclass(frozen=True)
class Method(Generic[Apply]):
    """apply: gets a weight, and the Gram matrix of its inputs where it is calibrated, else None."""

    apply: Apply
    calibrated: bool


class Methods(Generic[Apply]):
    """Methods by name."""

    def __init__(self, kind: str) -> None:
        self._methods: Registry[Method[Apply]] = Registry(kind)

    def register(self, name: str, *, source: str, calibrated: bool = False) -> Callable[[Apply], Apply]:
        """Decorator that files a function under `name`; `calibrated` ones see a layer's inputs."""

        def add(apply: Apply) -> Apply:
            self._methods.register(name, source=source)(Method(apply, calibrated))
            return apply

        return add

    def get(self, name: str) -> Method[Apply]:
        """The method called `name`. Raises InputError that lists the known names."""
        return self._methods.get(name)
