"""Damaged and hostile inputs of every kind: one message or an answer, in ten seconds and with little memory.

A fork of the campaign takes a batch of one kind, one input after another, and tells on a pipe what it begins and what
came of it. So what hangs, or brings the process down, is known too. Where a checksum covers what was damaged, to go on
without a word falls short as well.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from campaign.mutate import damaged, pick
from campaign.place import CASES, RECIPES, SHARED, STUDY, Place, Tried

BATCH = 40
SECONDS = 10
MEMORY = 3 * 2**30
"""Bytes beyond what the process has at the beginning."""


class Hang(BaseException):
    """An input took longer than SECONDS."""


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind.

    name: for the table.
    files: names in the batch's directory that are damaged, one at a time; a star stands for any.
    make: writes what is read into a new directory.
    read: reads it; whether it was accepted. What it raises is judged.
    covered: whether a checksum covers the files, so that none may be accepted with other content.
    """

    name: str
    files: Sequence[str]
    make: Callable[[Place, Path], None]
    read: Callable[[Path], bool]
    covered: bool = False


def fuzz(place: Place, random: Random) -> Tried:
    """A batch of one kind."""
    kind = random.choice(KINDS)
    seed = random.random()
    where = place.home / "fuzz"
    fell: list[str] = []
    tried: dict[str, int] = {}
    number = 0
    while number < BATCH:
        shutil.rmtree(where, ignore_errors=True)  # also what a process that died had damaged
        where.mkdir()
        kind.make(place, where)
        number = _batch(place, kind, seed, number, tried, fell)
    if (place.home / "HACKED").exists() or (where / "HACKED").exists():
        fell.append(f"{kind.name}: code ran")
    sorts: dict[str, list[str]] = {}
    for text in fell:
        sorts.setdefault(re.sub(r"input \d+|\(.*|[\d'\"].*?(?= at )", "", text, flags=re.DOTALL), []).append(text)
    told = tuple(f"{same[0]}, and {len(same) - 1} more" if len(same) > 1 else same[0] for same in sorts.values())
    return Tried(tried, told, short=len(fell))


def _batch(place: Place, kind: Kind, seed: float, first: int, tried: dict[str, int], fell: list[str]) -> int:
    """Inputs from `first` on in a fork, as long as it lives; the number of the next."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _in_fork(place, kind, seed, first, writing)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)
    os.close(writing)
    at = None
    with os.fdopen(reading, encoding="utf-8") as lines:
        for line in lines:
            number, verdict, about = json.loads(line)
            at = number, about
            if verdict != "begun":
                tried[f"{kind.name}, {verdict}"] = tried.get(f"{kind.name}, {verdict}", 0) + 1
                at = None
            if verdict not in ("begun", "refused", "accepted"):
                fell.append(f"{kind.name}, input {number}: {verdict}: {about}")
    _, status = os.waitpid(pid, 0)
    if at is None:
        code = os.waitstatus_to_exitcode(status)
        if code:
            said = place.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            sys.exit(f"fuzz {kind.name}: the fork ended with {code} between inputs: {said}")
        return BATCH
    tried[f"{kind.name}, died"] = tried.get(f"{kind.name}, died", 0) + 1
    fell.append(f"{kind.name}, input {at[0]}: the process died with {os.waitstatus_to_exitcode(status)}: {at[1]}")
    return at[0] + 1


def _in_fork(place: Place, kind: Kind, seed: float, first: int, pipe: int) -> None:
    where = place.home / "fuzz"
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(place.home)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _hung)

    def tell(number: int, verdict: str, about: str) -> None:
        os.write(pipe, (json.dumps([number, verdict, about]) + "\n").encode())

    files = [path for name in kind.files for path in where.glob(name) if path.is_file() and path.stat().st_size]
    for number in range(first, BATCH):
        random = Random(f"{seed} {number}")
        path = pick(files, random)
        whole = path.read_bytes()
        bad = whole
        while bad == whole:
            bad = damaged(path, random)
        about = f"{path.relative_to(where)} becomes {_shown(whole, bad)}"
        tell(number, "begun", about)
        path.write_bytes(bad)
        verdict, why = _verdict(kind, where)
        path.write_bytes(whole)
        tell(number, verdict, f"{why} ({about})")
    os._exit(0)


def _hung(number: int, frame: FrameType | None) -> None:
    raise Hang


def _verdict(kind: Kind, where: Path) -> tuple[str, str]:
    from remend.errors import RemendError

    signal.alarm(SECONDS)
    try:
        accepted = kind.read(where)
    except RemendError as error:
        return "refused", str(error)[:200]
    except Hang:
        return "hang", f"not done after {SECONDS} s"
    except MemoryError:
        return "memory", "more memory than it may take"
    except BaseException as error:
        steps = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(step.filename).name}:{step.lineno}" for step in steps if "/remend/" in step.filename]
        return "traceback", f"{type(error).__name__}: {str(error)[:300]} at {' > '.join(ours[-4:])}"
    finally:
        signal.alarm(0)
    if accepted and kind.covered:
        return "taken silently", "a checksum covers it"
    return ("accepted" if accepted else "refused"), ""


def _shown(whole: bytes, bad: bytes) -> str:
    """Where two contents begin to differ, and how the second goes on there."""
    at = next((i for i, (x, y) in enumerate(zip(whole, bad, strict=False)) if x != y), min(len(whole), len(bad)))
    return f"{len(bad)} bytes of {len(whole)}, other from {at} on: {bad[max(0, at - 20) : at + 60]!r}"


# the kinds -----------------------------------------------------------------------------------------------------------


def _recipe(**changes: Any) -> dict[str, Any]:
    values = {**SHARED, **RECIPES["grid"], "out": "fuzz/new", **changes}
    if "streams" in changes:
        del values["teacher"], values["data"], values["held_out"]
    return values


def _check(**changes: Any) -> bool:
    import remend

    return not remend.check(**_recipe(**changes)).problems


def _copied(source: str, name: str = "model", *, record: bool = True) -> Callable[[Place, Path], None]:
    """A directory of the place's, and without its hashes where `record` is false."""

    def make(place: Place, where: Path) -> None:
        shutil.copytree(place.home / source, where / name)
        file = where / name / "degradation.json"
        if not record and file.is_file():
            facts = json.loads(file.read_text(encoding="utf-8"))
            facts.pop("files", None)
            facts.pop("sha256", None)
            file.write_text(json.dumps(facts), encoding="utf-8")

    return make


def _yaml(name: str, values: dict[str, Any]) -> Callable[[Place, Path], None]:
    def make(place: Place, where: Path) -> None:
        (where / name).write_text(json.dumps(values), encoding="utf-8")

    return make


def _read_recipe(where: Path) -> bool:
    import remend

    return not remend.check(where / "recipe.yaml").problems


def _read_study(where: Path) -> bool:
    import remend

    remend.study(where / "study.yaml", where / "new", dry_run=True)
    return True


ROWS = [
    {"prompt": "Tell me about rain.", "completion": "It is wet.", "id": "a"},
    *({"prompt": f"Tell me about {i} cats.", "completion": "They sleep.", "id": f"r{i}"} for i in range(20)),
]


def _lines(place: Path, rows: Sequence[dict[str, Any]]) -> None:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _data(suffix: str) -> Kind:
    def make(place: Place, where: Path) -> None:
        file, table = where / f"data{suffix}", pyarrow.Table.from_pylist(ROWS)
        if suffix == ".jsonl":
            _lines(file, ROWS)
        elif suffix == ".json":
            file.write_text(json.dumps(ROWS), encoding="utf-8")
        elif suffix == ".jsonl.gz":
            file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
        elif suffix in (".csv", ".tsv"):
            options = pyarrow.csv.WriteOptions(delimiter="," if suffix == ".csv" else "\t")
            pyarrow.csv.write_csv(table, file, options)
        elif suffix == ".arrow":
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        else:
            pyarrow.parquet.write_table(table, file)

    return Kind(f"prompts, {suffix}", [f"data{suffix}"], make, lambda where: _check(data=str(where / f"data{suffix}")))


def _folder(place: Place, where: Path) -> None:
    """As save_to_disk writes one."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    Dataset.from_list(ROWS).save_to_disk(str(where / "rows"))


def _student(where: Path) -> bool:
    return _check(student=str(where / "model"))


def _gguf(where: Path) -> bool:
    return _check(student=str(next(where.glob("model/*.gguf"))))


def _load(where: Path) -> bool:
    """As far as a recovery goes before training: the weights too."""
    import torch

    from remend.models.find import find_model
    from remend.models.load import load_model, load_tokenizer

    source = find_model(str(where / "model"))
    load_tokenizer(source)
    load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    return True


def _cache(where: Path) -> bool:
    import remend

    stream = {"teacher": str(where / "model"), "policy": "off"}
    return not remend.check(**_recipe(streams={"stored": stream})).problems


def _run(name: str) -> Callable[[Place, Path], None]:
    def make(place: Place, where: Path) -> None:
        shutil.copytree(place.result(CASES[name]), where, dirs_exist_ok=True)

    return make


def _report(where: Path) -> bool:
    from remend.report import report

    report([where / "out"])
    return True


def _correlate(where: Path) -> bool:
    from remend.studies.correlate import correlate

    correlate([where / "out"], permutations=50)
    return True


def _kept_answers(place: Place, where: Path) -> None:
    from remend.evaluation.generation import open_answers

    kept = open_answers(where / "kept.answers.jsonl")
    kept.add([{"key": f"k{i}", "answer": "It is wet.", "tokens": 4, "clipped": False} for i in range(5)])
    kept.add([{"key": f"l{i}", "log_likelihoods": {"A": -1.5, "B": -2.5}} for i in range(5)])


def _answers(where: Path) -> bool:
    from remend.evaluation.generation import open_answers

    open_answers(where / "kept.answers.jsonl")
    return True


def _model_card(place: Place, where: Path) -> None:
    head = "---\nlicense: apache-2.0\nbase_model: [a/b]\ntags:\n- x\nnumber: 1\ndate: 2026-01-02\n---\n# A model\n"
    (where / "README.md").write_text(head, encoding="utf-8")


def _origin(where: Path) -> bool:
    from remend.models.origin import head_of

    return bool(head_of(where / "README.md"))


def _letters(place: Place, where: Path) -> None:
    for name in ("letters.json", "letters-int3.json"):
        shutil.copy(place.home / "given" / name, where / name)


def _compare(where: Path) -> bool:
    from remend.evaluation.compare import compare, markdown

    markdown(compare([where / "letters.json", where / "letters-int3.json"], resamples=50))
    return True


def _export(where: Path) -> bool:
    import remend
    from helpers import strangers
    from remend.exporting import check

    check.ask_stranger, check.DTYPES = strangers.ask, ("auto",)
    try:
        remend.export(where / "model", where / "new", format="dense")
    finally:
        shutil.rmtree(where / "new", ignore_errors=True)
    return True


def _broken_off(place: Place, where: Path) -> None:
    from campaign.flips import INTERRUPTED, READINGS

    assert INTERRUPTED
    place.clear()
    READINGS[0].give(place)
    shutil.copytree(place.disk / "out", where / "kept")


def _resume(where: Path) -> bool:
    """In a copy, since a run that goes on is another one afterwards. Out is where the manifest says that it is."""
    import remend

    run = where.parent / "disk" / "out"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(where / "kept", run)
    with contextlib.redirect_stderr(sys.stderr):
        remend.recover(resume=run)
    return True


MODEL_TEXTS = ["model/config.json", "model/generation_config.json", "model/tokenizer.json"]
MODEL_TEXTS += ["model/tokenizer_config.json", "model/chat_template.jinja"]
RUN_TEXTS = ["out/*.json", "out/*.jsonl", "out/*.yaml"]
KINDS = (
    Kind("recipe", ["recipe.yaml"], _yaml("recipe.yaml", _recipe(lora={"rank": 2})), _read_recipe),
    Kind(
        "recipe with streams",
        ["recipe.yaml"],
        _yaml("recipe.yaml", _recipe(**RECIPES["streams"], loss={"name": "jsd", "beta": 0.5})),
        _read_recipe,
    ),
    Kind("study", ["study.yaml"], _yaml("study.yaml", STUDY), _read_study),
    *map(_data, (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".arrow")),
    Kind("prompts, a folder", ["rows/*"], _folder, lambda where: _check(data=str(where / "rows"))),
    Kind("answers of an evaluation", ["kept.answers.jsonl"], _kept_answers, _answers),
    Kind("model card", ["README.md"], _model_card, _origin),
    Kind("degradation.json", ["model/degradation.json"], _copied("given/int3"), _student),
    Kind("model's texts", MODEL_TEXTS, _copied("reference"), _student),
    Kind("model's texts, loaded", MODEL_TEXTS, _copied("reference"), _load),
    Kind("model.safetensors", ["model/model.safetensors"], _copied("reference"), _load),
    Kind("grid", ["model/**/grid.safetensors"], _copied("given/int3", record=False), _student),
    Kind("degraded model", ["model/*.safetensors", "model/remend/*"], _copied("given/int3"), _export, covered=True),
    Kind("gguf", ["model/*.gguf"], _copied("given/gguf"), _gguf),
    Kind("teacher cache", ["model/teacher-cache.json", "model/prompts.jsonl"], _copied("given/cache"), _cache),
    Kind("teacher cache's scores", ["model/scores-*"], _copied("given/cache"), _cache, covered=True),
    Kind("report", RUN_TEXTS, _run("recover best"), _report),
    Kind("report of a diagnosis", ["out/*.json", "out/*.jsonl"], _run("diagnose"), _report),
    Kind("correlate", RUN_TEXTS, _run("recover best"), _correlate),
    Kind("compare", ["letters.json", "letters-int3.json"], _letters, _compare),
    Kind("damaged run", ["kept/*.json*", "kept/*.yaml", "kept/checkpoints/*/*"], _broken_off, _resume),
)
