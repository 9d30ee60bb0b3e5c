"""`remend eval`: grade a model on tasks; every answer is kept with its grade and the reason.

remend eval smollm2 --task tooluse --data dev.jsonl --out runs/reference.json
remend eval smollm2 --task science --data dev.jsonl --how choices --out runs/letters.json

Answers go to OUT's name with .answers.jsonl as they come, and the same call goes on after an interruption.
docs/how-to/evaluate.md tells what each number means.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from remend.console import console, stage, warn
from remend.data.given import as_files, rows_from_python, write_rows
from remend.data.order import derive_seed
from remend.errors import InputError
from remend.evaluation import harness, letters, results
from remend.evaluation.generation import (
    Answers,
    Limits,
    Question,
    answers_path,
    ask,
    fill,
    hf_sampler,
    key_of,
    open_answers,
    rows_of,
    token_cap,
)
from remend.evaluation.plan import Plan, make_plan
from remend.evaluation.rows import Material, TaskRows, dropped_note, encode, read
from remend.evaluation.settings import EvaluateSettings
from remend.files.atomic import JsonObject, write_json
from remend.files.environment import environment
from remend.files.run_directory import MANIFEST
from remend.files.settings import takes
from remend.models.adapters import is_adapter
from remend.models.find import ModelSource, fetch_model, find_model, hash_files
from remend.models.load import eos_ids, load_config, load_model, load_tokenizer
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.room import promised_positions
from remend.models.sampling.rollout import Sampler
from remend.models.sampling.vllm_engine import ROWS as VLLM_ROWS
from remend.models.sampling.vllm_engine import VllmSampler
from remend.models.scorer import scorer

GPU_LETTER_LIMITS = Limits(rows=32, tokens=16_384)
"""Of the prompts that are scored for letters at once. A CPU takes them one by one: that is not slower, since what a
layer makes stays in its cache, nothing is padding, and a score can't hang on what else is in the batch.
"""


@takes(EvaluateSettings)
def evaluate(model: str | Path, tasks: Sequence[str], out: str | Path, **overrides: object) -> JsonObject:
    """Grade a model on tasks and write the results, as `remend compare` reads them.

    Args:
        model: a directory (also one on a grid, or an adapter), GGUF file, hub id[@revision] or smollm2, or a
            recovery's run directory.
        tasks: of remend.tasks, and lm-eval:NAME for those of lm-evaluation-harness.
        out: a new .json file. One that holds the results of the same settings is returned as it is.
        **overrides: fields of EvaluateSettings, e.g. data="dev.jsonl", how="choices", samples=4, limit=100.

    Returns:
        The content of `out`: task, grader, n, score, items and more (results.py), for several tasks or graders under
        `results`; model, files (hashes), settings, data (hashes), warnings, environment, seconds.

    Raises:
        InputError, FileError: settings that don't fit (all at once), rows without a needed column, no rows, prompts
            that all exceed the context, a model that answers nothing at all, an occupied `out`, a missing package.
    """
    out = Path(out)
    with rows_from_python():
        taken = as_files(overrides, lambda name: out.with_suffix(f".{name}.jsonl"))
        return _evaluated(make_plan(os.fspath(model), tasks, taken), out)


def _evaluated(plan: Plan, out: Path) -> JsonObject:
    began = time.monotonic()
    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"out {out} must be the name of a .json file, e.g. {out.with_suffix('.json')}")
    source = _source(plan.model, plan.settings.trust_remote_code)
    tables = [read(name, plan.data.get(name), plan.settings.limit) for name in plan.own]
    if plan.settings.how == "choices":
        for table in tables:
            for row in table.rows.values():
                table.task.gold(row)
    package = _package(plan)
    same = {"files": hash_files(source), "settings": plan.record(), "data": _data(tables, package)}
    if (done := results.finished(out, same)) is not None:
        console.print(f"{out} holds the results of these settings already")
        return done
    tokens = plan.settings.samples * sum(len(t.rows) * plan.tokens(t.task.name) for t in tables)
    evaluation = _Evaluation(plan, source, open_answers(answers_path(out)), same["files"], tokens)
    parts = [part for table in tables for part in evaluation.own(table)]
    if package:
        parts += [part for name in plan.harness for part in evaluation.theirs(package, name)]
    for warning in evaluation.warnings:
        warn(warning)
    about: JsonObject = {"model": plan.model, **same, "warnings": evaluation.warnings, "environment": environment()}
    about["seconds"] = round(time.monotonic() - began, 1)
    content = results.plain({**(parts[0] if len(parts) == 1 else {"results": parts}), **about})
    write_rows(out)
    evaluation.answers.flush()
    write_json(out, content)
    return content


def _source(model: str, trust_remote_code: bool) -> ModelSource:
    """Where the model is; of a recovery's run directory its model is meant."""
    path = Path(model)
    written = (path / "model" / "config.json").is_file() or is_adapter(path / "model")
    if (path / MANIFEST).is_file() and written:
        model = str(path / "model")
    return find_model(model, trust_remote_code=trust_remote_code)


def _package(plan: Plan) -> harness.Tasks | None:
    """lm-evaluation-harness, where tasks of it are asked for; it knows them all."""
    if not plan.harness:
        return None
    include = Path(plan.settings.include) if plan.settings.include else None
    package = harness.Tasks(include, num_fewshot=plan.settings.num_fewshot)
    package.check(plan.harness, allow_code=plan.settings.allow_code)
    return package


def _data(tables: Sequence[TaskRows], package: harness.Tasks | None) -> JsonObject:
    data: JsonObject = {t.task.name: {"from": t.origin, "rows": len(t.rows), "sha256": t.digest} for t in tables}
    return data | ({"lm-eval": package.about} if package else {})


class _Evaluation:
    """What the tasks of an evaluation share. Model and engine are loaded when the first answer is missing.

    `tokens` is how many all answers have at most.
    """

    def __init__(
        self, plan: Plan, source: ModelSource, answers: Answers, files: Mapping[str, str], tokens: int
    ) -> None:
        self.plan, self.settings, self.source, self.answers, self.files = plan, plan.settings, source, answers, files
        self.tokens = tokens
        self.warnings: list[str] = []

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.source)

    @cached_property
    def model(self) -> CausalLM:
        plan = self.plan
        with stage(f"loading {plan.model}"):
            return load_model(self.source, dtype=plan.dtype, device=plan.device).requires_grad_(False)

    @cached_property
    def sampler(self) -> Sampler:
        if self.settings.engine == "hf":
            return hf_sampler(self.model, self.tokenizer)
        from transformers import GenerationConfig

        path = fetch_model(self.source, weights=False).path
        told = path is not None and (path / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(str(path)) if told else None
        eos = eos_ids(SimpleNamespace(generation_config=generation), self.tokenizer)
        return VllmSampler(self.source, dtype=self.plan.hardware["dtype"], eos=eos, tokens=self.tokens)

    def limits(self) -> Limits:
        """Of a batch of answers. What fits the memory is settled by the first call, for those that go on with it."""
        if self.settings.engine != "hf":
            return Limits(self.settings.batch_rows or VLLM_ROWS)
        key = key_of(self.files, "tokens at once", self.plan.hardware)
        tokens = self.answers.once(key, lambda: {"tokens_at_once": token_cap(self.model)})["tokens_at_once"]
        return Limits(self.settings.batch_rows or rows_of(self.plan.device), tokens)

    def own(self, table: TaskRows) -> list[JsonObject]:
        """The parts of a task of remend.tasks, one a grader."""
        name, config = table.task.name, load_config(self.source).get_text_config()
        context = promised_positions(config)
        choices = self.settings.how == "choices"
        reserve = len(self.tokenizer(f"{letters.LEAD}A")["input_ids"]) if choices else self.plan.tokens(name)
        material = encode(table, self.tokenizer, context, reserve, config.vocab_size)
        if material.dropped:
            self.warnings.append(f"{name}: {dropped_note(material, context, reserve)}")
        if table.repeated:
            self.warnings.append(f"{name}: {table.repeated} rows of {table.origin} stand there twice; graded once")
        parts = self._letters(material) if choices else self._answers(material)
        return [{**part, "dropped": material.dropped} for part in parts]

    def theirs(self, package: harness.Tasks, name: str) -> list[JsonObject]:
        """The parts of a task of lm-evaluation-harness; it is resumed task by task."""
        settings, device = self.settings, self.plan.device.type
        key = key_of(self.files, name, package.about, settings.limit, settings.seed, str(self.plan.dtype), device)
        rows = settings.batch_rows or harness.ROWS.get(device, harness.GPU_ROWS)

        def run() -> JsonObject:
            limit, seed, code = settings.limit, settings.seed, settings.allow_code
            parts = package.run(self.model, self.tokenizer, name, limit=limit, seed=seed, rows=rows, code=code)
            return {"task": name, "parts": parts}

        return [dict(part) for part in self.answers.once(key, run)["parts"]]

    def _keys(self, material: Material) -> list[str]:
        """What settles each row's answer."""
        name = material.table.task.name
        settles = self.plan.settles(name)
        return [key_of(self.files, settles, name, p.id, p.tokens) for p in material.prompts]

    def _answers(self, material: Material) -> list[JsonObject]:
        name, plan = material.table.task.name, self.plan
        questions = [
            Question(
                f"{key}-{at}",
                prompt,
                derive_seed(self.settings.seed, "evaluation", name, prompt.id, at),
                {"task": name, "id": prompt.id, "sample": at},
            )
            for prompt, key in zip(material.prompts, self._keys(material), strict=True)
            for at in range(self.settings.samples)
        ]
        if any(question.key not in self.answers for question in questions):
            ask(
                self.sampler,
                questions,
                self.answers,
                self.tokenizer,
                f"answering {name}",
                max_new_tokens=plan.tokens(name),
                temperature=plan.temperature,
                limits=self.limits(),
            )
        every = [self.answers[question.key] for question in questions]
        if not any(answer["answer"].strip() for answer in every):
            raise InputError(
                f"{name}: all {len(every)} answers are empty, so there is nothing to grade: the model ends at once. "
                "Look at its chat template and at the tokens that end an answer; the answers are in "
                f"{self.answers.path}"
            )
        by_row = [every[at : at + self.settings.samples] for at in range(0, len(every), self.settings.samples)]
        parts = [results.generated(material, by_row, mode) for mode in plan.graders]
        self._warn(parts)
        return parts

    def _warn(self, parts: Sequence[JsonObject]) -> None:
        first, total = parts[0], parts[0]["n"] * self.settings.samples
        name, limit = first["task"], self.plan.tokens(first["task"])
        if first["clipped"]:
            self.warnings.append(f"{name}: {first['clipped']} of {total} answers met the limit of {limit} tokens")
        if first["empty"]:
            self.warnings.append(f"{name}: {first['empty']} of {total} answers are empty")
        self.warnings += [results.raised_note(part) for part in parts if part["raised"]]

    def _letters(self, material: Material) -> list[JsonObject]:
        task = material.table.task
        name, keys, eos = task.name, self._keys(material), self.tokenizer.eos_token_id
        choices = [
            letters.choice(
                self.tokenizer, prompt.id, prompt.tokens, task.choices(row), ends=() if eos is None else (eos,)
            )
            for prompt, row in zip(material.prompts, material.rows, strict=True)
        ]
        if any(key not in self.answers for key in keys):
            parts, batch_rows = scorer(self.model), self.settings.batch_rows
            one_by_one = self.plan.device.type == "cpu"
            if one_by_one and batch_rows not in (None, 1):
                self.warnings.append(f"{name}: batch_rows has no effect, since a CPU scores letters one by one")
            turns = letters.FirstTurns(parts) if one_by_one else None
            rows = 1 if one_by_one else batch_rows or GPU_LETTER_LIMITS.rows

            def answer(batch: list[int]) -> list[JsonObject]:
                scores = letters.log_likelihoods(parts, [choices[i] for i in batch], turns=turns)
                return [
                    {"key": keys[i], "task": name, "id": choices[i].id, "log_likelihoods": by_letter}
                    for i, by_letter in zip(batch, scores, strict=True)
                ]

            limits = Limits(rows, GPU_LETTER_LIMITS.tokens)
            fill(self.answers, keys, [len(c) for c in choices], limits, f"scoring letters of {name}", answer)
        return [results.chosen(material, [self.answers[key] for key in keys], self.settings.seed)]
