"""What cache-teacher is asked for. Nothing here waits for torch."""

from __future__ import annotations

from pydantic import Field

from remend.data.sources import COLUMNS_HELP, ColumnsSetting
from remend.files.settings import MOST_TOKENS, Number, Settings


class CacheSettings(Settings):
    """Which prompts a teacher answers, and how much of its scores is stored."""

    data: str = Field(description="prompts that the teacher answers: a file, a folder, or a hub id")
    columns: ColumnsSetting | None = Field(None, description=COLUMNS_HELP)
    k: int = Field(
        64, description="how many log-probs are kept per position, 6 bytes each; the remaining mass is one value"
    )
    max_new_tokens: int = Field(48, le=MOST_TOKENS, description="tokens per completion")
    held_out: int | None = Field(None, description="prompts set apart, answered greedily; by default as in a recipe")
    eval_data: str | None = Field(None, description="a file of prompts to hold out, in place of held_out")
    max_prompt_tokens: int = Field(1024, description="longer prompts are dropped, never cut")
    temperature: Number = Field(1.0, description="sampling temperature; scores are stored at 1")
    seed: int = Field(0, description="random seed")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps; float32, on a GPU bfloat16 where it is fast")
    trust_remote_code: bool = Field(False, description="let a model directory run its own Python")
