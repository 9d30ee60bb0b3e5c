"""How far one model is from another on given completions: KL, top-1 agreement, perplexity.

Legend: N completion positions, V shared vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remend.losses import chunk_rows, divergence
from remend.rollout import Rollout
from remend.scoring import Scorer, pack


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
    reference: Scorer,
    rollouts: Sequence[Rollout],
    *,
    pad_id: int,
    max_rows: int = 8,
    on_rows: Callable[[int], None] | None = None,
) -> list[PromptSums]:
    """Teacher-forced comparison of `student` with `reference` on the same completions.

    Args:
        student, reference: models as body and head over the same shared ids.
        rollouts: prompts with completions; they need not be either model's own.
        pad_id: any valid id.
        max_rows: completions a forward pass.
        on_rows: progress callback.

    Returns:
        One PromptSums a rollout, in order. The divergence is forward KL(reference ‖ student) over the full shared
        vocabulary, in float32.
    """
    device = student.device
    rows, head, reference_head = chunk_rows(student.shared), student.head, reference.head
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt) + len(rollouts[i].completion))
    results: dict[int, PromptSums] = {}
    for start in range(0, len(order), max_rows):
        part = order[start : start + max_rows]
        batch = pack([(rollouts[i].prompt, rollouts[i].completion) for i in part], pad_id=pad_id, device=device)
        ours_ND = batch.gather(student.hidden(batch.tokens_BT))
        theirs_NE = batch.gather(reference.hidden(batch.tokens_BT))
        sums = torch.zeros(len(part), 5, dtype=torch.float64, device=device)
        for at in range(0, ours_ND.shape[0], rows):
            cut = slice(at, at + rows)
            logits_NV, reference_NV = head(ours_ND[cut]).float(), reference_head(theirs_NE[cut]).float()
            target_N1 = batch.targets_N[cut].unsqueeze(1)
            columns = torch.stack(
                [
                    torch.ones_like(target_N1[:, 0], dtype=torch.float64),
                    divergence(logits_NV, reference_NV).double(),
                    (logits_NV.argmax(-1) == reference_NV.argmax(-1)).double(),
                    -torch.log_softmax(logits_NV, -1).gather(1, target_N1)[:, 0].double(),
                    -torch.log_softmax(reference_NV, -1).gather(1, target_N1)[:, 0].double(),
                ],
                dim=1,
            )
            sums.index_add_(0, batch.rows_N[cut], columns)
        for i, row in zip(part, sums.tolist(), strict=True):
            results[i] = PromptSums(rollouts[i].id, int(row[0]), row[1], int(row[2]), row[3], row[4])
        if on_rows:
            on_rows(len(part))
    return [results[i] for i in range(len(rollouts))]


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
