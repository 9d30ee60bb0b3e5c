"""From numbers to words: how badly a model is damaged, where, and what to do. Pure.

Every sentence carries the places in the diagnosis that it speaks of, so that a reader can check it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from remend.files.atomic import JsonObject, JsonRow

SEVERITIES = ("none", "mild", "severe", "broken")

KL_LIMITS = (0.01, 0.25, 1.5)
"""Forward KL to the reference, nats per token: below the first none, then mild, severe; from the last on broken."""

AGREEMENT_LIMITS = (0.97, 0.80, 0.50)
"""Share of tokens with the reference's first choice: from the first on none, then mild, severe; below the last broken.

Both rows of limits are this project's words for what its own degradations of SmolLM2-135M look like when read, not a
standard: 4-bit grids come out mild or severe, round to nearest at 3 bits, which babbles, broken."""

REPETITION = 0.3
"""A model that repeats so much more of its own 4-grams than the reference does is broken, whatever its KL."""


@dataclass(frozen=True)
class Sentence:
    """A statement, and the places in the diagnosis (JSON pointers, RFC 6901) that it rests on."""

    text: str
    rests_on: tuple[str, ...]

    def to_json(self) -> JsonObject:
        """As plain values."""
        return {"text": self.text, "rests_on": list(self.rests_on)}


def severity(behaviour: JsonRow, own: Mapping[str, float], reference_own: Mapping[str, float]) -> str:
    """One of SEVERITIES: the worst that KL, agreement or repetition says."""
    kl, agreement = behaviour["kl"], behaviour["top1_agreement"]
    by_kl = sum(kl >= limit for limit in KL_LIMITS)
    by_agreement = sum(agreement < limit for limit in AGREEMENT_LIMITS)
    loops = own["repetition"] - reference_own["repetition"] > REPETITION
    return SEVERITIES[max(by_kl, by_agreement, 3 if loops else 0)]


def ranked(layers: Sequence[JsonRow]) -> list[int]:
    """Layers from the least aligned to the best; a layer that has no CKA comes last."""
    return sorted(
        range(len(layers)), key=lambda i: (math.isnan(layers[i]["cka"]), layers[i]["cka"], layers[i]["layer"])
    )


def entry(layers: Sequence[JsonRow]) -> int | None:
    """The layer at which CKA falls most from the one before it (from 1 for the first); None where none falls."""
    values = [1.0, *(layer["cka"] for layer in layers)]
    falls = [before - after for before, after in itertools.pairwise(values)]
    worst = max(range(len(falls)), key=lambda i: -math.inf if math.isnan(falls[i]) else falls[i])
    return worst if falls[worst] > 0.001 else None


def unrelated(layers: Sequence[JsonRow], null_max: float, of: str = "cka") -> bool:
    """Whether the typical layer is no more alike than chance: shuffled rows, or random weights.

    `of` 'cka_high' asks it of the upper ends of the intervals.
    """
    values = [layer[of] for layer in layers if not math.isnan(layer[of])]
    random = [layer["random"] for layer in layers if not math.isnan(layer.get("random", math.nan))]
    return not values or median(values) <= max(null_max, median(random) if random else -math.inf)


def recommendation(figures: JsonRow, kind: str) -> Sentence:
    """Whether to recover and with which recipe.

    Args:
        figures: a student's part of the diagnosis, with its severity.
        kind: 'grid', 'mask', 'smaller' or 'dense': what the student is held to.
    """
    if figures["severity"] == "none":
        return Sentence("There is nothing to recover: it speaks as the reference does.", ("/severity",))
    if unrelated(figures["layers"], figures["null_max"]):
        if not unrelated(figures["layers"], figures["null_max"], of="cka_high"):
            return Sentence(
                "Whether recovery is worth it can't be said: the typical layer seems no more like the reference's than "
                "chance, but its interval reaches above that. Diagnose more rows (--rows), and check that the "
                "reference is the right one.",
                ("/layers", "/null_max"),
            )
        return Sentence(
            "Recovery is not worth it: the typical layer is no more like the reference's than chance, so this is no "
            "damaged copy of this reference, or nothing of it is left. Check that the reference is the right one.",
            ("/layers", "/null_max"),
        )
    recipe = {"grid": "quantized", "mask": "pruned", "smaller": "pruned", "dense": "forgetting"}[kind]
    how = {
        "grid": "its weights lie on a grid, which is kept; one-shot repair comes first",
        "mask": "its zeros are kept; one-shot repair comes first",
        "smaller": "its smaller architecture is kept; one-shot repair comes first",
        "dense": "its weights are dense, as after fine-tuning; a second stream keeps what the fine-tuning was for",
    }[kind]
    return Sentence(f"Recover it: remend recipes cp {recipe} . ({how}).", ("/severity", "/kind"))


def sentences(figures: JsonRow) -> list[Sentence]:
    """What the numbers say, in the order in which one asks: how badly, where, how it shows."""
    behaviour, layers, worst = figures["behaviour"], figures["layers"], figures["ranking"][0]
    low, high = behaviour["kl_95"] or (math.nan, math.nan)
    result = [
        Sentence(
            f"Severity: {figures['severity']}. Its next-token distribution is {behaviour['kl']:.3f} nats per token "
            f"(95% {low:.3f} to {high:.3f}) from the reference's, and {behaviour['top1_agreement']:.0%} of its first "
            "choices are the same.",
            ("/severity", "/behaviour/kl", "/behaviour/kl_95", "/behaviour/top1_agreement"),
        ),
        Sentence(
            f"Least aligned is layer {layers[worst]['layer']}: CKA {layers[worst]['cka']:.3f} "
            f"({layers[worst]['cka_low']:.3f} to {layers[worst]['cka_high']:.3f}); shuffled rows reach "
            f"{figures['null_max']:.3f}.",
            (
                "/ranking/0",
                f"/layers/{worst}/cka",
                f"/layers/{worst}/cka_low",
                f"/layers/{worst}/cka_high",
                "/null_max",
            ),
        ),
    ]
    at = figures["entry"]
    if at is not None:
        before = layers[at - 1]["cka"] if at else 1.0
        result.append(
            Sentence(
                f"Alignment falls most at layer {layers[at]['layer']}, from {before:.3f} to {layers[at]['cka']:.3f}.",
                ("/entry", *([f"/layers/{at - 1}/cka"] if at else []), f"/layers/{at}/cka"),
            )
        )
    first, last = _ends(figures["positions"])
    result.append(
        Sentence(
            f"Along the answer KL goes from {first:.3f} in the first four tokens to {last:.3f} in the last quarter.",
            ("/positions",),
        )
    )
    own, reference = figures["own_answers"], figures["reference_answers"]
    result.append(
        Sentence(
            f"Left to itself it repeats {own['repetition']:.0%} of its 4-grams (reference "
            f"{reference['repetition']:.0%}), and {own['clipped_share']:.0%} of its answers were cut at the "
            f"length limit (reference {reference['clipped_share']:.0%}).",
            (
                "/own_answers/repetition",
                "/reference_answers/repetition",
                "/own_answers/clipped_share",
                "/reference_answers/clipped_share",
            ),
        )
    )
    return result


def _ends(positions: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """KL over the first four positions and over the last quarter, weighted by sequences."""

    def mean(rows: Sequence[Mapping[str, float]]) -> float:
        weight = sum(row["sequences"] for row in rows)
        return sum(row["kl"] * row["sequences"] for row in rows) / weight

    quarter = max(1, len(positions) // 4)
    return mean(positions[:4]), mean(positions[-quarter:])
