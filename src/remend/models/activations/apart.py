"""Text that repair is not fitted to: by it a repair judges itself, block by block, as it goes.

A block's layers are changed one group after the other, each making good what those before it lost, so they are judged
together: they keep their new weights only where the block's output on this text comes nearer to the teacher's stream
there. So what is fitted to one text at the cost of others is taken back at once, and the next blocks do what they can.

Legend: N real tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from remend.files.atomic import JsonObject
from remend.models.activations.passes import HiddenBatch, Walkable, real_states, run_block
from remend.models.activations.targets import TeacherStates
from remend.models.matrices import Matrix
from remend.models.sampling.rollout import Rollout

ONE_OF = 8
"""Of so many sequences of calibration text one is held apart,"""

AT_MOST = 32
"""and no more than so many: they hold thousands of tokens, and every block runs over them three times."""

NOTED = 1e-6
"""By how much a block's squared relative error must have grown for the change to be named: not by rounding."""


def divided(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
    """What is fitted, and what is held apart: every eighth, 32 at most. Of fewer than eight none is."""
    held = range(ONE_OF - 1, len(rollouts), ONE_OF)[:AT_MOST]
    return [r for i, r in enumerate(rollouts) if i not in held], [rollouts[i] for i in held]


@dataclass
class Change:
    """A block's weights as they were before it was changed: a view into the model with a copy, by module."""

    before: dict[nn.Module, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, modules: Sequence[nn.Module], kept: Mapping[nn.Module, list[Matrix]], norm: nn.Module | None) -> None:
        """Note modules with matrices that are about to be changed, and the norm behind them."""
        for module in modules:
            self.before[module] = [(m.weight_OI, m.weight_OI.clone()) for m in kept[module]]
        if norm is not None:
            gain: Tensor = norm.weight.detach()  # type: ignore[operator]
            self.before[norm] = [(gain, gain.clone())]

    def take_back(self) -> None:
        """The weights as they were."""
        for weights in self.before.values():
            for view, copy in weights:
                view.copy_(copy)


@dataclass
class Apart:
    """The held-apart text on its way through student and teacher; `apart_of` makes it.

    blocks: the student's.
    batches, healthy: what enters a block of the student, and the teacher's side.
    begun: what the student puts out behind its last block with the weights that it came with.
    error: the mean squared relative error per token of the student's stream behind the block that was judged last.
    unchanged: modules whose change was taken back.
    held_back: blocks whose change did harm beyond rounding.
    """

    blocks: Walkable
    batches: list[HiddenBatch]
    healthy: TeacherStates
    begun: list[Tensor]
    error: float = 0.0
    unchanged: list[nn.Module] = field(default_factory=list)
    held_back: list[int] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)

    def enter(self, index: int) -> None:
        """Before a block is changed."""
        self._before = self._run(index)

    def judge(self, index: int, change: Change) -> bool:
        """Keep a block's change where its output comes nearer; else take it back, and say False."""
        self.healthy.advance(self.healthy.places[index], self.healthy.places[index + 1])
        after, before = self._run(index), self._before
        error, error_before = self._distance(after), self._distance(before)
        better = error <= error_before
        if not better:
            change.take_back()
            self.unchanged += change.before
            self.held_back += [index] if error > error_before + NOTED else []
        self.error = min(error, error_before)
        for batch, states_BTD in zip(self.batches, after if better else before, strict=True):
            batch.states_BTD = states_BTD
        return better

    def go_on(self, index: int, told: JsonObject, modules: Sequence[nn.Module]) -> None:
        """Instead of `enter` and `judge`, past a block that an earlier process settled; it has its weights.

        Args:
            index: the block.
            told: what `about` said of it then.
            modules: its modules with matrices.
        """
        self.healthy.advance(self.healthy.places[index], self.healthy.places[index + 1])
        for batch, states_BTD in zip(self.batches, self._run(index), strict=True):
            batch.states_BTD = states_BTD
        self.error = told["error"]
        self.unchanged += [] if told["kept"] else modules
        self.held_back += [index] if told["held_back"] else []

    def about(self, index: int, *, kept: bool) -> JsonObject:
        """What `go_on` must know of a block that was just judged."""
        return {"kept": kept, "error": self.error, "held_back": index in self.held_back}

    def end(self) -> tuple[float, float]:
        """The error behind the last block, as the student came and as it is."""
        return self._distance(self.begun), self.error

    def _run(self, index: int) -> list[Tensor]:
        return [run_block(self.blocks.items[index], batch, index) for batch in self.batches]

    def _distance(self, states: Sequence[Tensor]) -> float:
        ours_ND = real_states([replace(b, states_BTD=s) for b, s in zip(self.batches, states, strict=True)])
        theirs_ND = real_states(self.healthy.batches)
        size_N = theirs_ND.square().sum(-1).clamp_min(1e-12)
        return float(((ours_ND - theirs_ND).square().sum(-1) / size_N).double().mean())


def apart_of(blocks: Walkable, batches: list[HiddenBatch], healthy: TeacherStates) -> Apart:
    """Before anything of the student is changed; `batches` and `healthy` are of the text held apart."""
    as_it_came = [replace(batch) for batch in batches]
    for index in range(len(blocks.items)):
        with blocks.at(index) as block:
            for batch in as_it_came:
                batch.states_BTD = run_block(block, batch, index)
    return Apart(blocks, batches, healthy, [batch.states_BTD for batch in as_it_came])
