"""What each layer of a block ought to give, by a healthy teacher whose hidden states go along with the walk.

Legend: N real tokens, D width of the residual stream, O outputs of the student's layer, P of the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.models.activations.passes import HiddenBatch, hidden_batches, look, real_states, run_block
from remend.models.layers import decoder_layers, infer_rows
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout


@dataclass(frozen=True)
class Anatomy:
    """A block's linear layers: `groups` share an input, in order of execution; `writers` add to the residual stream."""

    groups: list[list[nn.Linear]]
    writers: list[nn.Linear]


def anatomy_of(block: nn.Module, probe: HiddenBatch, index: int) -> Anatomy:
    """Find out by running the block on a few tokens. Writers are trusted only when they explain all that it adds."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, args[0], output))  # type: ignore[arg-type]

    with ExitStack() as hooks:
        for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
            hooks.callback(layer.register_forward_hook(note).remove)
        added_BTD = run_block(block, probe, index) - probe.states_BTD
    groups: dict[int, list[nn.Linear]] = {}
    for layer, given, _ in calls:  # calls keeps the tensors alive, so no address is used twice
        groups.setdefault(given.data_ptr(), []).append(layer)
    alone = {group[0] for group in groups.values() if len(group) == 1}
    parts = [(layer, out) for layer, _, out in calls if layer in alone and out.shape == added_BTD.shape]
    explained = sum((out for _, out in parts), torch.zeros_like(added_BTD))
    close = float((added_BTD - explained).norm()) <= 1e-3 * float(added_BTD.norm())
    return Anatomy(list(groups.values()), [layer for layer, _ in parts] if close else [])


@dataclass
class TeacherStates:
    """The teacher's side of the walk: carries its states, and tells what each layer of a block should give.

    places: for each block of the student the teacher's block that it is, and at the end the number of the teacher's.
    """

    blocks: nn.ModuleList
    places: list[int]
    batches: list[HiddenBatch]

    def advance(self, start: int, stop: int) -> None:
        """Run blocks start … stop - 1."""
        for at in range(start, stop):
            for batch in self.batches:
                batch.states_BTD = run_block(self.blocks[at], batch, at)

    def through(self, index: int, ours: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Outputs that linear layers of `ours` have too, by name; the stream before and after the whole span [N, D]."""
        at = self.places[index]
        layers = {n: m for n, m in self.blocks[at].named_modules() if isinstance(m, nn.Linear)}
        before_ND = real_states(self.batches)
        seen = look(self.blocks[at], self.batches, at, out_of=list(layers.values()))
        for batch, states_BTD in zip(self.batches, seen.states, strict=True):
            batch.states_BTD = states_BTD
        self.advance(at + 1, self.places[index + 1])
        narrow = {n: m for n, m in ours.named_modules() if n in layers and isinstance(m, nn.Linear)}
        kept = {n: _kept(seen.outputs[layers[n]], m, layers[n]) for n, m in narrow.items()}
        return {n: y_NO for n, y_NO in kept.items() if y_NO is not None}, before_ND, real_states(self.batches)


def teacher_states(
    model: CausalLM,
    rollouts: Sequence[Rollout],
    layer_map: Sequence[int],
    precision: AbstractContextManager[object],
) -> TeacherStates:
    """The teacher's states where the student's first block begins. Raises InputError for a map that does not fit."""
    blocks = decoder_layers(model)
    if not layer_map or max(layer_map) >= len(blocks) or list(layer_map) != sorted(set(layer_map)):
        raise InputError(
            f"the layer map {list(layer_map)} does not fit a teacher of {len(blocks)} layers: it must rise "
            "and stay below that number"
        )
    batches = hidden_batches(model, rollouts, precision, once=True)
    teacher = TeacherStates(blocks, [*layer_map, len(blocks)], batches)
    teacher.advance(0, layer_map[0])
    return teacher


def _kept(outputs_NP: Tensor, ours: nn.Linear, theirs: nn.Linear) -> Tensor | None:
    """Of the teacher's outputs those that a narrower layer kept."""
    if ours.out_features == theirs.out_features:
        return outputs_NP
    rows_O = infer_rows(ours.weight, theirs.weight)
    return None if rows_O is None else outputs_NP[:, rows_O]


class Targets:
    """What the layers of one block ought to give, from the teacher's outputs and streams."""

    def __init__(
        self,
        block: nn.Module,
        anatomy: Anatomy,
        outputs: Mapping[str, Tensor],
        teacher_before_ND: Tensor,
        teacher_after_ND: Tensor,
        before_ND: Tensor,
    ) -> None:
        names = {m: n for n, m in block.named_modules()}
        self._given = {m: outputs.get(names[m]) for group in anatomy.groups for m in group}
        self._before_ND = before_ND
        self.written: list[nn.Linear] = []
        self._stream: dict[nn.Linear, Tensor] = {}
        same_width = before_ND.shape == teacher_before_ND.shape
        if anatomy.writers and same_width and all(self._given[w] is not None for w in anatomy.writers):
            stream_ND = teacher_before_ND
            for writer in anatomy.writers:
                stream_ND = stream_ND + self._given[writer]  # type: ignore[operator]
                self._stream[writer] = stream_ND
            self._stream[anatomy.writers[-1]] = teacher_after_ND  # of the whole span, removed blocks included

    def wanted(self, layer: nn.Linear, written: Mapping[nn.Module, Tensor]) -> Tensor | None:
        """[N, O], its bias taken off; None where the teacher has no like layer."""
        y_NO = self._given.pop(layer)  # asked for once
        if layer in self._stream:
            y_NO = self._stream[layer] - self._before_ND - sum(y.float() for y in written.values())
            self.written.append(layer)
        if y_NO is None or y_NO.shape[1] != layer.out_features:
            return None
        return y_NO.float() if layer.bias is None else y_NO.float() - layer.bias.float()
