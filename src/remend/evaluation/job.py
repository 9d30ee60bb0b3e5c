"""`remend eval`: grade a model on tasks; every answer is kept with its grade and the reason.

remend eval smollm2 --task tooluse --data dev.jsonl --out runs/reference.json
remend eval smollm2 --task science --data dev.jsonl --how choices --out runs/letters.json

Answers go to OUT's name with .answers.jsonl as they come, and the same call goes on after an interruption.
docs/evaluate.md tells what each number means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from remend.console import console, stage
from remend.data.order import derive_seed
from remend.errors import InputError
from remend.evaluation import harness, letters, results
from remend.evaluation.generation import Question, ask, batches, hf_sampler, rows_of, token_cap
from remend.evaluation.plan import Plan, make_plan
from remend.evaluation.rows import Material, Table, dropped_note, encode, read
from remend.evaluation.store import Answers, answers_path, key_of
from remend.files.atomic import write_json
from remend.files.environment import environment
from remend.files.run_directory import MANIFEST
from remend.models.find import ModelSource, fetch_model, find_model, hash_files
from remend.models.load import load_config, load_model, load_tokenizer
from remend.models.sampling.rollout import Sampler
from remend.models.sampling.vllm_engine import ROWS as VLLM_ROWS
from remend.models.sampling.vllm_engine import VllmSampler
from remend.models.scorer import scorer
from remend.models.tokens import eos_ids

GPU_LETTER_ROWS, GPU_LETTER_TOKENS = 32, 16_384
"""Prompts, and tokens, that are scored for letters at once. A CPU takes them one by one: that is not slower, since what
a layer makes stays in its cache, nothing is padding, and a score can't hang on what else is in the batch.
"""


def evaluate(
    model: str,
    tasks: Sequence[str],
    out: str | Path,
    *,
    data: str | Mapping[str, str] | None = None,
    engine: str = "hf",
    grader: str | None = None,
    how: str = "generate",
    samples: int = 1,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_rows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    include: str | None = None,
    allow_code: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Grade a model on tasks and write the results, as `remend compare` reads them.

    Args:
        model: a directory (also one on a grid, or an adapter), GGUF file, hub id[@revision] or smollm2, or a
            recovery's run directory.
        tasks: of remend.tasks, and lm-eval:NAME for those of lm-evaluation-harness.
        out: a new .json file. One that holds the results of the same settings is returned as it is.
        data: JSON lines or a datasets id; by task where there are several. tooluse and science need it; the others
            make their held-out rows themselves, the same for every model.
        engine: hf (transformers) or vllm.
        grader: paper, the default, grades as the authors do; robust what was meant; both gives two results.
        how: generate answers, or choices: compare the log-likelihoods of the answer letters (see letters.py).
        samples: answers a row. 1 is greedy; more are drawn at temperature 1 and give pass@k.
        max_new_tokens: of an answer; by default the task's own.
        limit: rows a task, the first ones; by default all of `data`, 200 made ones, the 360 prompts of general.
        seed: of the sampled answers, and of the deals that tell letters from chance. Rows don't depend on it.
        batch_rows: rows at once, at most; memory limits them too. Greedy answers in float32 don't depend on it, and
            letters on a CPU are scored one by one.
        device: auto, cpu, cuda, cuda:N, mps.
        dtype: auto, float32, bfloat16; auto is float32 on a CPU, and bfloat16 on a GPU where that is fast.
        include: a directory with task files (YAML) of one's own for lm-eval.
        allow_code: let lm-eval tasks run code that the model writes (humaneval).
        trust_remote_code: let a model directory run its own Python.

    Returns:
        The content of `out`: task, grader, n, score, items and more (results.py), for several tasks or graders under
        `results`; model, files (hashes), settings, data (hashes), warnings, environment, seconds.

    Raises:
        InputError, FileError: settings that don't fit (all at once), rows without a needed column, no rows, prompts
            that all exceed the context, a model that answers nothing at all, an occupied `out`, a missing package.
    """
    settings: dict[str, Any] = {"engine": engine, "grader": grader, "how": how, "samples": samples, "limit": limit}
    settings |= {"max_new_tokens": max_new_tokens, "seed": seed, "batch_rows": batch_rows, "device": device}
    settings |= {"dtype": dtype, "include": include, "allow_code": allow_code, "trust_remote_code": trust_remote_code}
    plan = make_plan(model, tasks, data=data, **settings)
    return _Evaluation(plan, Path(out)).run()


class _Evaluation:
    """One evaluation: holds what its tasks share."""

    def __init__(self, plan: Plan, out: Path) -> None:
        if out.suffix != ".json" or out.is_dir():
            raise InputError(f"out {out} must be the name of a .json file, e.g. {out.with_suffix('.json')}")
        self.plan, self.out, self.began = plan, out, time.monotonic()
        self.warnings: list[str] = []
        self.source = _source(plan.model)
        self.tables = [read(name, plan.data.get(name), plan.limit) for name in plan.own]
        if plan.how == "choices":
            for table in self.tables:
                for row in table.rows.values():
                    table.task.gold(row)
        self.tasks = harness.Tasks(plan.include) if plan.harness else None
        if self.tasks:
            self.tasks.check(plan.harness, allow_code=plan.allow_code)
        self.files = hash_files(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source, trust_remote_code=self.plan.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """Loaded when the first answer is missing."""
        plan = self.plan
        with stage(f"loading {plan.model}"):
            return load_model(
                self.source, dtype=plan.dtype, device=plan.device, trust_remote_code=plan.trust_remote_code
            ).requires_grad_(False)

    @cached_property
    def sampler(self) -> Sampler:
        """The engine."""
        if self.plan.engine == "hf":
            return hf_sampler(self.model, self.tokenizer, greedy=self.plan.temperature == 0)
        from transformers import GenerationConfig

        path = fetch_model(self.source, weights=False).path
        told = path is not None and (path / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(str(path)) if told else None
        eos = eos_ids(SimpleNamespace(generation_config=generation), self.tokenizer)
        dtype = str(self.plan.dtype).removeprefix("torch.")
        return VllmSampler(self.source, dtype=dtype, eos=eos, trust_remote_code=self.plan.trust_remote_code)

    def run(self) -> dict[str, Any]:
        """Rows, answers, grades, results."""
        same = {"files": self.files, "settings": self.plan.record(), "data": self._data()}
        done = results.finished(self.out, same)
        if done is not None:
            console.print(f"{self.out} holds the results of these settings already")
            return done
        answers = Answers(answers_path(self.out))
        parts: list[dict[str, Any]] = []
        for table in self.tables:
            parts += self._task(table, answers)
        for name in self.plan.harness:
            parts += self._harness(name, answers)
        for warning in self.warnings:
            console.print(f"[yellow]warning[/]: {warning}", soft_wrap=True)
        about: dict[str, Any] = {"model": self.plan.model, **same, "warnings": self.warnings}
        about |= {"environment": environment(), "seconds": round(time.monotonic() - self.began, 1)}
        found: dict[str, Any] = results.plain({**(parts[0] if len(parts) == 1 else {"results": parts}), **about})
        write_json(self.out, found)
        return found

    def _data(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            t.task.name: {"from": t.origin, "rows": len(t.rows), "sha256": t.digest} for t in self.tables
        }
        return found | ({"lm-eval": self.tasks.about} if self.tasks else {})

    def _task(self, table: Table, answers: Answers) -> list[dict[str, Any]]:
        name, plan = table.task.name, self.plan
        context = getattr(
            load_config(self.source, trust_remote_code=plan.trust_remote_code).get_text_config(),
            "max_position_embeddings",
            None,
        )
        reserve = plan.tokens(name) if plan.how == "generate" else len(self.tokenizer(f"{letters.LEAD}A")["input_ids"])
        material = encode(table, self.tokenizer, context, reserve)
        if material.dropped:
            self.warnings.append(f"{name}: {dropped_note(material, context, reserve)}")
        if table.repeated:
            self.warnings.append(f"{name}: {table.repeated} rows of {table.origin} stand there twice; graded once")
        parts = self._letters(material, answers) if plan.how == "choices" else self._answers(material, answers)
        return [{**part, "dropped": material.dropped} for part in parts]

    def _keys(self, material: Material) -> list[str]:
        """What settles each row's answer."""
        settles = self.plan.settles(material.table.task.name)
        return [key_of(self.files, settles, material.table.task.name, p.id, p.tokens) for p in material.prompts]

    def _answers(self, material: Material, answers: Answers) -> list[dict[str, Any]]:
        name, plan = material.table.task.name, self.plan
        keys = [[f"{key}-{at}" for at in range(plan.samples)] for key in self._keys(material)]
        wanted = [
            Question(
                key,
                prompt,
                derive_seed(plan.seed, "evaluation", name, prompt.id, at),
                {"task": name, "id": prompt.id, "sample": at},
            )
            for prompt, own in zip(material.prompts, keys, strict=True)
            for at, key in enumerate(own)
        ]
        open_ = [question for question in wanted if question.key not in answers]
        if open_:
            hf, sampler = plan.engine == "hf", self.sampler
            ask(
                sampler,
                open_,
                answers,
                self.tokenizer,
                f"answering {name}",
                max_new_tokens=plan.tokens(name),
                temperature=plan.temperature,
                rows=plan.batch_rows or (rows_of(plan.device) if hf else VLLM_ROWS),
                tokens=token_cap(self.model) if hf else 2**62,
                done=len(wanted) - len(open_),
            )
        given = [[answers[key] for key in own] for own in keys]
        if not any(answer["answer"].strip() for own in given for answer in own):
            raise InputError(
                f"{name}: all {len(wanted)} answers are empty, so there is nothing to grade: the model ends at once. "
                f"Look at its chat template and at the tokens that end an answer; the answers are in {answers.path}"
            )
        parts = [results.generated(material, given, mode) for mode in plan.graders]
        self._warn(parts)
        return parts

    def _warn(self, parts: Sequence[Mapping[str, Any]]) -> None:
        first, total = parts[0], parts[0]["n"] * self.plan.samples
        name, limit = first["task"], self.plan.tokens(first["task"])
        if first["clipped"]:
            self.warnings.append(f"{name}: {first['clipped']} of {total} answers met the limit of {limit} tokens")
        if first["empty"]:
            self.warnings.append(f"{name}: {first['empty']} of {total} answers are empty")
        for part in parts:
            if part["raised"]:
                self.warnings.append(results.raised_note(part))

    def _letters(self, material: Material, answers: Answers) -> list[dict[str, Any]]:
        task = material.table.task
        name = task.name
        keys = self._keys(material)
        ends = (self.tokenizer.eos_token_id,)
        open_ = [
            (key, letters.choice(self.tokenizer, prompt.id, prompt.tokens, task.choices(row), ends=ends))
            for key, prompt, row in zip(keys, material.prompts, material.rows, strict=True)
            if key not in answers
        ]
        if open_:
            parts = scorer(self.model)
            one_by_one = self.plan.device.type == "cpu"
            if one_by_one and self.plan.batch_rows not in (None, 1):
                self.warnings.append(f"{name}: batch_rows has no effect, since a CPU scores letters one by one")
            turns = letters.FirstTurns(parts) if one_by_one else None
            rows = 1 if one_by_one else self.plan.batch_rows or GPU_LETTER_ROWS
            with stage(f"scoring letters of {name}", len(keys), len(keys) - len(open_)) as advance:
                for batch in batches([len(c) for _, c in open_], rows=rows, tokens=GPU_LETTER_TOKENS):
                    found = letters.log_likelihoods(parts, [open_[i][1] for i in batch], turns=turns)
                    answers.add(
                        [
                            {"key": open_[i][0], "task": name, "id": open_[i][1].id, "log_likelihoods": values}
                            for i, values in zip(batch, found, strict=True)
                        ]
                    )
                    advance(len(batch))
        return [results.chosen(material, [answers[key] for key in keys], self.plan.seed)]

    def _harness(self, name: str, answers: Answers) -> list[dict[str, Any]]:
        """A task of lm-evaluation-harness; it is resumed task by task."""
        assert self.tasks is not None
        plan = self.plan
        dtype, device = str(plan.dtype), plan.device.type
        key = key_of(self.files, name, self.tasks.about, plan.limit, plan.seed, dtype, device)
        if key not in answers:
            rows = plan.batch_rows or harness.ROWS.get(plan.device.type, harness.GPU_ROWS)
            found = self.tasks.run(
                self.model, self.tokenizer, name, limit=plan.limit, seed=plan.seed, rows=rows, code=plan.allow_code
            )
            answers.add([{"key": key, "task": name, "parts": found}])
        return [dict(part) for part in answers[key]["parts"]]


def _source(model: str) -> ModelSource:
    """Where the model is; of a recovery's run directory its model is meant."""
    path = Path(model)
    if (path / MANIFEST).is_file() and (path / "model" / "config.json").is_file():
        return find_model(str(path / "model"))
    return find_model(model)
