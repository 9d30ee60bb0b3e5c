"""Alignment over a recovery: CKA of every layer with the reference, beside KL, at its start, every n steps, at its end.

One row a held-out prompt, so a recovery with 64 of them gives noisier figures than a diagnosis; compare within the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from remend.data.order import derive_seed
from remend.files.atomic import json_line, write_text
from remend.files.run_directory import TRACK, RunDirectory
from remend.maths.cka import debiased_cka
from remend.models.activations.capture import as_layers, capture, pick_positions, usable
from remend.models.layers import infer_layer_map
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.training.measure import PromptSums, pool


class Tracker:
    """Measures a student's layers, and keeps the figures in track.jsonl.

    Args:
        reference: the healthy model.
        completions: its answers to the held-out prompts.
        directory: of the run.
        layer_map: for each of the student's layers the reference's; None finds it.
        seed: settles which token of each answer gives the row.
    """

    def __init__(
        self,
        reference: Scorer,
        completions: Sequence[Rollout],
        directory: RunDirectory,
        *,
        layer_map: Sequence[int] | None,
        seed: int,
    ) -> None:
        self.reference, self.directory = reference, directory
        self.completions = [r for r in completions if r.completion]
        draws = [derive_seed(seed, "row", r.id) / 2**63 for r in self.completions]
        self.picks = pick_positions([len(r.completion) for r in self.completions], draws)
        self.layer_map = list(layer_map) if layer_map is not None else None
        self._theirs: Tensor | None = None

    def _rows(self, parts: Scorer, name: str) -> Tensor:
        found = capture(parts, name, self.completions, self.picks)
        return as_layers(found["residual"], len(self.completions))

    def measured(self, step: int, stage: str) -> bool:
        """Whether the figures are there already, from before an interruption."""
        return any(row["step"] == step and row["stage"] == stage for row in self.directory.rows(TRACK))

    def sorted_rows(self) -> list[dict[str, Any]]:
        """All rows by step and stage; the file is put in that order."""
        order = ("degraded", "repaired", "training", "recovered")
        rows = sorted(self.directory.rows(TRACK), key=lambda row: (row["step"], order.index(row["stage"])))
        write_text(self.directory.path / TRACK, "".join(map(json_line, rows)))
        return rows

    def note(self, student: Scorer, step: int, stage: str, figures: Mapping[str, Any]) -> list[float]:
        """Add a row.

        Args:
            student: as it is now.
            step, stage: degraded, repaired, training or recovered.
            figures: its kl and top1_agreement on the same answers.

        Returns:
            CKA by layer.
        """
        if self._theirs is None:
            self._theirs = self._rows(self.reference, "the reference")
        if self.layer_map is None:
            self.layer_map = infer_layer_map(student.model, self.reference.model)
        ours_LSD = self._rows(student, "the student")
        keep_S = usable(self._theirs, ours_LSD)
        values = [
            debiased_cka(self._theirs[at][keep_S], ours_SD[keep_S])
            for at, ours_SD in zip(self.layer_map, ours_LSD, strict=True)
        ]
        row = {"step": step, "stage": stage, "kl": figures["kl"], "top1_agreement": figures["top1_agreement"]}
        plain = [value if value == value else None for value in values]
        self.directory.append(
            TRACK, {**row, "cka": plain, "reference_layers": self.layer_map, "rows": int(keep_S.sum())}
        )
        return values


def figures_of(sums: Sequence[PromptSums]) -> dict[str, Any]:
    """kl and top1_agreement, as `note` wants them."""
    pooled = pool(sums)
    return {key: pooled[key] for key in ("kl", "top1_agreement")}
