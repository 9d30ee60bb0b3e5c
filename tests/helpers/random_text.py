"""Calibration text for the tiny model."""

from __future__ import annotations

import torch

from remend.models.sampling.rollout import Rollout


def random_text() -> list[Rollout]:
    """24 prompts of 10 tokens with completions of 24 to 30."""
    rows = torch.randint(3, 300, (24, 40), generator=torch.Generator().manual_seed(1)).tolist()
    return [Rollout(str(i), tuple(row[:10]), tuple(row[10 : 40 - i % 7]), False) for i, row in enumerate(rows)]
