"""What is evaluated and how: the settings, checked all together before a model is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remend.data import tasks
from remend.errors import CheckError, InputError, did_you_mean
from remend.evaluation.letters import LEAD
from remend.models.device import choose_device, choose_dtype

LM_EVAL = "lm-eval:"
"""Before the name of a task of lm-evaluation-harness."""

ENGINES = ("hf", "vllm")
HOW = ("generate", "choices")
GRADERS = (*tasks.MODES, "both")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """The settings; see `evaluate`. `data` is by task, `graders` the modes that are asked for."""

    model: str
    tasks: tuple[str, ...]
    data: Mapping[str, str]
    engine: str
    how: str
    graders: tuple[str, ...]
    samples: int
    max_new_tokens: int | None
    limit: int | None
    seed: int
    batch_rows: int | None
    device: torch.device
    dtype: torch.dtype
    include: Path | None
    allow_code: bool
    trust_remote_code: bool

    @property
    def temperature(self) -> float:
        """Greedy for one answer; several are sampled from the model's own distribution."""
        return 1.0 if self.samples > 1 else 0.0

    @property
    def own(self) -> list[str]:
        """The tasks of remend.tasks."""
        return [name for name in self.tasks if not name.startswith(LM_EVAL)]

    @property
    def harness(self) -> list[str]:
        """The tasks of lm-evaluation-harness, with their prefix."""
        return [name for name in self.tasks if name.startswith(LM_EVAL)]

    def tokens(self, task: str) -> int:
        """Tokens an answer to a task may have."""
        return self.max_new_tokens or tasks.get(task).max_new_tokens

    def settles(self, task: str) -> dict[str, Any]:
        """What an answer depends on beside the model's files and the prompt."""
        hardware = {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        if self.how == "choices":
            return {"how": self.how, "lead": LEAD, **hardware}
        drawn = {"temperature": self.temperature, **({"seed": self.seed} if self.temperature else {})}
        return {"how": self.how, "engine": self.engine, "max_new_tokens": self.tokens(task), **drawn, **hardware}

    def record(self) -> dict[str, Any]:
        """The settings that results depend on, as plain values."""
        found: dict[str, Any] = {"tasks": list(self.tasks), "how": self.how, "limit": self.limit, "seed": self.seed}
        if self.how == "generate":
            found |= {"graders": list(self.graders), "samples": self.samples}
        return found | {"answers": {name: self.settles(name) for name in self.own}}


def make_plan(model: str, names: Sequence[str], *, data: str | Mapping[str, str] | None, **settings: Any) -> Plan:
    """Check the settings of `evaluate` and bring them into form.

    Raises:
        CheckError: all that is wrong with them.
        InputError: the device is not there.
    """
    names = [names] if isinstance(names, str) else list(names)
    problems = list(_task_problems(names, settings["how"])) + list(_setting_problems(names, settings))
    found, unclear = _data_by_task(data, [name for name in names if name in tasks.names()])
    problems += unclear
    if problems:
        raise CheckError(problems)
    device = choose_device(settings.pop("device"))
    dtype, grader, include = settings.pop("dtype"), settings.pop("grader"), settings.pop("include")
    # On a CPU float32 whatever it can multiply in: there greedy answers don't depend on the batch
    exact = dtype == "auto" and device.type == "cpu"
    return Plan(
        model,
        tuple(names),
        found,
        graders=tasks.MODES if grader == "both" else (grader or "paper",),
        device=device,
        dtype=torch.float32 if exact else choose_dtype(dtype, device),
        include=Path(include) if include else None,
        **settings,
    )


def _task_problems(names: Sequence[str], how: str) -> Iterator[str]:
    known = tasks.names()
    if not names:
        yield f"no task is given; known: {', '.join(known)}, and {LM_EVAL}NAME"
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"task {name} is named twice; name it once"
        if name.startswith(LM_EVAL):
            if not name.removeprefix(LM_EVAL):
                yield f"{LM_EVAL} needs a name after it, e.g. {LM_EVAL}hellaswag"
        elif name not in known:
            yield f'unknown task "{name}"; known: {", ".join(known)}, and {LM_EVAL}NAME.{did_you_mean(name, known)}'
        elif how == "choices" and not tasks.get(name).letters:
            letters = [other for other in known if tasks.get(other).letters]
            yield (
                f"task {name} is no choice between letters, so how: choices can't score it; "
                f"tasks with letters are {', '.join(letters)}. Use how: generate"
            )


def _setting_problems(names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[str]:
    allowed = {"engine": ENGINES, "how": HOW, "grader": (*GRADERS, None), "dtype": DTYPES}
    for key, values in allowed.items():
        if settings[key] not in values:
            texts = [value for value in values if value]
            yield f'{key} is "{settings[key]}"; allowed: {", ".join(texts)}.{did_you_mean(str(settings[key]), texts)}'
    for key in ("samples", "max_new_tokens", "limit", "batch_rows"):
        if settings[key] is not None and settings[key] < 1:
            yield f"{key} is {settings[key]}; allowed is 1 or more"
    if settings["seed"] < 0:
        yield f"seed is {settings['seed']}; allowed is 0 or more"
    if settings["include"] and not Path(settings["include"]).is_dir():
        yield f"include {settings['include']} is no directory; give one with task files (YAML) of lm-evaluation-harness"
    if settings["how"] == "choices":
        useless = [key for key in ("grader", "max_new_tokens") if settings[key] is not None]
        useless += ["samples"] if settings["samples"] != 1 else []
        if useless:
            yield f"{', '.join(useless)}: without effect with how: choices, which generates nothing; leave it out"
        if settings["engine"] != "hf":
            yield "how: choices runs with engine hf only"
    if any(name.startswith(LM_EVAL) for name in names):
        if settings["engine"] != "hf" or settings["how"] != "generate" or settings["samples"] != 1:
            yield f"{LM_EVAL} tasks run with engine hf, how: generate and samples 1; evaluate them apart"
    elif settings["include"] or settings["allow_code"]:
        yield f"include and allow_code concern {LM_EVAL} tasks, and none is given; leave them out"


def _data_by_task(data: str | Mapping[str, str] | None, own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(rows by task, what is unclear)."""
    needing = [name for name in own if tasks.get(name).make is None]
    found: dict[str, str] = {}
    problems = []
    if isinstance(data, str):
        takers = own if len(own) == 1 else needing
        if len(takers) == 1:
            found = {takers[0]: data}
        else:
            which = " and ".join(takers or own) or "tasks of lm-evaluation-harness"
            problems.append(f"data {data} is one file, and could be for {which}; say it as {_example(takers or own)}")
            needing = []
    elif data is not None:
        found = dict(data)
        for name in found.keys() - set(own):
            problems.append(f"data is given for {name}, which is not among the tasks ({', '.join(own) or 'none'})")
    problems += [
        f"task {name} makes no rows of its own; give its JSON lines file or datasets id: {_example([name])}"
        for name in needing
        if name not in found
    ]
    return found, problems


def _example(names: Sequence[str]) -> str:
    texts = [f"{name}=FILE" for name in names]
    return f"--data {' --data '.join(texts)} (data: {{{', '.join(f'{name!r}: FILE' for name in names)}}})"


def parse_tasks(text: str) -> list[str]:
    """Task names from one text: "tooluse,lm-eval:hellaswag,ifeval" is tooluse, lm-eval:hellaswag, lm-eval:ifeval.

    What follows a name with `lm-eval:` is of lm-evaluation-harness too, unless it is a task of remend's.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        theirs = bool(found) and found[-1].startswith(LM_EVAL) and part not in tasks.names()
        found.append(f"{LM_EVAL}{part}" if theirs and not part.startswith(LM_EVAL) else part)
    return found


def parse_data(texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """`evaluate`'s data from texts like "rows.jsonl", or "science=rows.jsonl" for each of several tasks.

    Raises InputError when texts of both kinds are given, several files without a task, or a task twice.
    """
    if not texts:
        return None
    named = [text.partition("=") for text in texts if text.partition("=")[0] in tasks.names() and "=" in text]
    if not named and len(texts) == 1:
        return texts[0]
    found = {name: source for name, _, source in named}
    if len(found) < len(texts):
        raise InputError(f"data {', '.join(texts)}: several files need the task before each, once: science=rows.jsonl")
    return found
