"""`remend diagnose`: how badly a model is damaged, in which layers, and whether it is worth recovering.

remend diagnose --reference smollm2 --student damaged --student runs/recovered --out runs/diagnosis

One teacher-forced pass over the reference's own answers a model; docs/diagnose.md explains each measure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from remend.console import console, stage
from remend.data.examples import Example, bundled, choose, data_hash, load_examples
from remend.data.templates import Encoded, display, dropped_text, encode_within
from remend.diagnosis import behaviour, layers, severity, subjects
from remend.diagnosis.reference import Material, Settings, cache_root, gathered, key_of, material
from remend.diagnosis.subjects import Subject
from remend.errors import InputError
from remend.files.atomic import write_json
from remend.files.environment import environment
from remend.files.run_directory import occupied
from remend.maths.gap import bootstrap_gap_closed
from remend.models.activations.capture import LEAST_ROWS, MASSIVE, SITES, Batch, as_layers, capture, usable
from remend.models.device import choose_device, choose_dtype
from remend.models.find import ModelSource, find_model, hash_files
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.answers import answer, spoken
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, scorer
from remend.report import write_diagnosis_report
from remend.training.measure import repetition

ROWS = {"cuda": 1024}
CPU_ROWS = 256
ANSWERED, SHOWN = 16, 4
"""Prompts that a student answers itself, and how many of these the page shows."""

PROMPT_TOKENS = 1024

DISCLAIMER = (
    "CKA and its companions compare representations; they can change while behaviour does not, and the other way round "
    "(arXiv 2210.16156). That alignment and recovery go together does not say that one causes the other."
)


@dataclass(frozen=True)
class Plan:
    """The settings; see `diagnose`."""

    reference: str
    students: Sequence[str]
    data: str | None
    rows: int | None
    max_new_tokens: int
    sites: tuple[str, ...]
    layer_map: Sequence[int] | None
    seed: int
    device: str
    cache: str | None
    trust_remote_code: bool


def diagnose(
    reference: str,
    students: Sequence[str],
    out: str | Path,
    *,
    data: str | None = None,
    rows: int | None = None,
    max_new_tokens: int = 32,
    sites: Sequence[str] = ("residual",),
    layer_map: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "auto",
    cache: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure students against a healthy reference and write diagnosis.json and report.html.

    Args:
        reference: directory, GGUF file, hub id[@revision] or smollm2.
        students: named likewise, or a recovery's run directory. Each is compared with the student that it was
            recovered from, where that is among them, else with the first.
        out: a new directory.
        data: prompts; by default bundled ones, the held-out ones first.
        rows: how many prompts, each giving one row a layer; by default 256 on a CPU and 1,024 on a GPU.
        max_new_tokens: of the reference's answers.
        sites: of residual (always), attention, mlp.
        layer_map: for students with fewer layers, the reference's number of each; by default recorded or found.
        seed: of the rows' positions, resampling groups, permutations and random weights.
        device: auto, cpu, cuda, cuda:N, mps. Float32, on a GPU bfloat16 where that is fast.
        cache: where the reference's answers, rows and anchors are kept; by default REMEND_CACHE or the user's cache.
        trust_remote_code: let a model directory run its own Python.

    Returns:
        The content of diagnosis.json: the first student's figures at the top, further students under `others`.

    Raises:
        InputError, FileError: different tokenizers, no layer map, too few rows, empty answers, numbers that are not
            finite (with the layer), an occupied directory.
    """
    wanted = tuple(dict.fromkeys(("residual", *sites)))
    plan = Plan(
        reference, students, data, rows, max_new_tokens, wanted, layer_map, seed, device, cache, trust_remote_code
    )
    return _Diagnosis(plan, Path(out)).run()


class _Diagnosis:
    """One diagnosis: holds what its stages share."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out, self.began = plan, out, time.monotonic()
        self.warnings: list[str] = []
        _check(plan, out)
        self.device = choose_device(plan.device)
        self.state = PartialState(cpu=self.device.type == "cpu")
        self.dtype = choose_dtype("auto", self.device) if self.device.type == "cuda" else torch.float32
        self.source = find_model(plan.reference)
        self.subjects = subjects.find(plan.students)
        self.tokenizer = load_tokenizer(self.source, trust_remote_code=plan.trust_remote_code)
        found = subjects.compare(self.source, self.subjects, self.tokenizer, trust=plan.trust_remote_code)
        self.shared, self.warnings = found.shared, self.warnings + found.warnings
        self.examples, self.prompts = self._prompts()

    def _prompts(self) -> tuple[dict[str, Example], list[Encoded]]:
        wanted = self.plan.rows or ROWS.get(self.device.type, CPU_ROWS)
        everything = _bundled() if self.plan.data is None else load_examples(self.plan.data)
        chosen = everything[:wanted] if self.plan.data is None else choose(everything, wanted, self.plan.seed)
        kept, dropped = encode_within(self.tokenizer, chosen, PROMPT_TOKENS)
        if dropped:
            self.warnings.append(dropped_text(dropped, len(chosen), "prompts", str(PROMPT_TOKENS)))
        if len(kept) < LEAST_ROWS:
            raise InputError(
                f"{len(kept)} prompts are there, and {LEAST_ROWS} is the least that the debiased CKA needs; "
                "give more with --data"
            )
        if len(kept) < layers.FEW_ROWS:
            self.warnings.append(
                f"{len(kept)} rows: below {layers.FEW_ROWS} the estimates are noisy, see their intervals"
            )
        return {e.id: e for e in chosen}, kept

    def run(self) -> dict[str, Any]:
        """All stages in order."""
        teacher = self._load(self.source, self.plan.reference)
        parts, hashes = scorer(teacher, self.shared), hash_files(self.source)
        dtype = str(self.dtype).removeprefix("torch.")
        settings = Settings(self.plan.max_new_tokens, self.shared, self.plan.seed, self.plan.sites, dtype)
        root = Path(self.plan.cache) if self.plan.cache else cache_root()
        folder = root / "diagnosis" / key_of(hashes, self.prompts, settings)
        text = material(parts, self.tokenizer, self.prompts, settings, folder, self.state)
        students, captured = [], []
        for subject in self.subjects:
            found, rows = self._student(subject, parts, text)
            students.append(found)
            captured.append(rows)
        if not self.state.is_main_process:
            return {}
        self._pairs(students, captured, text)
        for found in students:
            found["sentences"] = [s.to_json() for s in severity.sentences(found)]
            found["recommendation"] = severity.recommendation(found, found["kind"]).to_json()
        result = {**students[0], "others": students[1:], **self._about(hashes, text, dtype)}
        for warning in self.warnings:
            console.print(f"[yellow]warning[/]: {warning}", soft_wrap=True)
        return self._write(result)

    def _load(self, source: ModelSource, name: str) -> Any:
        with stage(f"loading {name}"):
            return load_model(
                source, dtype=self.dtype, device=self.device, trust_remote_code=self.plan.trust_remote_code
            ).requires_grad_(False)

    def _student(self, subject: Subject, parts: Scorer, text: Material) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One student's figures, and its rows; both empty beside the main process."""
        student = self._load(subject.source, subject.name)
        ours = scorer(student, self.shared)
        placed = subjects.layer_map(subject, student, parts.model, self.plan.layer_map)
        tokens: dict[int, Tensor] = {}

        def consume(batch: Batch, states_ND: Tensor) -> None:
            keep_N, whole = batch.of_first(text.whole), [i for i in batch.sequences if i < text.whole]
            if not whole:
                return
            theirs_ND, targets_N = text.states(batch.number).to(states_ND), batch.packed.targets_N[keep_N]
            found = behaviour.token_measures(states_ND[keep_N], ours.head, theirs_ND, parts.head, targets_N)
            sizes = [len(text.rollouts[i].completion) for i in whole]
            tokens.update(zip(whole, torch.split(found, sizes), strict=True))

        with stage(f"measuring {subject.name}", len(text.rollouts)) as advance:
            turn = (self.state.process_index, self.state.num_processes)
            options: dict[str, Any] = {"sites": self.plan.sites, "consume": consume, "turn": turn, "on_rows": advance}
            mine = capture(ours, subject.spec, text.rollouts, text.picks, **options)
        count = len(text.rollouts)
        rows = {site: as_layers(gathered(found), count) for site, found in mine.items()}
        by_sequence = gathered(tokens)
        if not self.state.is_main_process:
            return {}, {}
        kind = subjects.kind_of(subject, student, parts.model)
        own = self._own(student, subject, text)
        figures = self._figures(subject, text, rows, [by_sequence[i] for i in range(text.whole)], placed)
        figures |= {"kind": kind, **own}
        word = severity.severity(figures["behaviour"], figures["own_answers"], figures["reference_answers"])
        return {**figures, "severity": word}, rows

    def _own(self, student: Any, subject: Subject, text: Material) -> dict[str, Any]:
        """The student's greedy answers to the first prompts, beside the reference's."""
        theirs = text.rollouts[:ANSWERED]
        by_id = {p.id: p for p in self.prompts}
        ours = answer(
            student,
            self.tokenizer,
            [by_id[r.id] for r in theirs],
            f"{subject.name} answers",
            max_new_tokens=self.plan.max_new_tokens,
            shared=self.shared,
        )
        summed = [behaviour.own_answers(rs, [repetition(r.completion) for r in rs]) for rs in (ours, theirs)]
        samples = [
            {
                "id": r.id,
                "prompt": display(self.examples[r.id].prompt),
                "reference": spoken(self.tokenizer, r),
                "student": spoken(self.tokenizer, o),
            }
            for r, o in zip(theirs[:SHOWN], ours[:SHOWN], strict=True)
        ]
        return {"own_answers": summed[0], "reference_answers": summed[1], "samples": samples}

    def _figures(
        self, subject: Subject, text: Material, rows: Mapping[str, Tensor], tokens: list[Tensor], placed: list[int]
    ) -> dict[str, Any]:
        theirs, ours = text.rows["residual"], rows["residual"]
        keep_S = usable(theirs, ours)
        picks_S = torch.tensor(text.picks)
        seed = self.plan.seed
        with stage(f"comparing the layers of {subject.name}"):
            found = layers.measure(theirs[:, keep_S], ours[:, keep_S], placed, anchors=text.anchors, seed=seed)
            grid = layers.heatmap(theirs[:, keep_S], ours[:, keep_S])
            parts = layers.along(
                layers.Rows(theirs[:, keep_S], picks_S[keep_S]), layers.Rows(ours[:, keep_S], picks_S[keep_S]), placed
            )
            others = {
                site: layers.measure(text.rows[site][:, keep_S], rows[site][:, keep_S], placed, anchors={}, seed=seed)
                for site in self.plan.sites
                if site != "residual"
            }
        return {
            "name": subject.name,
            "student": subject.spec,
            "layer_map": placed,
            **found,
            "rows": int(keep_S.sum()),
            "rows_left_out": len(keep_S) - int(keep_S.sum()),
            "ranking": severity.ranked(found["layers"]),
            "entry": severity.entry(found["layers"]),
            "sites": others,
            "grid": grid,
            "positions": behaviour.profile(tokens),
            "stretches": parts,
            "norms": {"student": layers.norm_table(ours), "reference": layers.norm_table(theirs)},
            "behaviour": behaviour.summarize(tokens, seed),
            "token_kl": [self._coloured(r, t) for r, t in zip(text.rollouts[:SHOWN], tokens[:SHOWN], strict=True)],
            "kl_sums": {
                r.id: [len(t), float(t[:, 0].double().sum())]
                for r, t in zip(text.rollouts[: text.whole], tokens, strict=True)
            },
        }

    def _coloured(self, rollout: Rollout, tokens: Tensor) -> list[dict[str, Any]]:
        return behaviour.coloured(tokens, pieces(self.tokenizer, rollout.completion))

    def _pairs(self, students: list[dict[str, Any]], captured: list[dict[str, Tensor]], text: Material) -> None:
        """What changed from the damaged to the recovered, paired on the same rows and prompts."""
        theirs = text.rows["residual"]
        for i, before in enumerate(subjects.degraded_of(self.subjects)):
            if before is None:
                students[i]["compared_with"] = None
                continue
            a, b = captured[before]["residual"], captured[i]["residual"]
            keep_S = usable(theirs, a) & usable(theirs, b)
            maps = (students[before]["layer_map"], students[i]["layer_map"])
            sums = [[kl for _, kl in students[k]["kl_sums"].values()] for k in (before, i)]
            students[i]["compared_with"] = {
                "name": students[before]["name"],
                "rows": int(keep_S.sum()),
                "layers": layers.differences(theirs[:, keep_S], a[:, keep_S], b[:, keep_S], maps, self.plan.seed),
                "gap_closed_kl": 1 - sum(sums[1]) / sum(sums[0]) if sum(sums[0]) > 0 else None,
                "gap_closed_kl_95": bootstrap_gap_closed(*sums, seed=self.plan.seed),
            }

    def _about(self, hashes: Mapping[str, str], text: Material, dtype: str) -> dict[str, Any]:
        return {
            "reference": self.plan.reference,
            "reference_files": dict(hashes),
            "estimator": {
                "name": "debiased linear CKA (HSIC_1 of Song et al. 2012, arXiv 2010.15327), float64",
                "site": "residual stream after each block, before the final norm",
                "row_policy": "one seeded completion token a sequence, teacher-forced on the reference's greedy "
                f"answers; none whose norm is above {MASSIVE:g} times its layer's median in either model",
                "interval": f"95%, delete-group jackknife over {layers.GROUPS} groups of rows",
                "null": f"largest CKA over all layers in {layers.PERMUTATIONS} shuffles of the rows",
                "neighbours": layers.NEIGHBOURS,
                "dtype": dtype,
            },
            "data": self.plan.data or "bundled prompts, held-out ones first",
            "data_hash": data_hash(list(self.examples.values())),
            "sequences": len(text.rollouts),
            "whole_answers": text.whole,
            "max_new_tokens": self.plan.max_new_tokens,
            "seed": self.plan.seed,
            "limits": {"kl": severity.KL_LIMITS, "top1_agreement": severity.AGREEMENT_LIMITS},
            "disclaimer": DISCLAIMER,
            "warnings": self.warnings,
            "environment": environment(),
            "seconds": round(time.monotonic() - self.began, 1),
        }

    def _write(self, result: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = without_nan(result)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "diagnosis.json", plain)
        write_diagnosis_report(self.out, plain)
        return plain


def pieces(tokenizer: Any, completion: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens stands with its last one."""
    found, before = [], ""
    for end in range(1, len(completion) + 1):
        text = tokenizer.decode(completion[:end]).rstrip("\ufffd")
        found.append(text[len(before) :])
        before = text
    return found


def without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def _bundled() -> list[Example]:
    """Prompts that no recovery trains on first."""
    return bundled("held_out") + bundled("train")


def _check(plan: Plan, out: Path) -> None:
    problem = occupied(out)
    if problem or (out.is_dir() and any(out.iterdir())):
        raise InputError(problem or f"out {out} is not empty; name a new directory")
    if plan.rows is not None and plan.rows < LEAST_ROWS:
        raise InputError(f"rows is {plan.rows}; the debiased CKA needs {LEAST_ROWS} or more")
    if plan.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {plan.max_new_tokens}; allowed is 1 or more")
    unknown = [site for site in plan.sites if site not in SITES]
    if unknown:
        raise InputError(f"unknown site {unknown[0]}; known: {', '.join(SITES)}")
