"""One student measured: token by token against the reference's answers, layer by layer against its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remend.console import stage
from remend.data.templates import display
from remend.diagnosis import behaviour, layers, severity, subjects
from remend.diagnosis.examination import Examination
from remend.diagnosis.reference import ReferenceAnswers, gathered
from remend.diagnosis.subjects import Subject
from remend.files.atomic import JsonObject
from remend.models.activations.capture import Batch, as_layers, capture, usable
from remend.models.protocols import CausalLM
from remend.models.sampling.answers import answer, as_text, pieces
from remend.models.scorer import Scorer, scorer
from remend.training.measure import repetition

ANSWERED, SHOWN = 16, 4
"""Prompts that a student answers itself, and how many of these the page shows."""


@dataclass(frozen=True)
class Examined:
    """A student's figures, and the rows [L, S, D] of its residual stream."""

    figures: JsonObject
    rows: Tensor


def measure(exam: Examination, subject: Subject, reference: Scorer, text: ReferenceAnswers) -> Examined | None:
    """One teacher-forced pass over the reference's answers, and what follows from it; None beside the main process."""
    student = exam.load(subject.source, subject.name)
    ours = scorer(student, exam.shared)
    placed = subjects.layer_map(subject, student, reference.model, exam.settings.layer_map)
    by_sequence: dict[int, Tensor] = {}

    def consume(batch: Batch, states_ND: Tensor) -> None:
        keep_N, whole = batch.of_first(text.whole), [i for i in batch.sequences if i < text.whole]
        if not whole:
            return
        theirs_ND, targets_N = text.states(batch.number).to(states_ND), batch.packed.targets_N[keep_N]
        columns_NC = behaviour.token_measures(states_ND[keep_N], ours.head, theirs_ND, reference.head, targets_N)
        sizes = [len(text.rollouts[i].completion) for i in whole]
        by_sequence.update(zip(whole, torch.split(columns_NC, sizes), strict=True))

    count = len(text.rollouts)
    with stage(f"measuring {subject.name}", count) as advance:
        captured = capture(
            ours,
            subject.spec,
            text.rollouts,
            text.picks,
            sites=exam.sites,
            consume=consume,
            turn=(exam.state.process_index, exam.state.num_processes),
            on_rows=advance,
        )
    rows = {site: as_layers(gathered(mine), count) for site, mine in captured.items()}
    tokens = gathered(by_sequence)
    if not exam.state.is_main_process:
        return None
    figures = _figures(exam, subject, text, rows, [tokens[i] for i in range(text.whole)], placed)
    figures |= {"kind": subjects.kind_of(subject, student, reference.model), **_answers(exam, student, subject, text)}
    word = severity.severity(figures["behaviour"], figures["own_answers"], figures["reference_answers"])
    return Examined({**figures, "severity": word}, rows["residual"])


def _figures(
    exam: Examination,
    subject: Subject,
    text: ReferenceAnswers,
    rows: Mapping[str, Tensor],
    tokens: Sequence[Tensor],
    placed: list[int],
) -> JsonObject:
    """rows: the student's by site, [L, S, D]; tokens: the COLUMNS of each whole answer; placed: the layer map."""
    theirs, ours = text.rows["residual"], rows["residual"]
    keep_S = usable(theirs, ours)
    picks_S = torch.tensor(text.picks)[keep_S]
    seed = exam.settings.seed
    with stage(f"comparing the layers of {subject.name}"):
        measures = layers.measure(theirs[:, keep_S], ours[:, keep_S], placed, anchors=text.anchors, seed=seed)
        grid = layers.heatmap(theirs[:, keep_S], ours[:, keep_S])
        stretches = layers.along(layers.Rows(theirs[:, keep_S], picks_S), layers.Rows(ours[:, keep_S], picks_S), placed)
        others = {
            site: layers.measure(text.rows[site][:, keep_S], rows[site][:, keep_S], placed, anchors={}, seed=seed)
            for site in exam.sites[1:]
        }
    shown = zip(text.rollouts[:SHOWN], tokens[:SHOWN], strict=True)
    return {
        "name": subject.name,
        "student": subject.spec,
        "layer_map": placed,
        **measures,
        "rows": int(keep_S.sum()),
        "rows_left_out": len(keep_S) - int(keep_S.sum()),
        "ranking": severity.ranked(measures["layers"]),
        "entry": severity.entry(measures["layers"]),
        "sites": others,
        "grid": grid,
        "positions": behaviour.profile(tokens),
        "stretches": stretches,
        "norms": {"student": layers.norm_table(ours), "reference": layers.norm_table(theirs)},
        "behaviour": behaviour.summarize(tokens, seed),
        "token_kl": [behaviour.coloured(t, pieces(exam.tokenizer, r.completion)) for r, t in shown],
        "kl_sums": {
            r.id: [len(t), float(t[:, 0].double().sum())]
            for r, t in zip(text.rollouts[: text.whole], tokens, strict=True)
        },
    }


def _answers(exam: Examination, student: CausalLM, subject: Subject, text: ReferenceAnswers) -> JsonObject:
    """The student's greedy answers to the first prompts, beside the reference's."""
    theirs = text.rollouts[:ANSWERED]
    by_id = {p.id: p for p in exam.prompts}
    ours = answer(
        student,
        exam.tokenizer,
        [by_id[r.id] for r in theirs],
        f"{subject.name} answers",
        max_new_tokens=exam.settings.max_new_tokens,
        shared=exam.shared,
    )
    summed = [behaviour.own_answers(rs, [repetition(r.completion) for r in rs]) for rs in (ours, theirs)]
    samples = [
        {
            "id": r.id,
            "prompt": display(exam.examples[r.id].prompt),
            "reference": as_text(exam.tokenizer, r),
            "student": as_text(exam.tokenizer, o),
        }
        for r, o in zip(theirs[:SHOWN], ours[:SHOWN], strict=True)
    ]
    return {"own_answers": summed[0], "reference_answers": summed[1], "samples": samples}
