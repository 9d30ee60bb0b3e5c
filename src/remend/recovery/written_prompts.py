"""Let the reference write the prompts of the streams that have none (data: self), once per run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from remend.console import stage, warn
from remend.data.examples import example_of
from remend.errors import InputError
from remend.files.atomic import json_line, write_json, write_text
from remend.files.reading import read_object
from remend.files.run_directory import MANIFEST
from remend.recovery.begin import Run, require_same_tokens
from remend.recovery.findings import Findings
from remend.recovery.prompts import Prompts, StreamData, kept_apart, with_prompts
from remend.recovery.self_prompts import generate
from remend.recovery.settings import SELF
from remend.recovery.streams import SELF_PROMPTS
from remend.training.teachers import Teacher

WRITTEN = "prompts.jsonl"


def write_missing_prompts(run: Run, reference: Teacher) -> Prompts:
    """The plan's prompts, with those that the reference writes for the streams that have none.

    Raises InputError where too few are left.
    """
    plan = run.plan
    if not any(data.unwritten for data in plan.prompts.streams):
        return plan.prompts
    file = run.directory.path / WRITTEN
    if run.main and not file.is_file():
        _write(run, reference)
    run.wait()
    written, say = [example_of(row, str(file)) for row in run.directory.rows(WRITTEN)], Findings()
    streams: Sequence[StreamData] = [
        with_prompts(data, plan.config, plan.tokenizer, written, list(data.examples.values()), say)
        if data.unwritten
        else data
        for data in plan.prompts.streams
    ]
    streams = kept_apart(streams, say)  # two streams may have split the same prompts otherwise
    if say.problems:
        raise InputError("\n".join(say.problems))
    new = [warning for warning in dict.fromkeys(say.warnings) if warning not in plan.warnings]
    for warning in new:
        warn(warning)
    prompts = Prompts(tuple(streams), tuple(new))
    if run.main:
        path, counts = run.directory.path / MANIFEST, prompts.counts()
        hashes = {s.stream.name: {"tokens": s.token_hash, **s.hashes} for s in streams if s.stream.data == SELF}
        before = read_object(path).get("self_prompts", {})
        for name, own in hashes.items():
            require_same_tokens(before.get(name, {}).get("tokens"), own["tokens"], run.directory)
        noted = {"prompts": counts[prompts.main.stream.name], "streams": counts, "self_prompts": hashes}
        write_json(path, {**read_object(path), **noted})
    return prompts


def _write(run: Run, reference: Teacher) -> None:
    plan, config = run.plan, run.plan.config
    n = config.self_prompts or min(SELF_PROMPTS, max(2, config.steps * plan.rows))
    began = time.perf_counter()
    with reference.policy() as model, stage(f"the reference writes {n} prompts", n) as advance:
        texts, _ = generate(
            model, plan.tokenizer, n=n, seed=config.seed, shared=plan.shared, on_kept=lambda count: advance(count)
        )
    write_text(run.directory.path / WRITTEN, "".join(json_line({"prompt": text}) for text in texts))
    run.directory.note_seconds("prompts", time.perf_counter() - began)
