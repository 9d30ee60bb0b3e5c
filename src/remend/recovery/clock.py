"""How long each phase of a run takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from remend.console import phase as show_phase


@dataclass
class Clock:
    """Phases follow one another without a gap: one ends where the next begins.

    began: time.monotonic() when the first phase began.
    """

    began: float
    phase: str = "loading"
    _seconds: dict[str, float] = field(default_factory=dict)

    def enter(self, phase: str, *, shown: bool = True) -> None:
        """The next phase begins. Progress counts it where it is `shown`."""
        if shown:
            show_phase(phase)
        now = time.monotonic()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self.began
        self.began, self.phase = now, phase

    def stop(self) -> Mapping[str, float]:
        """The seconds of each phase, in order."""
        self.enter("", shown=False)
        return {phase: seconds for phase, seconds in self._seconds.items() if phase}
