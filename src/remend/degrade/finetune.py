"""Fine-tune a model on a task's completions: how forgetting comes about, and the baseline that SDFT is held against.

remend degrade finetune smollm2 --data task.jsonl --out student
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from remend.data.sources import COLUMNS_HELP, ColumnsSetting
from remend.degrade.kinds import DEGRADATIONS, DegradeSettings, degrade
from remend.errors import InputError
from remend.files.settings import Arithmetic, Number, takes
from remend.models.lora import LoraConfig

if TYPE_CHECKING:
    from remend.degrade.making.job import Changed, Damage
    from remend.files.atomic import JsonObject

FULL_RATE, LORA_RATE = 2e-4, 2e-3


@DEGRADATIONS.register("finetune", source="the baseline of SDFT, arXiv 2604.15794")
class Finetune(DegradeSettings):
    """Fine-tune on a task by cross-entropy of its completions: how forgetting is produced.

    The learning rate is reached after a tenth of the steps, and the cosine ends at a tenth of it; by default it is
    FULL_RATE for all weights, LORA_RATE for an adapter, which is folded into the dense weights at the end. Trained
    weights are float32 whatever the arithmetic. The training's rows are in metrics.jsonl beside the model.
    """

    learns: ClassVar[bool] = True

    data: str = Field(description="rows with a prompt and a completion: a file, a folder, or a hub id")
    columns: ColumnsSetting | None = Field(None, description=COLUMNS_HELP)
    steps: int | None = Field(None, ge=1, description="optimizer steps; by default one epoch")
    epochs: Number | None = Field(
        None, gt=0, allow_inf_nan=False, description="passes over the data, in place of steps"
    )
    learning_rate: Number | None = Field(None, gt=0, le=1, description="AdamW's peak; by default 2e-4, with lora 2e-3")
    batch_size: int = Field(4, ge=1, description="rows per micro-batch")
    gradient_accumulation: int = Field(1, ge=1, description="how many micro-batches a step has")
    max_tokens: int = Field(1024, ge=1, description="longer rows are dropped, never cut")
    lora: LoraConfig | None = Field(None, description="train an adapter and fold it in")
    dtype: Arithmetic = Field("auto", description="dtype of the arithmetic: auto, float32, bfloat16")

    @property
    def rate(self) -> float:
        """The learning rate, of all weights or of an adapter."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LORA_RATE if self.lora else FULL_RATE

    def steps_for(self, rows: int) -> int:
        """Optimizer steps that go through `rows` rows as often as asked."""
        if self.steps is not None:
            return self.steps
        each = self.batch_size * self.gradient_accumulation
        return max(1, math.ceil(rows * (1.0 if self.epochs is None else self.epochs) / each))

    def check(self) -> None:
        """Raise InputError for steps beside epochs, and for rows that can't be read."""
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"both steps ({self.steps}) and epochs ({self.epochs}) are given; give one of them")
        from remend.data.examples import load_pairs

        # they are read again later, but a large model should not be loaded for nothing
        load_pairs(self.data, columns=self.columns)

    def title(self) -> str:
        return f"fine-tuning on {self.data} ({'LoRA' if self.lora else 'all weights'})"

    def change(self, damage: Damage) -> Changed:
        """Raises InputError for a quantized or pruned model, and where no row is short enough."""
        from remend.degrade.making.tuning import tuned

        return tuned(damage, self)


@takes(Finetune)
def finetune(model: str | Path, out: str | Path, **overrides: object) -> JsonObject:
    """Fine-tune a model on given completions and save it. See kinds.degrade; `overrides` are fields of Finetune."""
    return degrade("finetune", model, out, overrides)
