"""`remend diagnose`: how badly a model is damaged, in which layers, and whether it is worth recovering.

remend diagnose --reference smollm2 --student damaged --student runs/recovered --out runs/diagnosis

One teacher-forced pass over the reference's own answers a model; docs/explanation/diagnosis.md explains each measure.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remend.console import warn
from remend.data.examples import data_hash
from remend.data.given import as_files, rows_from_python, write_rows
from remend.diagnosis import layers, severity, subjects
from remend.diagnosis.examination import Examination, examination
from remend.diagnosis.reference import Conditions, ReferenceAnswers, key_of, reference_answers
from remend.diagnosis.settings import DiagnoseSettings
from remend.diagnosis.student import Examined, measure
from remend.files.atomic import JsonObject, new_directory, write_json
from remend.files.cache import cache_root
from remend.files.environment import environment
from remend.files.settings import build, takes
from remend.maths.gap import bootstrap_gap_closed
from remend.models.activations.capture import MASSIVE, usable
from remend.models.find import hash_files
from remend.models.scorer import scorer
from remend.report import write_diagnosis_report

DISCLAIMER = (
    "CKA and its companions compare representations; they can change while behaviour does not, and the other way round "
    "(arXiv 2210.16156). That alignment and recovery go together does not say that one causes the other."
)


@takes(DiagnoseSettings)
def diagnose(
    reference: str | Path, students: str | Path | Sequence[str | Path], out: str | Path, **overrides: Any
) -> JsonObject:
    """Measure students against a healthy reference and write diagnosis.json and report.html.

    Args:
        reference: directory, GGUF file, hub id[@revision] or smollm2.
        students: one or several, named likewise, or a recovery's run directory. Each is compared with the student that
            it was recovered from, where that is among them, else with the first.
        out: a new directory.
        **overrides: further fields of DiagnoseSettings: data, rows, max_new_tokens, sites, layer_map, seed, device,
            cache, trust_remote_code.

    Returns:
        The content of diagnosis.json: the first student's figures at the top, further students under `others`; empty
        beside the main process.

    Raises:
        InputError, FileError: unknown settings, different tokenizers, no layer map, too few rows, empty answers,
            numbers that are not finite (with the layer), an occupied directory.
    """
    several = [students] if isinstance(students, str | os.PathLike) else list(students)
    named = {"reference": reference, "students": several, "out": out}
    with rows_from_python():
        taken = as_files({**overrides, **named}, lambda name: Path(out) / "data" / f"{name}.jsonl")
        return _diagnosis(build(DiagnoseSettings, taken, "settings"))


def _diagnosis(settings: DiagnoseSettings) -> JsonObject:
    began, reference, out = time.monotonic(), settings.reference, Path(settings.out)
    exam = examination(settings)
    teacher = scorer(exam.load(exam.source, reference), exam.shared)
    hashes, asked = hash_files(exam.source), exam.settings
    conditions = Conditions(asked.max_new_tokens, exam.shared, asked.seed, exam.sites, str(exam.dtype)[len("torch.") :])
    root = Path(asked.cache) if asked.cache else cache_root()
    folder = root / "diagnosis" / key_of(hashes, exam.prompts, conditions)
    text = reference_answers(teacher, exam.tokenizer, exam.prompts, conditions, folder, exam.state)
    measured = [one for subject in exam.subjects if (one := measure(exam, subject, teacher, text))]
    if not measured:
        return {}
    first, *others = [_worded({**one.figures, "compared_with": pair}) for one, pair in _paired(exam, measured, text)]
    about = {**_about(exam, text, conditions.dtype, hashes), "seconds": round(time.monotonic() - began, 1)}
    for warning in exam.warnings:
        warn(warning)
    content: JsonObject = without_nan({**first, "others": others, **about})
    with new_directory(out) as target:
        write_rows(out, target)
        write_json(target / "diagnosis.json", content)
        write_diagnosis_report(target, content)
    return content


def _paired(
    exam: Examination, measured: Sequence[Examined], text: ReferenceAnswers
) -> Iterator[tuple[Examined, JsonObject | None]]:
    """Each student with what changed from the damaged one to it, paired on the same rows and prompts."""
    theirs = text.rows["residual"]
    for after, number in zip(measured, subjects.degraded_of(exam.subjects), strict=True):
        if number is None:
            yield after, None
            continue
        before = measured[number]
        keep_S = usable(theirs, before.rows) & usable(theirs, after.rows)
        rows = (theirs[:, keep_S], before.rows[:, keep_S], after.rows[:, keep_S])
        maps = (before.figures["layer_map"], after.figures["layer_map"])
        lost, left = ([kl for _, kl in one.figures["kl_sums"].values()] for one in (before, after))
        yield (
            after,
            {
                "name": before.figures["name"],
                "rows": int(keep_S.sum()),
                "layers": layers.differences(*rows, maps, exam.settings.seed),
                "gap_closed_kl": 1 - sum(left) / sum(lost) if sum(lost) > 0 else None,
                "gap_closed_kl_95": bootstrap_gap_closed(lost, left, seed=exam.settings.seed),
            },
        )


def _worded(figures: JsonObject) -> JsonObject:
    """With sentences and a recommendation."""
    sentences = [sentence.to_json() for sentence in severity.sentences(figures)]
    advice = severity.recommendation(figures, figures["kind"]).to_json()
    return {**figures, "sentences": sentences, "recommendation": advice}


def _about(exam: Examination, text: ReferenceAnswers, dtype: str, hashes: Mapping[str, str]) -> JsonObject:
    return {
        "reference": exam.settings.reference,
        "reference_files": dict(hashes),
        "estimator": {
            "name": "debiased linear CKA (HSIC_1 of Song et al. 2012, arXiv 2010.15327), float64",
            "site": "residual stream after each block, before the final norm",
            "row_policy": "one seeded completion token per sequence, teacher-forced on the reference's greedy "
            f"answers; none whose norm is above {MASSIVE:g} times its layer's median in either model",
            "interval": f"95%, delete-group jackknife over {layers.GROUPS} groups of rows",
            "null": f"largest CKA over all layers in {layers.PERMUTATIONS} shuffles of the rows",
            "neighbours": layers.NEIGHBOURS,
            "dtype": dtype,
        },
        "data": exam.settings.data or "bundled prompts, held-out ones first",
        "data_hash": data_hash(list(exam.examples.values())),
        "sequences": len(text.rollouts),
        "whole_answers": text.whole,
        "max_new_tokens": exam.settings.max_new_tokens,
        "seed": exam.settings.seed,
        "limits": {
            "kl": severity.KL_LIMITS,
            "top1_agreement": severity.AGREEMENT_LIMITS,
            "repetition": severity.REPETITION,
        },
        "disclaimer": DISCLAIMER,
        "warnings": list(exam.warnings),
        "environment": environment(),
    }


def without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
