"""Whatever scores the student's tokens. Here: the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from remend.losses import Head
from remend.rollout import Rollout
from remend.scoring import Scorer, pack


class Teacher(Protocol):
    """Hidden states at the positions that predict the rollouts' completion tokens, and the head to read them."""

    @property
    def head(self) -> Head:
        """From its hidden states to logits over the shared ids."""
        ...

    def hidden(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N, E]: one row a completion token, rollout after rollout."""
        ...


@dataclass(frozen=True)
class Frozen:
    """A checkpoint that never changes."""

    parts: Scorer
    pad_id: int

    @property
    def head(self) -> Head:
        """See Teacher."""
        return self.parts.head

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout]) -> Tensor:
        """See Teacher."""
        device = self.parts.device
        batch = pack([(r.prompt, r.completion) for r in rollouts], pad_id=self.pad_id, device=device)
        return batch.gather(self.parts.hidden(batch.tokens_BT))
