"""What an evaluation can be told, and task names and data as they are typed. Nothing here waits for torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from remend.data import tasks
from remend.errors import InputError
from remend.files.settings import Settings

LM_EVAL = "lm-eval:"
"""Before the name of a task of lm-evaluation-harness."""

ENGINES = ("hf", "vllm")
HOW = ("generate", "choices")
MOST_SAMPLES = 1000
"""Answers per row; each is kept by itself."""
GRADERS = (*tasks.MODES, "both")
DTYPES = ("auto", "float32", "bfloat16")


class EvaluateSettings(Settings):
    """How tasks are evaluated.

    tooluse and science need `data`; the other tasks make their held-out rows themselves, the same for every model.
    `dtype` auto is float32 on a CPU, and bfloat16 on a GPU where that is fast.
    """

    hints: ClassVar[Mapping[str, str]] = {
        "batch_size": "batches are as large as memory allows, in other words auto; batch_rows limits them",
        "log_samples": "every answer is kept with its grade in the results file, without being asked",
        "include_path": "it is include here: --include DIRECTORY",
        "confirm_run_unsafe_code": "it is allow_code here: --allow-code",
        "output_path": "out names the results file",
        "model_args": "the model is named by its directory, GGUF file or hub id alone; dtype and device are options",
        "tasks": "it is task here: --task lm-eval:hellaswag,ifeval",
        "apply_chat_template": "the chat template is used where a task is one of chat, and the results say so",
    }

    data: str | dict[str, str] | None = Field(
        None, description="rows: JSON lines or a datasets id; by task where there are several"
    )
    engine: str = Field("hf", description="what generates: hf (transformers) or vllm")
    grader: str | None = Field(
        None,
        description="how answers are graded: paper as the task's authors do (the default), robust by what was "
        "meant, or both",
    )
    how: str = Field("generate", description="generate, or choices: log-likelihood of the answer letters")
    samples: int = Field(
        1, le=MOST_SAMPLES, description="answers per row: 1 is greedy, more are drawn at temperature 1 and give pass@k"
    )
    max_new_tokens: int | None = Field(
        None, description="tokens of an answer, at most; the default depends on the task"
    )
    limit: int | None = Field(None, description="take only the first rows of each task, this many")
    seed: int = Field(0, description="seed of drawn answers and of the test against chance")
    batch_rows: int | None = Field(
        None, description="how many rows are answered at once, at most; memory limits them too"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    dtype: str = Field("auto", description="auto, float32, bfloat16")
    include: str | None = Field(None, description="a directory with lm-eval task files (YAML) of your own")
    num_fewshot: int | None = Field(
        None, description="examples before each row of an lm-eval task; by default what the task says"
    )
    allow_code: bool = Field(
        False,
        description="let lm-eval tasks run code: what the model writes (humaneval), isolated, and that of task files",
    )
    trust_remote_code: bool = Field(False, description="let a model directory run its own Python")


def parse_tasks(text: str) -> list[str]:
    """Task names from one text: "tooluse,lm-eval:hellaswag,ifeval" is tooluse, lm-eval:hellaswag, lm-eval:ifeval.

    What follows a name with `lm-eval:` is of lm-evaluation-harness too, unless it is a task of remend's.
    """
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        theirs = bool(names) and names[-1].startswith(LM_EVAL) and part not in tasks.names()
        names.append(f"{LM_EVAL}{part}" if theirs and not part.startswith(LM_EVAL) else part)
    return names


def parse_data(texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """`evaluate`'s data from texts like "rows.jsonl", or "science=rows.jsonl" for each of several tasks.

    Raises InputError when texts of both kinds are given, several files without a task, or a task twice.
    """
    if not texts:
        return None
    named = [text.partition("=") for text in texts if text.partition("=")[0] in tasks.names() and "=" in text]
    if not named and len(texts) == 1:
        return texts[0]
    by_task = {name: source for name, _, source in named}
    if len(by_task) < len(texts):
        raise InputError(f"data {', '.join(texts)}: several files need the task before each, once: science=rows.jsonl")
    return by_task
