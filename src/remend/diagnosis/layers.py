"""Layer by layer: how alike a student's states are to the reference's, from one row a sequence.

Legend: L layers of the student, M layers of the reference, S sequences, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from remend.files.atomic import JsonObject
from remend.maths import cka
from remend.models.activations.capture import massive

FEW_ROWS = 256
"""Below so many the debiased estimator is noisy (arXiv 2405.01012)."""

GROUPS, PERMUTATIONS, NEIGHBOURS = 20, 200, 10

PARTS = ((0, 4), (4, 12), (12, 24), (24, 1 << 30))
"""Stretches of an answer, in tokens, over which CKA is given."""


@dataclass(frozen=True)
class Rows:
    """One model's rows at one site, and where in the answers they were taken.

    states_LSD: float32.
    positions_S: int64, the completion token of each.
    """

    states_LSD: Tensor
    positions_S: Tensor


def norm_table(states_LSD: Tensor) -> list[dict[str, float]]:
    """By layer: median and largest norm of a row, how many are massive, the dimension with the most variance and its
    share of all variance."""
    table = []
    for layer, states_SD in enumerate(states_LSD.double()):
        norms_S, variance_D = states_SD.norm(dim=-1), states_SD.var(dim=0)
        top = int(variance_D.argmax())
        total = float(variance_D.sum())
        table.append(
            {
                "layer": layer,
                "median_norm": float(norms_S.median()),
                "largest_norm": float(norms_S.max()),
                "massive": int(massive(states_SD[None].float()).sum()),
                "top_dimension": top,
                "top_dimension_share": float(variance_D[top]) / total if total > 0 else math.nan,
            }
        )
    return table


def measure(
    reference: Tensor, student: Tensor, layer_map: Sequence[int], *, anchors: dict[str, list[float]], seed: int
) -> JsonObject:
    """All measures of every layer of the student against the reference's layer that it is.

    Args:
        reference: [M, S, D] and student: [L, S, E], usable rows of one site, in one order.
        layer_map: for each of the student's layers the reference's.
        anchors: for each of the reference's layers the CKA with itself on a re-run, and with random weights.
        seed: of the jackknife's groups and the permutations.

    Returns:
        layers: [{layer, reference_layer, cka, cka_low, cka_high, l2, procrustes, knn, rerun, random}], and
        null_max: the largest CKA over layers that PERMUTATIONS shuffles of the rows gave.
    """
    layers = []
    for layer, at in enumerate(layer_map):
        theirs_SD, ours_SE = reference[at], student[layer]
        estimate = cka.jackknife(theirs_SD, ours_SE, groups=min(GROUPS, len(ours_SE) // 2), seed=seed)
        same_width = theirs_SD.shape == ours_SE.shape
        layers.append(
            {
                "layer": layer,
                "reference_layer": at,
                "cka": estimate.value,
                "cka_low": estimate.low,
                "cka_high": estimate.high,
                "l2": cka.relative_l2(theirs_SD, ours_SE) if same_width else math.nan,
                "procrustes": cka.procrustes(theirs_SD, ours_SE),
                "knn": cka.mutual_knn(theirs_SD, ours_SE, k=min(NEIGHBOURS, len(ours_SE) - 1)),
                **{name: values[at] for name, values in anchors.items()},
            }
        )
    null = cka.permutation_null(
        [reference[at] for at in layer_map], list(student), permutations=PERMUTATIONS, seed=seed
    )
    return {"layers": layers, "null_max": float(null.max())}


def along(reference: Rows, student: Rows, layer_map: Sequence[int]) -> list[JsonObject]:
    """Mean CKA over layers by stretch of the answer; a stretch with fewer than 16 rows is left out."""
    stretches = []
    for start, end in PARTS:
        there_S = (reference.positions_S >= start) & (reference.positions_S < end)
        count = int(there_S.sum())
        if count < 16:
            continue
        values = [
            cka.debiased_cka(reference.states_LSD[at][there_S], student.states_LSD[layer][there_S])
            for layer, at in enumerate(layer_map)
        ]
        last = int(reference.positions_S[there_S].max())
        stretches.append({"start": start, "end": min(end - 1, last), "rows": count, "cka": sum(values) / len(values)})
    return stretches


def differences(
    reference: Tensor, before: Tensor, after: Tensor, maps: tuple[Sequence[int], Sequence[int]], seed: int
) -> list[JsonObject]:
    """CKA after minus CKA before, by the reference's layers that both students have, paired on the same rows.

    Args:
        reference, before, after: [M, S, D], [L, S, D] and [K, S, D], rows that are usable in all three.
        maps: of `before` and of `after`.
        seed: of the jackknife's groups.
    """
    places = [{at: layer for layer, at in enumerate(layer_map)} for layer_map in maps]
    changes = []
    for at in sorted(set(places[0]) & set(places[1])):
        change = cka.jackknife_difference(
            reference[at],
            before[places[0][at]],
            after[places[1][at]],
            groups=min(GROUPS, reference.shape[1] // 2),
            seed=seed,
        )
        changes.append({"reference_layer": at, "change": change.value, "low": change.low, "high": change.high})
    return changes


def heatmap(reference: Tensor, student: Tensor) -> list[list[float]]:
    """Every layer of the student against every layer of the reference, debiased CKA: [L][M], rounded to 4 places."""
    grid_LM = cka.cka_grid(list(student), list(reference))
    return [[round(value, 4) for value in row] for row in grid_LM.tolist()]
