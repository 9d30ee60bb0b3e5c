"""Answers as pieces: words that differ from the reference's marked, tokens coloured by KL."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from remend.files.atomic import JsonRow
from remend.report.page import Piece, Said
from remend.report.words import number

KL_STEPS = (0.05, 0.25, 1.0, 2.5)
"""Nats: a token's KL below the first is left as it is, from the last on it has the strongest colour."""

SCALE = tuple(
    (f"k{i}", words)
    for i, words in enumerate(
        (
            f"below {KL_STEPS[0]:g}",
            *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(KL_STEPS)),
            f"{KL_STEPS[-1]:g} and more",
        )
    )
)
"""Classes of tokens and what they mean, for the legend."""

MOST_WORDS = 2000
"""Longer answers are shown without marks: the comparison's cost grows with the product of the lengths."""

NOTHING = "(nothing)"


def plain(text: str, label: str = "") -> Said:
    """A text as it is."""
    return Said([Piece(text if text.strip() else NOTHING)], label)


def marked(text: str, reference: str, label: str = "") -> Said:
    """A text whose words that are not the reference's, in order, are marked where most are; the note says how many."""
    ours, theirs = words_of(text), words_of(reference)
    if not ours or not theirs or max(len(ours), len(theirs)) > MOST_WORDS:
        return plain(text, label)
    matcher = SequenceMatcher(None, [w.strip() for w in theirs], [w.strip() for w in ours], autojunk=False)
    pieces, same = list[Piece](), 0
    for tag, _, _, start, end in matcher.get_opcodes():
        if start == end:
            continue
        whole = "".join(ours[start:end])
        if tag == "equal":
            pieces.append(Piece(whole))
            same += end - start
        else:
            word = whole.rstrip()
            pieces += [Piece(word, "differs"), *([Piece(whole[len(word) :])] if word != whole else [])]
    note = f"{same} of {len(ours)} words are the reference's, in its order"
    if 2 * same < len(ours):  # an answer of other words, which may be as good, would be marked all over
        return Said([Piece(text)], label, note)
    return Said(pieces, label, note)


def words_of(text: str) -> list[str]:
    """Words, each with the space after it; joined they are the text."""
    return re.findall(r"\s*\S+\s*", text)


def coloured(tokens: Sequence[JsonRow], label: str = "") -> Said:
    """The reference's answer, each token ({text, kl, rank}) coloured by its KL under a student."""
    if not tokens:
        return plain("", label)
    pieces = [Piece(t["text"], level(t["kl"]), _hover(t), t["kl"]) for t in tokens]
    agreed = sum(t["rank"] == 0 for t in tokens)
    return Said(pieces, label, f"{agreed} of {len(pieces)} tokens are this model's first choice too")


def _hover(token: JsonRow) -> str:
    rank = token["rank"]
    place = "its own first choice" if rank == 0 else f"it puts {rank} other token{'s' * (rank != 1)} before this one"
    return f"KL {number(token['kl'])} nats; {place}"


def level(kl: float | None) -> str:
    """The class of a token's KL: k0 to k4."""
    return "k0" if kl is None else f"k{sum(kl >= step for step in KL_STEPS)}"
