"""What a model says, token by token along the reference's answers, against what the reference says there.

Legend: N completion tokens, V shared vocabulary, C columns, T position in the completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remend.files.atomic import JsonObject
from remend.maths.gap import bootstrap_gap_closed
from remend.maths.losses import Head
from remend.models.device import chunk_rows
from remend.models.sampling.rollout import Rollout

COLUMNS = ("kl", "reverse_kl", "agree", "entropy", "reference_entropy", "nll", "reference_nll", "rank")
"""Of a token: forward KL(reference ‖ model) and reverse KL(model ‖ reference); whether both have one first choice; the
entropies of both; the negative log-likelihoods of the reference's token under both, all in nats; and how many tokens
the model puts before the reference's."""

MAX_NATS = 700.0
"""exp of more overflows float64."""


@torch.no_grad()
def token_measures(states_ND: Tensor, head: Head, theirs_ND: Tensor, their_head: Head, targets_N: Tensor) -> Tensor:
    """COLUMNS of every token, float32 [N, C], from the states of the model and of the reference before their heads."""
    chunks = []
    rows = chunk_rows(min(head.weight_VD.shape[0], their_head.weight_VD.shape[0]), states_ND.device)
    for at in range(0, len(states_ND), rows):
        cut = slice(at, at + rows)
        q_NV = torch.log_softmax(head(states_ND[cut]).float(), -1)
        p_NV = torch.log_softmax(their_head(theirs_ND[cut]).float(), -1)
        target_N1 = targets_N[cut].unsqueeze(1)
        chosen_N1 = q_NV.gather(1, target_N1)
        difference_NV, p_exp_NV, q_exp_NV = p_NV - q_NV, p_NV.exp(), q_NV.exp()
        columns = (
            (p_exp_NV * difference_NV).sum(-1),
            -(q_exp_NV * difference_NV).sum(-1),
            (p_NV.argmax(-1) == q_NV.argmax(-1)).float(),
            -(q_exp_NV * q_NV).sum(-1),
            -(p_exp_NV * p_NV).sum(-1),
            -chosen_N1[:, 0],
            -p_NV.gather(1, target_N1)[:, 0],
            (q_NV > chosen_N1).sum(-1).float(),
        )
        chunks.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(chunks) if chunks else torch.zeros(0, len(COLUMNS))


def summarize(tokens: Sequence[Tensor], seed: int) -> JsonObject:
    """Means over all tokens of all sequences.

    Args:
        tokens: for each sequence its COLUMNS [T, C].
        seed: of the bootstrap over sequences.

    Returns:
        kl, its 95% interval kl_95 (sequences are the unit), reverse_kl, top1_agreement, entropy, reference_entropy,
        perplexity and reference_perplexity of the reference's answers, median and mean rank, and the number of tokens.
    """
    every = torch.cat(list(tokens)).double()
    means = dict(zip(COLUMNS, every.mean(0).tolist(), strict=True))
    return {
        "kl": means["kl"],
        "kl_95": mean_interval(tokens, seed),
        "reverse_kl": means["reverse_kl"],
        "top1_agreement": means["agree"],
        "entropy": means["entropy"],
        "reference_entropy": means["reference_entropy"],
        "perplexity": math.exp(min(MAX_NATS, means["nll"])),
        "reference_perplexity": math.exp(min(MAX_NATS, means["reference_nll"])),
        "median_rank": float(every[:, COLUMNS.index("rank")].median()),
        "mean_rank": means["rank"],
        "tokens": len(every),
    }


def mean_interval(tokens: Sequence[Tensor], seed: int) -> list[float] | None:
    """95% interval of the mean KL a token, resampling sequences; None with fewer than 2."""
    sums, counts = [float(t[:, 0].double().sum()) for t in tokens], [float(len(t)) for t in tokens]
    ends = bootstrap_gap_closed(counts, sums, seed=seed)  # of one minus a ratio of sums, whatever the sums are of
    return [1.0 - ends[1], 1.0 - ends[0]] if ends else None


def profile(tokens: Sequence[Tensor]) -> list[dict[str, float]]:
    """By position in the completion: KL, agreement, and over how many sequences."""
    positions = []
    for at in range(max(map(len, tokens))):
        there = torch.stack([t[at] for t in tokens if len(t) > at]).double().mean(0)
        count = sum(len(t) > at for t in tokens)
        positions.append({"position": at, "kl": float(there[0]), "top1_agreement": float(there[2]), "sequences": count})
    return positions


def coloured(tokens: Tensor, pieces: Sequence[str]) -> list[JsonObject]:
    """For the page: each piece of an answer with its KL and whether the model would have chosen it too."""
    return [
        {"text": piece, "kl": round(float(row[0]), 3), "rank": int(row[-1])}
        for piece, row in zip(pieces, tokens, strict=True)
    ]


def own_answers(rollouts: Sequence[Rollout], repetitions: Sequence[float]) -> Mapping[str, float]:
    """Of a model's own samples: mean share of repeated 4-grams, and the share that met the length limit."""
    count = max(1, len(rollouts))
    return {
        "repetition": sum(repetitions) / count,
        "clipped_share": sum(r.clipped for r in rollouts) / count,
        "answers": len(rollouts),
    }
