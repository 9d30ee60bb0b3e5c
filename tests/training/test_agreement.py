"""Processes compare what they hold: a difference in one bit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from remend.errors import TrainingError
from remend.training.agreement import require_alike


class Three:
    """Three processes in one: what they gather is this one's, but for what `differs` adds to the others'."""

    num_processes = 3
    device = torch.device("cpu")

    def __init__(self, differs: list[list[int]]) -> None:
        self.differs = torch.tensor(differs)

    def gather(self, own_1T: Tensor) -> Tensor:
        return own_1T + self.differs


HELD = {"a": torch.randn(3, 4), "none": torch.empty(0, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(7)}


def test_the_first_process_that_differs_is_named() -> None:
    three: Any = Three([[0, 0, 0], [0, 0, 0], [0, 1, 0]])
    with pytest.raises(TrainingError, match=r"process 2 holds other weights than process 0 after step 3: b of 3"):
        require_alike(three, HELD, "after step 3")
    three = Three([[0, 0, 0], [1, 0, 1], [0, 1, 0]])
    with pytest.raises(TrainingError, match=r"process 1 holds .*: a and 1 more of 3 tensors"):
        require_alike(three, HELD, "now")


def test_every_element_counts_in_whatever_order_it_lies() -> None:
    seen: list[Tensor] = []

    class Alike(Three):
        def gather(self, own_1T: Tensor) -> Tensor:
            seen.append(own_1T)
            return super().gather(own_1T)

    alike: Any = Alike([[0, 0, 0]] * 3)
    require_alike(alike, HELD, "now")
    require_alike(alike, {**HELD, "a": HELD["a"].T.contiguous().T}, "now")
    moved = HELD["a"].clone()
    moved[1, 2] = torch.nextafter(moved[1, 2], torch.tensor(9.0))
    require_alike(alike, {**HELD, "a": moved}, "now")
    assert seen[0].equal(seen[1])
    assert (seen[2] != seen[0]).tolist() == [[True, False, False]]
