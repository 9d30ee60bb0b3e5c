"""How far one model is from another on given completions: KL, top-1 agreement, perplexity.

Legend: N completion positions, V shared vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from remend.data.order import batches_by_length
from remend.maths.losses import HeadTarget, Target, agreement
from remend.models.device import chunk_rows
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, pack
from remend.training.teachers.teacher import Teacher


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
    reference: Teacher,
    rollouts: Sequence[Rollout],
    *,
    max_rows: int = 8,
    on_rows: Callable[[int], None] | None = None,
    kept: dict[int, Target] | None = None,
    by_token: dict[int, Tensor] | None = None,
) -> list[PromptSums]:
    """Teacher-forced comparison of `student` with `reference` on the same completions.

    Where a rollout has a prompt of its own for the teacher, the reference reads that.

    Args:
        student: as body and head.
        reference: a teacher over the same shared ids.
        rollouts: prompts with completions; they need not be either model's own.
        max_rows: completions a forward pass.
        on_rows: progress callback.
        kept: what the reference says, by batch, in the CPU's memory: filled by the first call, and read by further
            ones with the same rollouts, max_rows and reference, which must not have moved. None keeps nothing.
        by_token: filled with a float32 [T, 2] for each rollout, by its number: each token's divergence in nats, and how
            many tokens the student puts before it. None keeps nothing.

    Returns:
        One PromptSums a rollout, in order. The divergence is forward KL(reference ‖ student) over the full shared
        vocabulary, in float32; of a reference that says its top k only, over those and a tail.
    """
    device, head = student.device, student.head
    rows = chunk_rows(student.shared, device)
    lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
    results: dict[int, PromptSums] = {}
    for number, places in enumerate(batches_by_length(lengths, rows=max_rows)):
        part = [rollouts[i] for i in places]
        batch = pack([(r.prompt, r.completion) for r in part], device=device)
        ours_ND = student.states(batch)
        if kept is None or number not in kept:
            target = reference.score(part)
            if kept is not None:
                kept[number] = target.to(torch.device("cpu"))
        else:
            target = kept[number]
        target = target.to(device)
        sums = torch.zeros(len(part), 5, dtype=torch.float64, device=device)
        tokens: list[Tensor] = []
        for at in range(0, ours_ND.shape[0], rows):
            cut = slice(at, at + rows)
            logits_NV, tokens_N = head(ours_ND[cut]).float(), batch.targets_N[cut]
            theirs = agreement(target[cut], logits_NV, tokens_N)
            nll_N = -torch.log_softmax(logits_NV, -1).gather(1, tokens_N.unsqueeze(1))[:, 0]
            same_N = logits_NV.argmax(-1) == theirs.first_N
            if by_token is not None:
                chosen_N1 = logits_NV.gather(1, tokens_N.unsqueeze(1))
                tokens.append(torch.stack([theirs.kl_N, (logits_NV > chosen_N1).sum(-1).float()], dim=1))
            columns = [torch.ones_like(nll_N), theirs.kl_N, same_N, nll_N, theirs.nll_N]
            sums.index_add_(0, batch.rows_N[cut], torch.stack([c.double() for c in columns], dim=1))
        for i, row in zip(places, sums.tolist(), strict=True):
            results[i] = PromptSums(rollouts[i].id, int(row[0]), row[1], int(row[2]), row[3], row[4])
        if by_token is not None:
            each_N2 = torch.cat(tokens)
            by_token |= {i: each_N2[batch.rows_N == row].cpu() for row, i in enumerate(places)}
        if on_rows:
            on_rows(len(part))
    return [results[i] for i in range(len(rollouts))]


@torch.no_grad()
def negative_log_likelihoods(
    teacher: Teacher, rollouts: Sequence[Rollout], *, shown: bool, max_rows: int = 8
) -> list[float]:
    """Of each completion under a teacher, nats per token, after the prompt or (`shown`) after the teacher's prompt."""
    means: list[float] = []
    for start in range(0, len(rollouts), max_rows):
        part = [r if shown else replace(r, shown=None) for r in rollouts[start : start + max_rows]]
        target = teacher.score(part)
        assert isinstance(target, HeadTarget)
        device = target.states_NE.device
        batch = pack([(r.prompt, r.completion) for r in part], device=device)
        sums = torch.zeros(len(part), dtype=torch.float64, device=device)
        rows = chunk_rows(target.head.weight_VD.shape[0], device)
        for at in range(0, len(target), rows):
            cut = slice(at, at + rows)
            log_p_NV = torch.log_softmax(target.head(target.states_NE[cut]).float(), -1)
            values_N = -log_p_NV.gather(1, batch.targets_N[cut].unsqueeze(1))[:, 0]
            sums.index_add_(0, batch.rows_N[cut], values_N.double())
        means += [float(total) / len(r.completion) for total, r in zip(sums, part, strict=True)]
    return means


def repetition(completion: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a completion that stood in it before: 0 for fluent text, towards 1 for a loop."""
    grams = [tuple(completion[i : i + n]) for i in range(len(completion) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def pool(sums: Sequence[PromptSums]) -> dict[str, float]:
    """Means over all tokens: kl (nats per token), top1_agreement, perplexity, reference_perplexity.

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
