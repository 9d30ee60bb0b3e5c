"""How far one model is from another on given completions: KL, top-1 agreement, perplexity.

Legend: N completion positions, V shared vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remend.maths.losses import divergence
from remend.models.device import chunk_rows
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Packed, Scorer, pack
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import Teacher


@dataclass(frozen=True)
class PromptSums:
    """One completion's sums over its tokens: forward KL to the reference (nats), equal top-1 choices, and the negative
    log-likelihood (nats) of the tokens under the student and under the reference."""

    id: str
    tokens: int
    kl: float
    agree: int
    nll: float
    reference_nll: float


@torch.no_grad()
def compare(
    student: Scorer,
    reference: Teacher | TeacherCache,
    rollouts: Sequence[Rollout],
    *,
    max_rows: int = 8,
    on_rows: Callable[[int], None] | None = None,
    kept: dict[int, Tensor] | None = None,
) -> list[PromptSums]:
    """Teacher-forced comparison of `student` with `reference` on the same completions.

    Where a rollout has a prompt of its own for the teacher, the reference reads that.

    Args:
        student, reference: models as body and head over the same shared ids.
        rollouts: prompts with completions; they need not be either model's own.
        max_rows: completions a forward pass.
        on_rows: progress callback.
        kept: the reference's hidden states at completion positions, by batch: filled by the first call, and read by
            further ones with the same rollouts, max_rows and reference, which must not have moved. None keeps nothing.

    Returns:
        One PromptSums a rollout, in order. The divergence is forward KL(reference ‖ student) over the full shared
        vocabulary, in float32.
    """
    device, head = student.device, student.head
    rows = chunk_rows(student.shared, device)
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt) + len(rollouts[i].completion))
    results: dict[int, PromptSums] = {}
    for start in range(0, len(order), max_rows):
        part = [rollouts[i] for i in order[start : start + max_rows]]
        batch = pack([(r.prompt, r.completion) for r in part], device=device)
        ours_ND = student.states(batch)
        against = (
            _cached(reference, part, batch)
            if isinstance(reference, TeacherCache)
            else _live(reference, part, batch, start, {} if kept is None else kept)
        )
        sums = torch.zeros(len(part), 5, dtype=torch.float64, device=device)
        for at in range(0, ours_ND.shape[0], rows):
            cut = slice(at, at + rows)
            logits_NV = head(ours_ND[cut]).float()
            kl_N, top_N, reference_nll_N = against(cut, logits_NV)
            nll_N = -torch.log_softmax(logits_NV, -1).gather(1, batch.targets_N[cut].unsqueeze(1))[:, 0]
            columns = [torch.ones_like(kl_N), kl_N, logits_NV.argmax(-1) == top_N, nll_N, reference_nll_N]
            sums.index_add_(0, batch.rows_N[cut], torch.stack([c.double() for c in columns], dim=1))
        for i, row in zip(order[start : start + max_rows], sums.tolist(), strict=True):
            results[i] = PromptSums(rollouts[i].id, int(row[0]), row[1], int(row[2]), row[3], row[4])
        if on_rows:
            on_rows(len(part))
    return [results[i] for i in range(len(rollouts))]


Against = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Positions and the student's logits [N, V] to KL, the reference's first choice and its NLL of the token, each [N]."""


def _live(reference: Teacher, rollouts: Sequence[Rollout], batch: Packed, at: int, kept: dict[int, Tensor]) -> Against:
    if at not in kept:
        theirs = batch
        if any(r.shown is not None for r in rollouts):
            pairs = [(r.shown or r.prompt, r.completion) for r in rollouts]
            theirs = pack(pairs, device=batch.tokens_BT.device)
        kept[at] = reference.states(theirs).cpu()
    states_NE, head = kept[at].to(batch.tokens_BT.device), reference.head

    def against(cut: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reference_NV = head(states_NE[cut]).float()
        target_N1 = batch.targets_N[cut].unsqueeze(1)
        nll_N = -torch.log_softmax(reference_NV, -1).gather(1, target_N1)[:, 0]
        return divergence(logits_NV, reference_NV), reference_NV.argmax(-1), nll_N

    return against


def _cached(reference: TeacherCache, rollouts: Sequence[Rollout], batch: Packed) -> Against:
    """Top k with tail: the KL is a lower bound, and a token in the tail counts with the whole tail's mass."""
    target = reference.targets(rollouts).to(batch.tokens_BT.device)

    def against(cut: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = target[cut]
        hit_NK = part.ids_NK == batch.targets_N[cut].unsqueeze(1)
        known_N = part.log_p_NK.masked_fill(~hit_NK, -torch.inf).amax(1)
        nll_N = -torch.where(hit_NK.any(1), known_N, part.log_tail_N)
        first_N = part.ids_NK.gather(1, part.log_p_NK.argmax(1, keepdim=True))[:, 0]
        return divergence(logits_NV, part), first_N, nll_N

    return against


@torch.no_grad()
def negative_log_likelihoods(
    model: Teacher, rollouts: Sequence[Rollout], *, device: torch.device, shown: bool, max_rows: int = 8
) -> list[float]:
    """Of each completion, nats a token, after the prompt or (`shown`) after the teacher's prompt."""
    found = []
    for start in range(0, len(rollouts), max_rows):
        part = rollouts[start : start + max_rows]
        pairs = [((r.shown or r.prompt) if shown else r.prompt, r.completion) for r in part]
        batch = pack(pairs, device=device)
        states_ND, head = model.states(batch), model.head
        sums = torch.zeros(len(part), dtype=torch.float64, device=device)
        rows = chunk_rows(head.weight_VD.shape[0], states_ND.device)
        for at in range(0, len(states_ND), rows):
            cut = slice(at, at + rows)
            log_p_NV = torch.log_softmax(head(states_ND[cut]).float(), -1)
            values_N = -log_p_NV.gather(1, batch.targets_N[cut].unsqueeze(1))[:, 0]
            sums.index_add_(0, batch.rows_N[cut], values_N.double())
        found += [float(total) / len(r.completion) for total, r in zip(sums, part, strict=True)]
    return found


def repetition(completion: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a completion that stood in it before: 0 for fluent text, towards 1 for a loop."""
    grams = [tuple(completion[i : i + n]) for i in range(len(completion) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def pool(sums: Sequence[PromptSums]) -> dict[str, Any]:
    """Means over all tokens: kl (nats a token), top1_agreement, perplexity, reference_perplexity.

    A perplexity beyond float64 (a mean above 700 nats) is given as that of 700.
    """
    tokens = sum(s.tokens for s in sums)
    return {
        "kl": sum(s.kl for s in sums) / tokens,
        "top1_agreement": sum(s.agree for s in sums) / tokens,
        "perplexity": math.exp(min(700.0, sum(s.nll for s in sums) / tokens)),
        "reference_perplexity": math.exp(min(700.0, sum(s.reference_nll for s in sums) / tokens)),
        "tokens": tokens,
    }
