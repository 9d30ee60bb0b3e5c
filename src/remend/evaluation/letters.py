"""Score multiple choice by the log-likelihood of the answer's letter, without generating.

What is scored: after the prompt through the chat template, up to and with the assistant's header, comes LEAD, the
opening tag with which both science tasks ask for the answer, and then each letter. A letter's score is log p of its
tokens, in nats; for usual tokenizers that is one token:

    …<|im_start|>assistant\\n  <answer>\\n  B
    prompt                     LEAD        letter

The letter follows the tag and not the header, since that is where the prompts ask for it; a bare letter there would be
out of the form that training teaches.

One pass over the prompt serves all letters, and the head is applied where a letter is predicted alone. Rows that are
scored one by one, on a CPU, share the first turn too (as a rule the system message): see FirstTurns.

Legend: B sequences, T time, N positions, D width, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.maths.losses import Head
from remend.models.device import chunk_rows
from remend.models.protocols import Tokenizer
from remend.models.scorer import Scorer, pack

if TYPE_CHECKING:
    from transformers import Cache

LEAD = "<answer>\n"
GRADER = "letter log-likelihood"
SHUFFLES = 10_000
KEPT = 4
"""First turns whose keys and values are kept: data sets have one system message or few."""


@dataclass(frozen=True)
class Choice:
    """A row's letters as token ids: all stand after `context`, which is the prompt with LEAD.

    turn: how many tokens of the context are its first turn, where it has several; else 0.
    """

    id: str
    context: tuple[int, ...]
    endings: Mapping[str, tuple[int, ...]]
    turn: int = 0

    def __len__(self) -> int:
        return len(self.context) + max(map(len, self.endings.values()))


def choice(
    tokenizer: Tokenizer,
    name: str,
    prompt: Sequence[int],
    letters: Sequence[str],
    lead: str = LEAD,
    *,
    ends: Sequence[int] = (),
) -> Choice:
    """Put the letters after a prompt. `lead` and letter are tokenized together, apart from the prompt, as answers are.

    Args:
        prompt: token ids, up to and with the assistant's header.
        ends: tokens that end a turn; the first turn is told by them where a later one ends too. That hangs on the row
            alone, so that a row's score does not depend on which others are scored.

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
    turns = [at + 1 for at, token in enumerate(prompt) if token in ends]
    return Choice(name, (*prompt, *ids[0][:same]), endings, turns[0] if len(turns) > 1 else 0)


class FirstTurns:
    """Hidden states of single sequences; keys and values of a first turn are computed once for all that share it.

    The first use is checked against a whole pass; a model whose cache does not reproduce it is computed whole.
    """

    def __init__(self, parts: Scorer) -> None:
        self._parts = parts
        self._kept: OrderedDict[tuple[int, ...], Cache] = OrderedDict()
        self._checked = self._works = False

    def hidden(self, tokens_1T: Tensor, turn: int) -> tuple[Tensor, int]:
        """(hidden states [1, T − skipped, D], skipped): those of the first `skipped` tokens are not given."""
        if not turn or (self._checked and not self._works):
            return self._parts.hidden(tokens_1T), 0
        if self._checked:
            return self._after(tokens_1T, turn), turn
        self._checked = True
        try:
            states_BTD = self._after(tokens_1T, turn)
        except (AttributeError, TypeError, ValueError):  # a cache by another name, or of another kind
            return self._parts.hidden(tokens_1T), 0
        whole_BTD = self._parts.hidden(tokens_1T)
        tolerance = 1e-2 * float(whole_BTD.abs().max())
        self._works = torch.allclose(states_BTD.float(), whole_BTD[:, turn:].float(), atol=tolerance, rtol=0)
        return (states_BTD, turn) if self._works else (whole_BTD, 0)

    def _after(self, tokens_1T: Tensor, turn: int) -> Tensor:
        body = self._parts.body
        key = tuple(tokens_1T[0, :turn].tolist())
        if key not in self._kept:
            self._kept[key] = body(input_ids=tokens_1T[:, :turn], use_cache=True).past_key_values
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        cache = copy.deepcopy(self._kept[key])  # the pass appends to it
        output = body(input_ids=tokens_1T[:, turn:], past_key_values=cache, use_cache=True)
        states_BTD: Tensor = output.last_hidden_state
        return states_BTD


@torch.no_grad()
def log_likelihoods(
    parts: Scorer, choices: Sequence[Choice], *, turns: FirstTurns | None = None
) -> list[dict[str, float]]:
    """log p(letter | context) in nats of every letter of every choice, in one forward pass.

    Normalised over the full vocabulary. Letters' logits are taken in float32 from the hidden states, so that bfloat16
    does not make them equal. With `turns` a single choice whose letters need one sequence takes its first turn there.

    Raises InputError when they are not finite.
    """
    # letters that differ in their last token alone need one sequence between them
    stems = [(c, stem) for c in choices for stem in dict.fromkeys(e[:-1] for e in c.endings.values())]
    pairs = [(c.context, (*stem, c.context[-1])) for c, stem in stems]
    batch = pack(pairs, device=parts.device)
    if turns is not None and len(stems) == 1:
        states_BTD, skipped = turns.hidden(batch.tokens_BT, choices[0].turn)
        states_ND = states_BTD[batch.rows_N, batch.columns_N - skipped]
    else:
        states_ND = batch.gather(parts.hidden(batch.tokens_BT))
    head = parts.head
    rows = chunk_rows(parts.shared, parts.device)
    total_N = torch.cat(
        [torch.logsumexp(head(states_ND[at : at + rows]).float(), -1) for at in range(0, len(states_ND), rows)]
    )
    used_U = sorted({token for c in choices for e in c.endings.values() for token in e})
    log_p_NU = _only(head, used_U)(states_ND.float()) - total_N.unsqueeze(1)
    if not log_p_NU.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged beyond use")
    column, values = {token: u for u, token in enumerate(used_U)}, log_p_NU.cpu().double().tolist()
    by_letter: dict[str, dict[str, float]] = {c.id: {} for c in choices}
    first = 0
    for c, stem in stems:
        for letter, ending in c.endings.items():
            if ending[:-1] == stem:
                by_letter[c.id][letter] = sum(values[first + t][column[token]] for t, token in enumerate(ending))
        first += len(stem) + 1
    return [{letter: by_letter[c.id][letter] for letter in c.endings} for c in choices]


def _only(head: Head, tokens: Sequence[int]) -> Head:
    """The head of some tokens, in float32."""
    ids = torch.tensor(tokens, device=head.weight_VD.device)
    bias: Tensor | None = None if head.bias_V is None else head.bias_V[ids].float()
    return replace(head, weight_VD=head.weight_VD[ids].float(), bias_V=bias)


def item(name: str, gold: str, log_p: Mapping[str, float]) -> JsonObject:
    """A row's graded item: id, correct, reason, answer, gold, margin, probability and the log-likelihoods.

    The margin is the right letter's log-likelihood less the best other's, nats; the probability is the right letter's
    among the letters. A tie for the first place is no choice, so it is wrong whichever letters tie.
    """
    best = max(log_p.values())
    first = [letter for letter, value in log_p.items() if value == best]
    margin = log_p[gold] - max(value for letter, value in log_p.items() if letter != gold)
    correct = margin > 0
    reason = "correct" if correct else f"chose {first[0]}, wanted {gold} ({margin:.2f} nats)"
    if len(first) > 1:
        reason = f"{' and '.join(first)} are equally likely: no choice"
    shares = np.exp(np.array(list(log_p.values())) - best)
    return {
        "id": name,
        "correct": correct,
        "reason": reason,
        "answer": first[0] if len(first) == 1 else "",
        "gold": gold,
        "margin": margin,
        "probability": float(np.exp(log_p[gold] - best) / shares.sum()),
        "log_likelihoods": dict(log_p),
    }


def summary(items: Sequence[JsonObject], seed: int) -> JsonObject:
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
