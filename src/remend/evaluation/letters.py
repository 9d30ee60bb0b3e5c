"""Score multiple choice by the log-likelihood of the answer's letter, without generating.

What is scored: after the prompt through the chat template, up to and with the assistant's header, comes LEAD, the
opening tag with which both science tasks ask for the answer, and then each letter. A letter's score is log p of its
tokens, in nats; for usual tokenizers that is one token:

    …<|im_start|>assistant\\n  <answer>\\n  B
    prompt                     LEAD        letter

The letter follows the tag and not the header, since that is where the prompts ask for it; a bare letter there would be
out of the form that training teaches.

Legend: N positions, D width, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remend.errors import InputError
from remend.losses import Head, chunk_rows
from remend.scoring import Scorer, pack

LEAD = "<answer>\n"
GRADER = "letter log-likelihood"
SHUFFLES = 10_000


@dataclass(frozen=True)
class Choice:
    """A row's letters as token ids: all stand after `context`, which is the prompt with LEAD."""

    id: str
    context: tuple[int, ...]
    endings: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.context) + max(map(len, self.endings.values()))


def choice(tokenizer: Any, name: str, prompt: Sequence[int], letters: Sequence[str], lead: str = LEAD) -> Choice:
    """Put the letters after a prompt. `lead` and letter are tokenized together, apart from the prompt, as answers are.

    Raises InputError when the tokenizer writes two letters alike.
    """
    ids = [tuple(tokenizer(lead + letter, add_special_tokens=False)["input_ids"]) for letter in letters]
    same = 0
    while all(len(i) > same for i in ids) and len({i[: same + 1] for i in ids}) == 1:
        same += 1
    endings = {letter: i[same:] for letter, i in zip(letters, ids, strict=True)}
    if len(set(endings.values())) < len(letters) or not all(endings.values()):
        raise InputError(
            f"row {name}: the tokenizer does not tell the letters {', '.join(letters)} apart after {lead!r}; "
            "score this model by generation (how: generate)"
        )
    return Choice(name, (*prompt, *ids[0][:same]), endings)


@torch.no_grad()
def log_likelihoods(parts: Scorer, choices: Sequence[Choice], *, pad_id: int) -> list[dict[str, float]]:
    """log p(letter | context) in nats of every letter of every choice, in one forward pass.

    Normalised over the full vocabulary. Letters' logits are taken in float32 from the hidden states, so that bfloat16
    does not make them equal.

    Raises InputError when they are not finite.
    """
    # letters that differ in their last token alone need one sequence between them
    stems = [(c, stem) for c in choices for stem in dict.fromkeys(e[:-1] for e in c.endings.values())]
    pairs = [(c.context, (*stem, c.context[-1])) for c, stem in stems]
    batch = pack(pairs, pad_id=pad_id, device=parts.device)
    states_ND, head = batch.gather(parts.hidden(batch.tokens_BT)), parts.head
    rows = chunk_rows(parts.shared, parts.device)
    total_N = torch.cat(
        [torch.logsumexp(head(states_ND[at : at + rows]).float(), -1) for at in range(0, len(states_ND), rows)]
    )
    used_U = sorted({token for c in choices for e in c.endings.values() for token in e})
    log_p_NU = _only(head, used_U)(states_ND.float()) - total_N.unsqueeze(1)
    if not log_p_NU.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged beyond use")
    column, values = {token: u for u, token in enumerate(used_U)}, log_p_NU.double().tolist()
    found: dict[str, dict[str, float]] = {c.id: {} for c in choices}
    first = 0
    for c, stem in stems:
        for letter, ending in c.endings.items():
            if ending[:-1] == stem:
                found[c.id][letter] = sum(values[first + t][column[token]] for t, token in enumerate(ending))
        first += len(stem) + 1
    return [{letter: found[c.id][letter] for letter in c.endings} for c in choices]


def _only(head: Head, tokens: Sequence[int]) -> Head:
    """The head of some tokens, in float32."""
    ids = torch.tensor(tokens, device=head.weight_VD.device)
    bias: Tensor | None = None if head.bias_V is None else head.bias_V[ids].float()
    return replace(head, weight_VD=head.weight_VD[ids].float(), bias_V=bias)


def item(name: str, gold: str, found: Mapping[str, float]) -> dict[str, Any]:
    """A row's graded item: id, correct, reason, answer, gold, margin, probability and the log-likelihoods.

    The margin is the right letter's log-likelihood less the best other's, nats; the probability is the right letter's
    among the letters. A tie for the first place is no choice, so it is wrong whichever letters tie.
    """
    best = max(found.values())
    first = [letter for letter, value in found.items() if value == best]
    margin = found[gold] - max(value for letter, value in found.items() if letter != gold)
    correct = margin > 0
    reason = "correct" if correct else f"chose {first[0]}, wanted {gold} ({margin:.2f} nats)"
    if len(first) > 1:
        reason = f"{' and '.join(first)} are equally likely: no choice"
    shares = np.exp(np.array(list(found.values())) - best)
    return {
        "id": name,
        "correct": correct,
        "reason": reason,
        "answer": first[0] if len(first) == 1 else "",
        "gold": gold,
        "margin": margin,
        "probability": float(np.exp(found[gold] - best) / shares.sum()),
        "log_likelihoods": dict(found),
    }


def summary(items: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """What the items say beside their score: is it more than chance?

    Returns:
        chance: the mean of 1 / options; shuffled: the score expected if the model's choices were dealt to the rows at
        random, which a model that always picks one letter reaches; p_shuffled: share of such deals (of SHUFFLES) that
        score as high or higher, one-sided: below 0.05 the choices follow the questions; probability: mean of the right
        letter's among the letters; margin: mean, nats; mass: mean probability that any of the letters comes next,
        small where the format is strange to the model; picks, golds: how often each letter is chosen and right.
    """
    n, right = len(items), sum(bool(i["correct"]) for i in items)
    picks, golds = np.array([i["answer"] for i in items]), np.array([i["gold"] for i in items])
    rng = np.random.default_rng(seed)
    dealt = np.array([int((rng.permutation(picks) == golds).sum()) for _ in range(SHUFFLES)])
    letters = sorted(set(picks) | set(golds))
    counts = [{str(letter): int((of == letter).sum()) for letter in letters} for of in (picks, golds)]
    return {
        "chance": float(np.mean([1 / len(i["log_likelihoods"]) for i in items])),
        "shuffled": sum(counts[0][letter] * counts[1][letter] for letter in counts[0]) / n**2,
        "p_shuffled": (int((dealt >= right).sum()) + 1) / (SHUFFLES + 1),
        "probability": float(np.mean([i["probability"] for i in items])),
        "margin": float(np.mean([i["margin"] for i in items])),
        "mass": float(np.mean([sum(map(np.exp, i["log_likelihoods"].values())) for i in items])),
        "picks": counts[0],
        "golds": counts[1],
    }
