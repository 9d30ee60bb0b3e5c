"""What the checks of a recovery say: problems stop it, warnings and notes don't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from remend.errors import RemendError


@dataclass
class Findings:
    """Sentences, in the order in which they were found."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """An error inside becomes a problem, once, so that the checks after it still run."""
        try:
            yield
        except RemendError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
