"""What each layer of a block ought to give, by a healthy teacher whose hidden states go along with the walk.

Legend: N real tokens, D width of the residual stream, O outputs of the student's layer, P of the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.models.activations.experts import Experts, Given, Keywords, Routed, applied
from remend.models.activations.passes import (
    HiddenBatch,
    Walkable,
    first_given,
    hidden_batches,
    look,
    products,
    real_states,
    run_block,
    start,
)
from remend.models.activations.walkable import holds_experts, is_stack, modules_of_matrices
from remend.models.activations.writers import Writer, gain_of, sizes, writers_of
from remend.models.layers import infer_rows
from remend.models.matrices import Matrix
from remend.models.sampling.rollout import Rollout


def groups_of(
    block: nn.Module, probe: HiddenBatch, index: int, kept: Mapping[nn.Module, list[Matrix]]
) -> list[list[nn.Module]]:
    """A block's modules with matrices, in order of execution: those that share an input, found by running the block.

    Args:
        block, index: of the model.
        probe: what enters the block, or anything like it.
        kept: the modules that hold matrices, with these. Those that the probe does not reach come last, each by itself,
            and so does a module that holds all experts.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(layer: nn.Module, args: Given, keywords: Keywords) -> None:
        calls.append((layer, first_given(args, keywords)))

    own = [m for m in block.modules() if m in kept]
    with ExitStack() as hooks:
        for layer in own:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        run_block(block, probe, index)
    groups: dict[object, list[nn.Module]] = {}
    for layer, given in calls:  # calls keeps the tensors alive, so no address is used twice
        key = layer if kept[layer][0].expert is not None else (given.data_ptr(), given.shape[-1], given.numel())
        groups.setdefault(key, []).append(layer)
    met = {layer for layer, _ in calls}
    return [*groups.values(), *([layer] for layer in own if layer not in met)]


GAIN_PULL = 0.01
"""Of a norm's gain to what it was, as a share of the text: one number a channel needs hardly any."""

LEAST_GAIN = 0.05
"""Of a norm's mean gain: channels below it are all but closed."""


@dataclass(frozen=True)
class Linear:
    """A teacher's layer, or the part of it that the student kept: it gives weight · t + bias for what it was given.

    inputs_NP: t, in the pass's dtype; layers that share an input share the tensor.
    """

    inputs_NP: Tensor
    weight_OP: Tensor
    bias_O: Tensor | None


@dataclass
class Taught:
    """What a teacher's block shows.

    layers: what it takes to say what its layers give, by the layer's name in the block.
    outputs: of its writers [N, O], of all experts together, and of the norms behind writers, by name.
    experts: its modules of experts, with what they were given, by name.
    writers: what adds to the stream; None where that is not known.
    before_ND, after_ND: the stream before and after the whole span of blocks that the student's block stands for.
    """

    layers: dict[str, Linear]
    outputs: dict[str, Tensor]
    experts: dict[str, tuple[Experts, Routed]]
    writers: Sequence[Writer] | None
    before_ND: Tensor
    after_ND: Tensor


@dataclass
class TeacherStates:
    """The teacher's side of the walk: carries its states, and tells what each layer of a block should give.

    places: for each block of the student the teacher's block that it is, and at the end the number of the teacher's.
    probe: a few tokens, on which it is found out how a block works.
    """

    blocks: Walkable
    matrices: Mapping[nn.Module, list[Matrix]]
    places: list[int]
    batches: list[HiddenBatch]
    probe: HiddenBatch

    @property
    def beside(self) -> bool:
        """Whether each of its blocks is the student's block of the same number."""
        return self.places == list(range(len(self.places)))

    def advance(self, start: int, stop: int) -> None:
        """Run blocks start … stop - 1."""
        for at in range(start, stop):
            with self.blocks.at(at) as block:
                for batch in self.batches:
                    batch.states_BTD = run_block(block, batch, at)

    def through(self, index: int, ours: Mapping[str, Matrix]) -> Taught:
        """What the teacher's blocks show in place of the student's block `index`, and carry the states behind them.

        `ours` are the block's layers by name, without experts: only outputs that they have too are kept. The teacher's
        block must be held for as long as what is given is used.
        """
        at = self.places[index]
        block = self.blocks.items[at]
        own = {n: m for n, m in block.named_modules() if m in self.matrices and not is_stack(self.matrices[m])}
        layers = {n: m for n, m in own.items() if not holds_experts(self.matrices[m])}
        experts = {n: m for n, m in own.items() if n not in layers}
        writers, parts = writers_of(block, self.probe, at, self.matrices), dict(block.named_modules())
        norms = {w.given: parts[w.given] for w in writers or () if w.offset is not None}
        # what a writer gives is compared with streams; of every other layer its input says all, and is smaller
        written = {w.layer for w in writers or ()} & layers.keys()
        watched = [*(own[n] for n in written), *experts.values(), *norms.values()]
        sharing = groups_of(block, self.probe, at, self.matrices)
        first = {m: group[0] for group in sharing for m in group}
        into = list(dict.fromkeys(first[m] for n, m in layers.items() if n not in written))
        before_ND = real_states(self.batches)
        seen = look(block, self.batches, at, into=into, out_of=watched, experts=list(experts.values()))
        for batch, states_BTD in zip(self.batches, seen.states, strict=True):
            batch.states_BTD = states_BTD
        self.advance(at + 1, self.places[index + 1])
        alike = {
            n: _alike(seen.inputs[first[m]], ours[n], self.matrices[m][0])
            for n, m in layers.items()
            if n in ours and n not in written and first[m] in seen.inputs
        }
        kept = {
            n: _kept(seen.outputs[layers[n]], ours[n], self.matrices[layers[n]][0])
            for n in written
            if n in ours and layers[n] in seen.outputs
        } | {n: seen.outputs[m] for n, m in (experts | norms).items()}
        return Taught(
            {n: linear for n, linear in alike.items() if linear is not None},
            {n: y_NO for n, y_NO in kept.items() if y_NO is not None},
            {n: (Experts(m, self.matrices[m]), seen.routed[m]) for n, m in experts.items()},
            writers,
            before_ND,
            real_states(self.batches),
        )


def teacher_states(
    blocks: Walkable,
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
    probe = start(blocks, rollouts[:1], nullcontext())
    teacher = TeacherStates(blocks, modules_of_matrices(blocks.model), [*layer_map, depth], batches, probe)
    teacher.advance(0, layer_map[0])
    return teacher


def _kept(outputs_NP: Tensor, ours: Matrix, theirs: Matrix) -> Tensor | None:
    """Of the teacher's outputs those that a narrower layer kept."""
    if ours.out_features == theirs.out_features:
        return outputs_NP
    rows_O = infer_rows(ours.weight_OI, theirs.weight_OI)
    return None if rows_O is None else outputs_NP[:, rows_O]


def _alike(inputs_NP: Tensor, ours: Matrix, theirs: Matrix) -> Linear | None:
    """The same of a layer that is told by its input."""
    weight_OP, bias_O = theirs.weight_OI, theirs.bias_O
    if ours.out_features != theirs.out_features:
        rows_O = infer_rows(ours.weight_OI, weight_OP)
        if rows_O is None:
            return None
        weight_OP, bias_O = weight_OP[rows_O], None if bias_O is None else bias_O[rows_O]
    return Linear(inputs_NP, weight_OP, bias_O)


@dataclass(frozen=True)
class Wanted:
    """What a layer ought to give, its own bias taken off, and by what each token counts [N, 1] (None: alike).

    y: as numbers [N, O], or as what the teacher's layer makes of its inputs.
    """

    y: Tensor | Linear
    weight_N1: Tensor | None = None

    def weighed(self) -> Wanted:
        """Each token counted as it should."""
        assert isinstance(self.y, Tensor)
        assert self.weight_N1 is not None
        return Wanted(self.y * self.weight_N1)


def crossed(
    wanted: Sequence[Wanted | None], x_NI: Tensor, precision: AbstractContextManager[object] | None
) -> tuple[Tensor | None, ...]:
    """Σ y xᵀ, float32 [O, I], of layers that read the same x [N, I], float32.

    Where y is linear in a teacher's inputs t, that is weight · Σ t xᵀ + bias · Σ xᵀ, and the layers share the sums over
    tokens.
    """
    shared: dict[int, Tensor] = {}

    def one(y: Tensor | Linear) -> Tensor:
        if isinstance(y, Tensor):
            return products(y, x_NI, precision)
        if id(y.inputs_NP) not in shared:
            shared[id(y.inputs_NP)] = products(y.inputs_NP.float(), x_NI, precision)
        cross_OI = y.weight_OP.float() @ shared[id(y.inputs_NP)]
        return cross_OI if y.bias_O is None else cross_OI + torch.outer(y.bias_O.float(), x_NI.sum(0))

    return tuple(None if want is None else one(want.y) for want in wanted)


class Targets:
    """What the layers of one block ought to give, from the teacher's outputs and streams.

    A writer ought to give what is missing in the stream: the teacher's there, minus the student's so far. Where a norm
    follows, only the direction of what the layer gives matters, and each token counts by what the norm makes of it: the
    layer ought to give the direction that the norm turns into what is missing, as large as the teacher gives it; and
    then the norm's gain is fitted to what the layer gives by now.

    modules: the block's, by name.
    matrices: the modules that hold matrices.
    before_ND: the student's stream before the block.
    beside: whether the teacher's blocks are the student's, one by one. Where they are not, and it is not known what
        adds to the stream, nothing can be said of what a layer ought to give: the teacher's stands elsewhere.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        matrices: Mapping[nn.Module, object],
        taught: Taught,
        before_ND: Tensor,
        *,
        beside: bool,
    ) -> None:
        self.known = taught.writers is not None
        fitted = self.known or beside
        own = {n: m for n, m in modules.items() if m in matrices}
        self._layers = {m: taught.layers[n] for n, m in own.items() if fitted and n in taught.layers}
        self._given = {m: taught.outputs.get(n) if fitted else None for n, m in own.items()}
        self._before_ND = before_ND
        self._writers: dict[nn.Module, Writer] = {}
        self._stream: dict[nn.Module, Tensor] = {}
        self._missing: dict[nn.Module, Tensor] = {}
        self._modules = modules
        self.written: dict[nn.Module, float] = {}
        writers, same_width = taught.writers or (), before_ND.shape == taught.before_ND.shape
        if same_width and all(w.given in taught.outputs for w in writers):
            stream_ND = taught.before_ND
            for writer in writers:
                layer = modules[writer.layer]
                stream_ND = stream_ND + writer.share * taught.outputs[writer.given]
                self._stream[layer], self._writers[layer] = stream_ND, writer
            if writers:
                self._stream[layer] = taught.after_ND  # of the whole span, removed blocks included

    def wanted(self, matrix: Matrix, written: Mapping[nn.Module, Tensor]) -> Wanted | None:
        """For a layer; None where it is not known. `written`: what the modules of `self.written` gave."""
        layer = matrix.module
        linear = self._layers.pop(layer, None)
        if linear is not None:
            return Wanted(_without_bias(linear, matrix)) if len(linear.weight_OP) == matrix.out_features else None
        y_NO, weight_N1 = self._given.pop(layer), None  # asked for once
        if layer in self._stream:
            writer = self._writers[layer]
            so_far = sum(share * written[m].float() for m, share in self.written.items())
            missing_ND = (self._stream[layer] - self._before_ND - so_far) / writer.share
            if writer.offset is None:
                y_NO = missing_ND
            elif y_NO is not None:
                norm, self._missing[layer] = self._modules[writer.given], missing_ND
                y_NO, weight_N1 = _through(norm, writer.offset, missing_ND, y_NO.float())
            self.passed(layer)
        if y_NO is None or y_NO.shape[1] != matrix.out_features:
            return None
        y_NO = y_NO.float() if matrix.bias_O is None else y_NO.float() - matrix.bias_O.float()
        return Wanted(y_NO, weight_N1)

    def passed(self, module: nn.Module) -> None:
        """Note that a module has its weights: what it writes into the stream is no longer missing there."""
        if module in self._stream:
            writer = self._writers[module]
            self.written[self._modules[writer.given]] = writer.share

    def norm_behind(self, layer: nn.Module) -> nn.Module | None:
        """The norm through which a layer writes."""
        writer = self._writers.get(layer)
        return None if writer is None or writer.offset is None else self._modules[writer.given]

    def refit_norm(self, matrix: Matrix, inputs_NI: Tensor) -> None:
        """Fit the gain of the norm behind a layer, each channel by itself, to what is missing by now; in place."""
        missing_ND, norm = self._missing.pop(matrix.module, None), self.norm_behind(matrix.module)
        if missing_ND is None or norm is None:
            return
        offset = self._writers[matrix.module].offset or 0.0
        y_ND = applied(matrix, inputs_NI).float()
        y_ND = y_ND / sizes(norm, y_ND)
        energy_D, pull = y_ND.square().sum(0), GAIN_PULL
        gain_D = ((y_ND * missing_ND).sum(0) + pull * energy_D * gain_of(norm, offset)) / ((1 + pull) * energy_D)
        kept_D = energy_D > 0
        weight: Tensor = norm.weight  # type: ignore[assignment]
        weight[kept_D] = (gain_D - offset)[kept_D].to(weight.dtype)


def _without_bias(linear: Linear, ours: Matrix) -> Linear:
    if ours.bias_O is None:
        return linear
    bias_O = -ours.bias_O.float() if linear.bias_O is None else linear.bias_O.float() - ours.bias_O.float()
    return replace(linear, bias_O=bias_O)


def _through(norm: nn.Module, offset: float, missing_ND: Tensor, taught_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer ought to give so that the norm behind it gives what is missing, and each token's weight.

    taught_ND: what the teacher's layer gives: its size is kept, and its direction in channels that the norm all but
        closes, which say nothing.
    """
    gain_D, size_N1 = gain_of(norm, offset), sizes(norm, taught_ND)
    open_D = gain_D.abs() > LEAST_GAIN * gain_D.square().mean().sqrt()
    u_ND = torch.where(open_D, missing_ND / torch.where(open_D, gain_D, 1.0), taught_ND / size_N1)
    length_N1, taught_N1 = (t_ND.square().mean(-1, keepdim=True).sqrt() for t_ND in (u_ND, taught_ND))
    length_N1 = length_N1.clamp_min(1e-12)
    return u_ND / length_N1 * taught_N1, length_N1.sqrt() / size_N1
