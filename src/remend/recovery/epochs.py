"""How many steps an epoch is: settled once the training prompts are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from remend.data.examples import held_out_count
from remend.files.atomic import JsonObject, JsonRow
from remend.recovery.prompts import StreamData
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import SELF_PROMPTS, rows_of


@dataclass(frozen=True)
class Epochs:
    """Epochs as steps.

    asked: how often the prompts are to be gone through.
    prompts, a_step: of the stream that takes longest: its training prompts, and how many of them a step takes.
    self_prompts: how many the reference is to write, where they were counted.
    """

    asked: float
    prompts: int
    a_step: int
    self_prompts: int | None = None

    @property
    def steps(self) -> int:
        """Steps after which every prompt was taken that often."""
        return math.ceil(round(self.asked * self.prompts / self.a_step, 9))

    def record(self) -> JsonObject:
        """For manifest and summary."""
        return {**asdict(self), "steps": self.steps}

    def line(self) -> str:
        """9 steps: 2 epochs of 34 training prompts, 8 a step."""
        return f"{self.steps} steps: {self.asked:g} epochs of {self.prompts} training prompts, {self.a_step} a step"


def in_steps(config: RecoverConfig, streams: Sequence[StreamData]) -> tuple[RecoverConfig, Epochs | None]:
    """The recipe with steps in the place of epochs; as it is where it names no epochs.

    Prompts that the reference is to write count as many as it will be asked for, less those that are held out. Of
    several streams the one decides whose prompts last longest.

    Raises InputError where a step has fewer prompts than there are streams.
    """
    if config.epochs is None:
        return config, None
    written = (config.self_prompts or SELF_PROMPTS) if any(data.unwritten for data in streams) else None
    rows = rows_of([data.stream for data in streams], config.prompts_a_step)
    asked, given = config.epochs, written or config.self_prompts
    each = [Epochs(asked, _prompts(data, written or 0), rows[data.stream.name], given) for data in streams]
    longest = max(each, key=lambda epochs: epochs.steps)
    return config.model_copy(update={"steps": longest.steps, "epochs": None, "self_prompts": given}), longest


def as_counted(config: RecoverConfig, record: JsonRow | None) -> RecoverConfig:
    """A recipe that is given again to a run whose manifest has `record` of its epochs: as many steps as they were."""
    if config.epochs is None or record is None:
        return config
    steps = Epochs(config.epochs, record["prompts"], record["a_step"]).steps
    written = config.self_prompts or record["self_prompts"]
    return config.model_copy(update={"steps": steps, "epochs": None, "self_prompts": written})


def _prompts(data: StreamData, written: int) -> int:
    if not data.unwritten:
        return len(data.train)
    return written if data.stream.eval_data else written - held_out_count(data.stream.held_out, written)
