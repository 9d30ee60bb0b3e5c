"""Tasks of lm-evaluation-harness (EleutherAI, arXiv 2405.14782) on the model in memory.

remend eval smollm2 --task lm-eval:hellaswag,ifeval --out runs/general.json
remend eval smollm2 --task lm-eval:mine --include my_tasks --out runs/mine.json     my_tasks/mine.yaml, no network

The package is imported when it is asked for; `pip install 'remend[eval]'` brings it. The weights are those that remend
loads: a quantized student's lie on its grid. Chat templates are applied to the tasks of CHAT alone, as is usual for
them; the others are continued as plain text.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from remend.console import console, stage
from remend.data.bounded_templates import bounded
from remend.errors import CheckError, FileError, InputError, RemendError, did_you_mean
from remend.evaluation.results import scored
from remend.evaluation.sandbox import CodeEval, require_sandbox
from remend.evaluation.settings import LM_EVAL
from remend.files.atomic import JsonObject
from remend.files.reading import require_finite
from remend.models.protocols import CausalLM, Tokenizer

ROWS, GPU_ROWS = {"cpu": 8}, 16
"""Rows of a batch: the harness holds the logits of all positions."""

CHAT = {"ifeval", "humaneval_instruct"}
METRICS = {
    ("hellaswag", "acc"): "HellaSwag, accuracy by log-likelihood",
    ("hellaswag", "acc_norm"): "HellaSwag, accuracy by log-likelihood per character",
    ("truthfulqa_mc1", "acc"): "TruthfulQA MC1, the one true answer is the likeliest",
    ("truthfulqa_mc2", "acc"): "TruthfulQA MC2, probability of all true answers",
    ("winogrande", "acc"): "WinoGrande XL, accuracy by log-likelihood",
    ("mmlu", "acc"): "MMLU, accuracy over all subjects by letter log-likelihood",
    ("ifeval", "prompt_level_strict_acc"): "IFEval, prompts with all instructions followed, strict",
    ("ifeval", "prompt_level_loose_acc"): "IFEval, prompts with all instructions followed, loose",
    ("ifeval", "inst_level_strict_acc"): "IFEval, share of a prompt's instructions followed, strict",
    ("ifeval", "inst_level_loose_acc"): "IFEval, share of a prompt's instructions followed, loose",
    ("humaneval", "pass@1"): "HumanEval, pass@1 of one greedy answer",
}
"""Names in full; others are task and metric."""


class Tasks:
    """The harness with its own tasks and those of a folder with task files (YAML).

    Args:
        include: the folder.
        num_fewshot: examples before each row; None is as many as a task names.

    Raises FileError when the package is not installed.
    """

    def __init__(self, include: Path | None = None, *, num_fewshot: int | None = None) -> None:
        self._shots, self._include = num_fewshot, include
        digest = {"include_sha256": _digest(include)} if include else {}
        try:
            with stage("loading lm-evaluation-harness"):
                self._package: Any = importlib.import_module("lm_eval")
            self._manager = _manager(str(include) if include else None, digest.get("include_sha256"))
        except ImportError as error:
            raise FileError(
                f"{LM_EVAL} tasks need the package lm-eval, which is not installed or not complete ({error}). "
                "Install it with: pip install 'remend[eval]' (or pip install lm-eval)"
            ) from None
        shots = {} if num_fewshot is None else {"num_fewshot": num_fewshot}
        self.about = {"version": importlib.metadata.version("lm_eval"), **digest, **shots}
        """The package's version, the hash of the folder's files, and the examples where they were asked for."""

    def check(self, names: Sequence[str], *, allow_code: bool) -> None:
        """Raises CheckError with all unknown names, and those that run code where that is not allowed, or not apart."""
        problems, known = [], self._manager.all_tasks
        if self._include and not allow_code and (said := _code_of(self._include)):
            problems.append(said)
        for name in (name.removeprefix(LM_EVAL) for name in names):
            if name not in known:
                near = did_you_mean(name, known).replace('"', f'"{LM_EVAL}', 1)
                problems.append(
                    f'unknown task "{LM_EVAL}{name}": lm-eval {self.about["version"]} knows {len(known)} names, but '
                    f"not this one. Give your own with include (--include DIRECTORY).{near}"
                )
            elif name.startswith(("humaneval", "mbpp")) and not allow_code:
                problems.append(
                    f"task {LM_EVAL}{name} runs code that the model writes, apart from your files and the network; say "
                    "--allow-code (Python: allow_code=True)"
                )
            elif name.startswith(("humaneval", "mbpp")):
                try:
                    require_sandbox()
                except FileError as error:
                    problems.append(f"task {LM_EVAL}{name}: {error}")
        if problems:
            raise CheckError(problems)

    def run(
        self, model: CausalLM, tokenizer: Tokenizer, name: str, *, limit: int | None, seed: int, rows: int, code: bool
    ) -> list[JsonObject]:
        """Evaluate a task or a group of tasks: its first `limit` documents in batches of `rows`.

        The seed settles few-shot examples. `code`: the task may run code that the model writes, and Python of its own.

        Returns:
            For each metric that is a number from 0 to 1 a document: task (with the prefix), grader (the metric's
            short name, with its filter where that is not "none"), metric (in full), what results.scored gives over
            documents, reported (the harness's own, which may weigh otherwise), chat_template, items [{id, correct,
            answer, target}]; of a group the id is task/document.

        Raises:
            FileError: the task's data can't be loaded.
            InputError: no metric of the task is a number from 0 to 1 a document.
        """
        short = name.removeprefix(LM_EVAL)
        chat = short in CHAT and bool(tokenizer.chat_template)
        console.print(f"{LM_EVAL}{short} (lm-evaluation-harness {self.about['version']})")
        seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
        try:
            with _quietly(), _guarded(allow_code=code):
                wrapped: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
                outcome = self._package.simple_evaluate(
                    model=wrapped(pretrained=model, tokenizer=tokenizer, batch_size=rows),
                    tasks=[short],
                    task_manager=self._manager,
                    num_fewshot=self._shots,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat,
                    confirm_run_unsafe_code=code,
                    **seeds,
                )
        except RemendError:
            raise
        except Exception as error:  # data sets, task files and templates raise anything
            raise FileError(
                f"task {LM_EVAL}{short} failed in lm-eval: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}. Its data comes from the hub unless its YAML names files"
            ) from error
        parts = [{**part, "chat_template": chat} for part in parts_of(outcome, short)]
        if not parts:
            raise InputError(
                f"task {LM_EVAL}{short} has no metric from 0 to 1 a document, so it can't be compared item by item; "
                "run it with lm-eval itself"
            )
        return parts


def _digest(include: Path) -> str:
    """SHA-256 over a folder's task files and data. Raises FileError for a device or a pipe in the place of one."""
    digest = hashlib.sha256()
    for path in sorted(include.rglob("*")):
        if path.exists():
            require_finite(path)
        if path.is_file() and path.suffix in {".yaml", ".yml", ".py", ".json", ".jsonl"}:
            digest.update(f"{path.relative_to(include)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _manager(include: str | None, digest: str | None) -> Any:
    """Its own task files are thousands and take seconds to read; a changed folder (`digest`) is read anew."""
    with stage("reading its tasks"), _quietly():
        return importlib.import_module("lm_eval.tasks").TaskManager(include_path=include)


def parts_of(outcome: JsonObject, short: str) -> list[JsonObject]:
    """The results of one task or group as parts of a results file; see Tasks.run."""
    several = len(outcome["samples"]) > 1
    items: dict[tuple[str, str], list[JsonObject]] = {}
    for leaf, samples in outcome["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = _share(sample[metric])
                entry: JsonObject = {
                    "id": f"{leaf}/{sample['doc_id']}" if several else str(sample["doc_id"]),
                    "correct": value,
                }
                entry |= {"answer": _answer(sample["filtered_resps"]), "target": str(sample["target"])}
                items.setdefault((metric, sample["filter"]), []).append(entry)
    parts = []
    for (metric, filtered), rows in items.items():
        if any(row["correct"] is None for row in rows):
            continue
        reported = {**outcome["results"], **outcome.get("groups", {})}.get(short, {}).get(f"{metric},{filtered}")
        parts.append(
            {
                "task": f"{LM_EVAL}{short}",
                "grader": metric if filtered == "none" else f"{metric} ({filtered})",
                "metric": METRICS.get((short, metric), f"{short}, {metric}"),
                "how": "lm-eval",
                **scored(rows),
                "reported": float(reported) if isinstance(reported, int | float) else None,
                "items": rows,
            }
        )
    return parts


def _share(value: Any) -> float | None:
    """A document's metric as a number from 0 to 1, of several values their mean; None where it is none."""
    try:
        values = [float(v) for v in (value if isinstance(value, list | tuple) else [value])]
    except (TypeError, ValueError):
        return None
    mean = sum(values) / len(values) if values else math.nan
    return mean if 0 <= mean <= 1 else None


def _answer(responses: Sequence[Any]) -> str | list[int | str | float]:
    """The generated text, or the log-likelihood of each choice. Raises InputError when one is not finite."""
    plain = [r[0] if isinstance(r, list | tuple) and r else r for r in responses]
    if len(plain) == 1:
        return str(plain[0])
    scores = [p if isinstance(p, int | str) else float(p) for p in plain]
    if not all(math.isfinite(p) for p in scores if isinstance(p, float)):
        raise InputError("the model's log-likelihoods are not finite: its weights are damaged beyond use")
    return scores


_INCLUDED = re.compile(rb"^\s*include:\s*['\"]?([^'\"\s#]+)", re.MULTILINE)


def _code_of(folder: Path) -> str | None:
    """Which task file would have Python run, in a sentence; None where none would.

    A file says so by the tag !function; it may take another one in from elsewhere (include: …).
    """
    package = Path(str(importlib.import_module("lm_eval").__file__)).parent
    waiting, seen = [path for path in sorted(folder.rglob("*")) if path.is_file()], set[Path]()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or path.suffix == ".py" or path.is_relative_to(package) or path.stat().st_size > 2**22:
            continue
        seen.add(path)
        text = path.read_bytes()
        if b"!function" in text:
            return (
                f"the task file {path} has Python of its own run (!function). Look at it, and if you trust it say "
                "--allow-code (Python: allow_code=True)"
            )
        named = (path.parent / name.decode(errors="replace") for name in _INCLUDED.findall(text))
        waiting += [other for other in named if other.is_file()]
    return None


@contextmanager
def _guarded(*, allow_code: bool) -> Iterator[None]:
    """Inside, code that a model writes runs in the sandbox; and without `allow_code` task files have no code run: not
    as a metric of their own, nor out of a template."""
    from jinja2.sandbox import SandboxedEnvironment

    evaluate: Any = importlib.import_module("evaluate")
    utils: Any = importlib.import_module("lm_eval.utils")
    load, templates = evaluate.load, utils.env

    def loaded(path: str, *words: Any, **options: Any) -> Any:
        if path == "code_eval":
            return CodeEval()
        if not allow_code and ("/" in path or Path(path).exists()):
            raise InputError(
                f"the metric {path} is Python of somebody's own; look at it, and if you trust it say --allow-code "
                "(Python: allow_code=True)"
            )
        return load(path, *words, **options)

    loader: Any = importlib.import_module("lm_eval.tasks._yaml_loader")
    package = Path(str(importlib.import_module("lm_eval").__file__)).parent.resolve()
    by_name, by_path = loader._import_func_in_yml, loader._import_fun_from_str

    def theirs(function: str, place: Path) -> None:
        """However a task file spells it, Python is found here, and only the harness's own may run."""
        if not allow_code and not place.resolve().is_relative_to(package):
            raise InputError(
                f"a task file has Python of its own run ({function} of {place}). Look at it, and if you trust it say "
                "--allow-code (Python: allow_code=True)"
            )

    def named(function: str, folder: Path) -> Any:
        theirs(function, Path(folder))
        return by_name(function, folder)

    def placed(function: str) -> Any:
        theirs(function, Path(function).parent)
        return by_path(function)

    class Apart(SandboxedEnvironment):
        """What its templates write has bounds of time and length."""

        def from_string(self, source: Any, *words: Any, **options: Any) -> Any:
            template: Any = super().from_string(source, *words, **options)
            write = template.render

            def render(*of: Any, **by_name: Any) -> str:
                return bounded(str(source), lambda: write(*of, **by_name), called=f"the task's template {source!r:.60}")

            template.render = render
            return template

    apart = Apart(undefined=templates.undefined, keep_trailing_newline=True)
    apart.filters.update(templates.filters)
    evaluate.load, utils.env = loaded, apart
    loader._import_func_in_yml, loader._import_fun_from_str = named, placed
    try:
        yield
    finally:
        evaluate.load, utils.env = load, templates
        loader._import_func_in_yml, loader._import_fun_from_str = by_name, by_path


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's log of every step; its bars stay."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
