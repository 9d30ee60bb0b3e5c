"""What is evaluated and how: the settings, checked all together before a model is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from remend.data import tasks
from remend.errors import CheckError, did_you_mean
from remend.evaluation.letters import LEAD
from remend.evaluation.settings import DTYPES, ENGINES, GRADERS, HOW, LM_EVAL, EvaluateSettings
from remend.files.atomic import JsonObject
from remend.files.settings import build
from remend.models.device import choose_device, choose_dtype


@dataclass(frozen=True)
class Plan:
    """An evaluation whose settings fit together: `data` is by task, device and dtype are chosen."""

    model: str
    tasks: tuple[str, ...]
    settings: EvaluateSettings
    data: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype

    @property
    def graders(self) -> tuple[str, ...]:
        """The modes that are asked for."""
        grader = self.settings.grader
        return tasks.MODES if grader == "both" else (grader or "paper",)

    @property
    def temperature(self) -> float:
        """Greedy for one answer; several are sampled from the model's own distribution."""
        return 1.0 if self.settings.samples > 1 else 0.0

    @property
    def own(self) -> list[str]:
        """The tasks of remend.tasks."""
        return [name for name in self.tasks if not name.startswith(LM_EVAL)]

    @property
    def harness(self) -> list[str]:
        """The tasks of lm-evaluation-harness, with their prefix."""
        return [name for name in self.tasks if name.startswith(LM_EVAL)]

    @property
    def hardware(self) -> dict[str, str]:
        """In what the model computes, and on what."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}

    def tokens(self, task: str) -> int:
        """Tokens an answer to a task may have."""
        return self.settings.max_new_tokens or tasks.get(task).max_new_tokens

    def settles(self, task: str) -> JsonObject:
        """What an answer depends on beside the model's files and the prompt."""
        settings = self.settings
        if settings.how == "choices":
            return {"how": settings.how, "lead": LEAD, **self.hardware}
        drawn = {"temperature": self.temperature, **({"seed": settings.seed} if self.temperature else {})}
        asked = {"how": settings.how, "engine": settings.engine, "max_new_tokens": self.tokens(task)}
        return {**asked, **drawn, **self.hardware}

    def record(self) -> JsonObject:
        """The settings that results depend on, as plain values."""
        settings = self.settings
        record: JsonObject = {"tasks": list(self.tasks), "how": settings.how, "limit": settings.limit}
        record["seed"] = settings.seed
        if settings.how == "generate":
            record |= {"graders": list(self.graders), "samples": settings.samples}
        return record | {"answers": {name: self.settles(name) for name in self.own}}


def make_plan(model: str, names: Sequence[str], values: Mapping[str, object]) -> Plan:
    """Check the settings of `evaluate` and bring them into form.

    Raises:
        CheckError: all that is wrong with them.
        InputError: an unknown setting, one of another type, or a device that is not there.
    """
    settings = build(EvaluateSettings, values, "evaluate")
    names = [names] if isinstance(names, str) else list(names)
    problems = [*_task_problems(names, settings.how), *_setting_problems(names, settings)]
    data, unclear = _data_by_task(settings.data, [name for name in names if name in tasks.names()])
    problems += unclear
    if problems:
        raise CheckError(problems)
    device = choose_device(settings.device)
    # On a CPU float32 whatever it can multiply in: the batch then changes an answer where two tokens are all but tied
    exact = settings.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if exact else choose_dtype(settings.dtype, device)
    return Plan(model, tuple(names), settings, data, device, dtype)


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


def _setting_problems(names: Sequence[str], settings: EvaluateSettings) -> Iterator[str]:
    allowed = (
        ("engine", settings.engine, ENGINES),
        ("how", settings.how, HOW),
        ("grader", settings.grader, GRADERS),
        ("dtype", settings.dtype, DTYPES),
    )
    for key, text, texts in allowed:
        if text is not None and text not in texts:
            yield f'{key} is "{text}"; allowed: {", ".join(texts)}.{did_you_mean(text, texts)}'
    for key in ("samples", "max_new_tokens", "limit", "batch_rows"):
        count = getattr(settings, key)
        if count is not None and count < 1:
            yield f"{key} is {count}; allowed is 1 or more"
    if settings.seed < 0:
        yield f"seed is {settings.seed}; allowed is 0 or more"
    if settings.include and not Path(settings.include).is_dir():
        yield f"include {settings.include} is no directory; give one with task files (YAML) of lm-evaluation-harness"
    if settings.how == "choices":
        useless = [key for key in ("grader", "max_new_tokens") if getattr(settings, key) is not None]
        useless += ["samples"] if settings.samples != 1 else []
        if useless:
            yield f"{', '.join(useless)}: without effect with how: choices, which generates nothing; leave it out"
        if settings.engine != "hf":
            yield "how: choices runs with engine hf only"
    if any(name.startswith(LM_EVAL) for name in names):
        if settings.engine != "hf" or settings.how != "generate" or settings.samples != 1:
            yield f"{LM_EVAL} tasks run with engine hf, how: generate and samples 1; evaluate them apart"
    elif settings.include or settings.allow_code or settings.num_fewshot is not None:
        yield f"include, allow_code and num_fewshot concern {LM_EVAL} tasks, and none is given; leave them out"
    if (settings.num_fewshot or 0) < 0:
        yield f"num_fewshot is {settings.num_fewshot}; allowed is 0 or more"


def _data_by_task(data: str | Mapping[str, str] | None, own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(rows by task, what is unclear)."""
    needing = [name for name in own if tasks.get(name).make is None]
    by_task: dict[str, str] = {}
    problems = []
    if isinstance(data, str):
        takers = own if len(own) == 1 else needing
        if len(takers) == 1:
            by_task = {takers[0]: data}
        else:
            which, say = " and ".join(takers or own), _example(takers or own)
            if which:
                problems.append(f"data {data} is one file, and could be for {which}; say it as {say}")
            else:
                problems.append(f"data {data} is for none of the tasks that are given; leave it out, or name its task")
            needing = []
    elif data is not None:
        by_task = dict(data)
        for name in by_task.keys() - set(own):
            problems.append(f"data is given for {name}, which is not among the tasks ({', '.join(own) or 'none'})")
    problems += [
        f"task {name} makes no rows of its own; give its JSON lines file or datasets id: {_example([name])}"
        for name in needing
        if name not in by_task
    ]
    return by_task, problems


def _example(names: Sequence[str]) -> str:
    texts = [f"{name}=FILE" for name in names]
    return f"--data {' --data '.join(texts)} (data: {{{', '.join(f'{name!r}: FILE' for name in names)}}})"
