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
from remend.models.activations.experts import Experts, Given, Keywords, Routed
from remend.models.activations.passes import (
    Blocks,
    HiddenBatch,
    first_given,
    hidden_batches,
    look,
    real_states,
    run_block,
)
from remend.models.activations.walkable import holds_experts, is_stack, modules_of_matrices
from remend.models.layers import infer_rows
from remend.models.matrices import Matrix
from remend.models.sampling.rollout import Rollout


@dataclass(frozen=True)
class Anatomy:
    """A block's modules with matrices, in order of execution.

    groups: modules that share an input; of experts the module that holds them all.
    writers: layers that add to the residual stream.
    """

    groups: list[list[nn.Module]]
    writers: list[nn.Module]


def anatomy_of(block: nn.Module, probe: HiddenBatch, index: int, kept: Mapping[nn.Module, list[Matrix]]) -> Anatomy:
    """Find out by running the block on a few tokens. Writers are trusted only when they explain all that it adds.

    Args:
        block, index: of the model.
        probe: what enters the block.
        kept: the modules that hold matrices, with these. Those that the probe does not reach come last, each by itself.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: Given, keywords: Keywords, output: Tensor) -> None:
        # some blocks add to what a layer gave in place, so a copy
        calls.append((layer, first_given(args, keywords), output.clone()))

    own = [m for m in block.modules() if m in kept]
    with ExitStack() as hooks:
        for layer in own:
            hooks.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        added_BTD = run_block(block, probe, index) - probe.states_BTD
    groups: dict[object, list[nn.Module]] = {}
    for layer, given, _ in calls:  # calls keeps the tensors alive, so no address is used twice
        key = layer if kept[layer][0].expert is not None else (given.data_ptr(), given.shape[-1], given.numel())
        groups.setdefault(key, []).append(layer)
    alone = {group[0] for group in groups.values() if len(group) == 1}
    stacks = {layer for layer in own if is_stack(kept[layer])}
    parts = [
        (layer, out.reshape(added_BTD.shape))
        for layer, _, out in calls
        if layer in alone - stacks and out.numel() == added_BTD.numel() and out.shape[-1] == added_BTD.shape[-1]
    ]
    explained = sum((out for _, out in parts), torch.zeros_like(added_BTD))
    close = float((added_BTD - explained).norm()) <= 1e-3 * float(added_BTD.norm())
    met = {layer for layer, _, _ in calls}
    return Anatomy(
        [*groups.values(), *([layer] for layer in own if layer not in met)],
        [layer for layer, _ in parts] if close else [],
    )


@dataclass
class Taught:
    """What a teacher's block shows.

    outputs: of its layers [N, O], by the layer's name in the block, and of all experts together.
    experts: its modules of experts, with what they were given, by name.
    before_ND, after_ND: the stream before and after the whole span of blocks that the student's block stands for.
    """

    outputs: dict[str, Tensor]
    experts: dict[str, tuple[Experts, Routed]]
    before_ND: Tensor
    after_ND: Tensor


@dataclass
class TeacherStates:
    """The teacher's side of the walk: carries its states, and tells what each layer of a block should give.

    places: for each block of the student the teacher's block that it is, and at the end the number of the teacher's.
    """

    blocks: Blocks
    matrices: Mapping[nn.Module, list[Matrix]]
    places: list[int]
    batches: list[HiddenBatch]

    def advance(self, start: int, stop: int) -> None:
        """Run blocks start … stop - 1."""
        for at in range(start, stop):
            for batch in self.batches:
                batch.states_BTD = run_block(self.blocks.items[at], batch, at)

    def through(self, index: int, ours: Mapping[str, Matrix]) -> Taught:
        """What the teacher's blocks show in place of the student's block `index`, and carry the states behind them.

        `ours` are the block's layers by name, without experts: only outputs that they have too are kept.
        """
        at = self.places[index]
        block = self.blocks.items[at]
        own = {n: m for n, m in block.named_modules() if m in self.matrices and not is_stack(self.matrices[m])}
        layers = {n: m for n, m in own.items() if not holds_experts(self.matrices[m])}
        experts = {n: m for n, m in own.items() if n not in layers}
        before_ND = real_states(self.batches)
        seen = look(block, self.batches, at, out_of=list(own.values()), experts=list(experts.values()))
        for batch, states_BTD in zip(self.batches, seen.states, strict=True):
            batch.states_BTD = states_BTD
        self.advance(at + 1, self.places[index + 1])
        kept = {
            n: _kept(seen.outputs[m], ours[n], self.matrices[m][0])
            for n, m in layers.items()
            if n in ours and m in seen.outputs
        } | {n: seen.outputs[m] for n, m in experts.items()}
        return Taught(
            {n: y_NO for n, y_NO in kept.items() if y_NO is not None},
            {n: (Experts(m, self.matrices[m]), seen.routed[m]) for n, m in experts.items()},
            before_ND,
            real_states(self.batches),
        )


def teacher_states(
    blocks: Blocks,
    rollouts: Sequence[Rollout],
    layer_map: Sequence[int],
    precision: AbstractContextManager[object],
    *,
    alone: bool = False,
) -> TeacherStates:
    """The teacher's states where the student's first block begins. Raises InputError for a map that does not fit.

    `alone`: each sequence is a batch of its own, as it has to be where the student's are.
    """
    depth = len(blocks.items)
    if not layer_map or max(layer_map) >= depth or list(layer_map) != sorted(set(layer_map)):
        raise InputError(
            f"the layer map {list(layer_map)} does not fit a teacher of {depth} layers: it must rise "
            "and stay below that number"
        )
    batches = hidden_batches(blocks, rollouts, precision, once=True, alone=alone)
    teacher = TeacherStates(blocks, modules_of_matrices(blocks.model), [*layer_map, depth], batches)
    teacher.advance(0, layer_map[0])
    return teacher


def _kept(outputs_NP: Tensor, ours: Matrix, theirs: Matrix) -> Tensor | None:
    """Of the teacher's outputs those that a narrower layer kept."""
    if ours.out_features == theirs.out_features:
        return outputs_NP
    rows_O = infer_rows(ours.weight_OI, theirs.weight_OI)
    return None if rows_O is None else outputs_NP[:, rows_O]


class Targets:
    """What the layers of one block ought to give, from the teacher's outputs and streams.

    modules: the block's, by name: layers and modules of experts.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], writers: Sequence[nn.Module], taught: Taught, before_ND: Tensor
    ) -> None:
        self._given = {module: taught.outputs.get(name) for name, module in modules.items()}
        self._before_ND = before_ND
        self.written: list[nn.Module] = []
        self._stream: dict[nn.Module, Tensor] = {}
        same_width = before_ND.shape == taught.before_ND.shape
        if writers and same_width and all(self._given[w] is not None for w in writers):
            stream_ND = taught.before_ND
            for writer in writers:
                stream_ND = stream_ND + self._given[writer]  # type: ignore[operator]
                self._stream[writer] = stream_ND
            self._stream[writers[-1]] = taught.after_ND  # of the whole span, removed blocks included

    def wanted(self, matrix: Matrix, written: Mapping[nn.Module, Tensor]) -> Tensor | None:
        """[N, O], its bias taken off; None where the teacher has no like layer."""
        layer = matrix.module
        y_NO = self._given.pop(layer)  # asked for once
        if layer in self._stream:
            y_NO = self._stream[layer] - self._before_ND - sum(y.float() for y in written.values())
            self.passed(layer)
        if y_NO is None or y_NO.shape[1] != matrix.out_features:
            return None
        return y_NO.float() if matrix.bias_O is None else y_NO.float() - matrix.bias_O.float()

    def passed(self, module: nn.Module) -> None:
        """Note that a module has its weights: what it writes into the stream is no longer missing there."""
        if module in self._stream:
            self.written.append(module)
