"""The settings of a diagnosis."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from remend.data.sources import COLUMNS_HELP, ColumnsSetting
from remend.files.settings import MOST_TOKENS, PLACEMENT, Placement, Settings

Site = Annotated[str, "residual, attention or mlp"]


class DiagnoseSettings(Settings):
    """What `remend diagnose` is asked for."""

    reference: str = Field(description="the healthy model: a directory, GGUF file, hub id[@revision], smollm2")
    students: list[str] = Field(description="damaged or recovered models, in the same forms; or a recovery's directory")
    out: str = Field(description="a new directory")
    data: str | None = Field(None, description="prompts: a file, a folder, or a hub id; by default bundled ones")
    columns: ColumnsSetting | None = Field(None, description=COLUMNS_HELP)
    rows: int | None = Field(None, description="how many prompts; by default up to 256 on a CPU, 1,024 on a GPU")
    max_new_tokens: int = Field(32, le=MOST_TOKENS, description="tokens of each answer of the reference, at most")
    sites: list[Site] = Field(["residual"], description="where states are compared: residual (always), attention, mlp")
    layer_map: list[int] | None = Field(
        None,
        description="for students with fewer layers: the reference's layer for each of theirs; by default recorded "
        "or found",
    )
    seed: int = Field(0, description="seed for row choice, bootstrap and the random baseline")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps; float32, on a GPU bfloat16 where it is fast")
    cache: str | None = Field(
        None, description="where the reference's answers and rows are kept; by default REMEND_CACHE or the user's cache"
    )
    placement: Placement = Field("auto", description=PLACEMENT)
    trust_remote_code: bool = Field(False, description="let a model directory run its own Python")
