"""What the training of a study's cells did to alignment: by KL alone, and by one teacher or the other.

Two claims are looked at. KL alone can lower a layer's CKA (arXiv 2606.05682). Of a base and an expert teacher the base
goes with the higher CKA and the expert with the higher accuracy (third-party notes on arXiv 2604.15794, its Table 6).
The unit of every test is the cell, or the pair of cells that differ in the teacher alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from remend.files.atomic import JsonObject
from remend.maths.gap import bootstrap_mean
from remend.maths.paired import holm, sign_flip
from remend.report.words import minus
from remend.studies.tracks import Point, Track

KL_METHODS = ("off-policy", "on-policy")
"""Whose signal is the divergence to a teacher; with `+cka` it is not that alone."""

STARTS = ("degraded", "repaired")
"""Stages before the first step."""

SIGNIFICANT = 0.05


def late_layer(tracks: Sequence[Track]) -> int:
    """The last layer but one of the reference's, as the paper looks at ("35/36"): numbered from 0."""
    return max(0, max(layer for track in tracks for point in track.points for layer in point.cka) - 1)


def late_cka(point: Point, late: int) -> float | None:
    """CKA at that layer, or at the nearest below that the student still has."""
    known = [layer for layer in point.cka if layer <= late]
    return point.cka[max(known)] if known else None


def kl_only(tracks: Sequence[Track], seed: int) -> JsonObject:
    """Change of CKA by training on KL alone, from before the first step to the end, over cells.

    Args:
        tracks: those of cells count whose method is KL_METHODS without `+cka`, and whose teacher is the reference, to
            which CKA is measured.
        seed: of resamples and sign flips.

    Returns:
        cells: names; mean_change with its interval_95 (cells resampled; None of fewer than 2) and p, of the mean over
        layers; layers: {layer, change, fell (how many cells' CKA did), cells, p, p_holm}. p-values are two-sided, of
        random signs of the cells' changes, Holm's over the layers.
    """
    changes: dict[str, Mapping[int, float]] = {}
    for track in tracks:
        if track.cell is not None and track.cell.teacher == "reference" and _kl_alone(track.cell.how):
            ends = _ends(track)
            if ends is not None:
                before, after = ends
                shared = [layer for layer in before.cka if layer in after.cka]
                changes[track.name] = {layer: after.cka[layer] - before.cka[layer] for layer in shared}
    means = [math.fsum(by_layer.values()) / len(by_layer) for by_layer in changes.values() if by_layer]
    layers: list[JsonObject] = []
    for layer in sorted({layer for by_layer in changes.values() for layer in by_layer}):
        values = [by_layer[layer] for by_layer in changes.values() if layer in by_layer]
        change, fell = math.fsum(values) / len(values), sum(value < 0 for value in values)
        layers.append(
            {"layer": layer, "change": change, "fell": fell, "cells": len(values), "p": sign_flip(values, seed)}
        )
    for row, adjusted in zip(layers, holm([row["p"] for row in layers]).tolist(), strict=True):
        row["p_holm"] = adjusted
    return {
        "cells": list(changes),
        "mean_change": math.fsum(means) / len(means) if means else None,
        "interval_95": bootstrap_mean(means, seed=seed) if means else None,
        "p": sign_flip(means, seed) if means else None,
        "layers": layers,
    }


def _kl_alone(how: str) -> bool:
    base, *extras = how.split("+")
    return base in KL_METHODS and "cka" not in extras


def _ends(track: Track) -> tuple[Point, Point] | None:
    """The last point before the first step, and the last of all; None where one of them is missing."""
    before = [point for point in track.points if point.stage in STARTS]
    after = [point for point in track.points if point.stage not in STARTS]
    return (before[-1], max(after, key=lambda point: point.step)) if before and after else None


def base_and_expert(tracks: Sequence[Track], late: int, seed: int) -> JsonObject:
    """Cells whose teacher was the base beside those whose teacher was the expert, alike in all else.

    Args:
        tracks: those of cells that stand on another degradation, so that the reference is an expert.
        late: the layer near the last, see `late_layer`.
        seed: of sign flips.

    Returns:
        pairs: {group, how, seed, base, expert (cells), cka, late_cka, score (base less expert)}; and for cka, late_cka
        and score {mean, pairs, p}, p two-sided by random signs of the pairs; mean and p None without pairs.
    """
    by_kind: dict[tuple[str, str, int, str], dict[str, Track]] = {}
    for track in tracks:
        cell = track.cell
        if cell is not None and cell.compressed_expert and cell.teacher in ("base", "reference") and track.points:
            by_kind.setdefault((cell.group, cell.how, cell.seed, cell.recipe), {})[cell.teacher] = track
    pairs: list[JsonObject] = []
    for (group, how, number, _), both in by_kind.items():
        if len(both) == 2:
            base, expert = both["base"], both["reference"]
            names = {"base": base.name, "expert": expert.name}
            pairs.append({"group": group, "how": how, "seed": number, **names, **_differences(base, expert, late)})
    found: JsonObject = {"pairs": pairs}
    for key in ("cka", "late_cka", "score"):
        values = [pair[key] for pair in pairs if pair[key] is not None]
        known = {"mean": math.fsum(values) / len(values), "p": sign_flip(values, seed)} if values else {}
        found[key] = {"mean": None, "p": None, "pairs": len(values), **known}
    return found


def _differences(base: Track, expert: Track, late: int) -> JsonObject:
    """Base less expert, at the end of both."""
    ours, theirs = (max(track.points, key=lambda point: point.step) for track in (base, expert))
    scores = [track.cell.score if track.cell else None for track in (base, expert)]
    pairs = {
        "cka": (ours.alignment, theirs.alignment),
        "late_cka": (late_cka(ours, late), late_cka(theirs, late)),
        "score": (scores[0], scores[1]),
    }
    return {key: None if a is None or b is None else a - b for key, (a, b) in pairs.items()}


def kl_sentence(found: JsonObject) -> str:
    """Whether KL-only training lowers CKA anywhere, to be quoted."""
    cells = len(found["cells"])
    if not cells:
        return "Whether training on KL alone lowers CKA was not measured: no cell of that kind has a track."
    low = [row for row in found["layers"] if row["change"] < 0 and row["p_holm"] <= SIGNIFICANT]
    worst = min(found["layers"], key=lambda row: float(row["change"]))
    ends = found["interval_95"]
    span = "" if ends is None else f" (95% interval {ends[0]:+.3f} to {ends[1]:+.3f})"
    mean = f"{_cells(cells)} trained on KL alone, CKA changed by {found['mean_change']:+.3f}{span}"
    most = f"layer {worst['layer']} most ({worst['change']:+.3f}, p {worst['p_holm']:.2g} after Holm)"
    layers = f"{len(found['layers'])} layers"
    if low:
        text = f"In {mean} on average over layers, and fell beyond chance in {len(low)} of {layers}, in {most}."
    else:
        least = min(1.0, 2 / 2**cells * len(found["layers"]))
        few = f" With {_cells(cells)} no layer's p-value can be below {least:.2g}." if least > SIGNIFICANT else ""
        fall = f"; its lowest change is in layer {worst['layer']} ({worst['change']:+.3f}, p {worst['p_holm']:.2g})"
        text = f"In {mean} on average over layers, and fell beyond chance in none of {layers}{fall}.{few}"
    return minus(text)


def teacher_sentence(found: JsonObject) -> str:
    """Which teacher goes with the higher CKA and which with the higher accuracy, to be quoted."""
    if not found["pairs"]:
        return (
            "Which teacher goes with the higher CKA and accuracy was not measured: no two cells differ in base or "
            "expert teacher alone."
        )
    said = [
        _order("CKA over all layers", found["cka"], "{:+.3f}"),
        _order("CKA near the last layer", found["late_cka"], "{:+.3f}"),
        _order("accuracy on the task", found["score"], "{:+.1f} points", 100),
    ]
    count = len(found["pairs"])
    text = f"In {count} pair{'s' * (count != 1)} of cells that differ in the teacher alone, {'; '.join(said)}."
    return minus(text)


def _order(what: str, one: JsonObject, form: str, scale: float = 1.0) -> str:
    if one["mean"] is None:
        return f"{what} was not measured"
    value = form.format(scale * one["mean"])
    figures = f"base less expert {value}, p {one['p']:.2g} of {one['pairs']}"
    if one["p"] > SIGNIFICANT:
        return f"neither teacher has the higher {what} beyond chance ({figures})"
    return f"the {'base' if one['mean'] > 0 else 'expert'} teacher has the higher {what} ({figures})"


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
