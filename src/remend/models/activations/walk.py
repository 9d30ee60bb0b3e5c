"""What a model's layers see on calibration text: inputs, Gram matrices and targets, block after block.

Closed-form methods (GPTQ, SparseGPT, Wanda, least squares) need Σ x xᵀ over the inputs x of every linear layer. The
walk goes through the decoder once: before a group of layers that read one input is visited, everything in front of it
has been changed already, so each group compensates what the ones before it got wrong ("true-sequential" in GPTQ's
code, arXiv 2210.17323).

With a teacher the walk carries the teacher's hidden states along and also gives Σ y xᵀ, y being what the layer ought
to put out. For a layer that writes into the residual stream (`writers`) y is what is missing there: the teacher's
stream after the block minus the student's stream so far. So a later layer can make good what an earlier one lost, and
the layer before removed blocks takes over what they did.

Legend: N real tokens (no padding), D width of the residual stream, I inputs and O outputs of a linear layer, B batch,
T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from remend.console import stage
from remend.data.order import derive_seed
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.activations.apart import Apart, Change, apart_of, divided
from remend.models.activations.experts import Experts, Routed, applied
from remend.models.activations.passes import (
    HiddenBatch,
    Seen,
    Settled,
    ends_of,
    gram,
    hidden_batches,
    look,
    outside,
    products,
    real_states,
    run_block,
    start,
)
from remend.models.activations.stacks import inputs_of
from remend.models.activations.targets import Targets, TeacherStates, crossed, groups_of, teacher_states
from remend.models.activations.walkable import blocks_of, holds_experts, is_stack, modules_of_matrices, sees_some
from remend.models.matrices import Matrix
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Draws, Rollout
from remend.models.sampling.transformers_engine import ROWS


@dataclass(frozen=True)
class Sites:
    """Matrices of one block that read the same input; an expert's matrix stands alone.

    index: the block, counted in the model that is walked; for layers before the first it is -1, and for layers after
        the last their number.
    matrices: in order of execution.
    gram_II: float32, Σ x xᵀ over the N calibration tokens; with a teacher and a norm behind the layer, each token is
        weighed by what the norm makes of it.
    cross_OI: with a teacher, for each layer Σ y xᵀ, where y is what the layer should give (its bias taken off); None
        for a layer whose outputs are not all among the teacher's, and where nothing can be said of them.
    rows: N.
    """

    index: int
    matrices: tuple[Matrix, ...]
    gram_II: Tensor
    cross_OI: tuple[Tensor | None, ...] | None
    rows: int


@dataclass(frozen=True)
class Walked:
    """What a walk with a teacher found.

    unexplained: blocks of which it is not known what adds to the residual stream.
    held_back: blocks whose change did harm on the text held apart, and was taken back.
    unchanged: keys of all matrices whose change was taken back, by rounding too.
    apart: the error of the student's stream behind the last block on that text, before and after: the mean over its
        tokens of the squared distance to the teacher's, relative to the teacher's size. None without such text.
    beside: whether the teacher has each of the student's blocks in the same place. If so, the layers of the unexplained
        ones ought to give what the teacher's give; else nothing is said of what they ought to give.
    """

    unexplained: tuple[int, ...] = ()
    beside: bool = True
    held_back: tuple[int, ...] = ()
    unchanged: frozenset[str] = frozenset()
    apart: tuple[float, float] | None = None

    @property
    def worse(self) -> bool:
        """Whether the walk left the student farther away than it found it."""
        return self.apart is not None and self.apart[1] > self.apart[0]


@torch.no_grad()
def completions(
    reference: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    seed: int,
    shared: int | None = None,
    rows: int = ROWS,
) -> list[Rollout]:
    """The reference's own answers to prompts, sampled at temperature 1: the text that it lives on.

    Only ids below `shared` are sampled; None is the reference's whole vocabulary. `rows` are sampled at once.

    Raises InputError when there is no prompt.
    """
    if not prompts:
        raise InputError("the calibration set is empty; give at least one prompt")
    title = "the reference writes calibration text"
    seeds = [derive_seed(seed, "calibration", i) for i in range(len(prompts))]
    return answer(
        reference,
        tokenizer,
        prompts,
        title,
        max_new_tokens=max_new_tokens,
        shared=shared,
        draws=Draws(1.0, seeds),
        rows=rows,
    )


def check_walk(model: CausalLM, prompts: Sequence[Encoded]) -> None:
    """Raise InputError where `walk` and `block_states` would refuse the model, tried on a few tokens of the prompts."""
    if prompts:
        blocks_of(model, [prompt.tokens for prompt in prompts])


class Journal(Protocol):
    """What is kept of a walk block by block, so that a killed one goes on where it was."""

    def done(self, index: int) -> JsonObject | None:
        """What was told of a block that an earlier process settled, and that has its weights; None of any other."""

    def settle(self, index: int, block: nn.Module, about: JsonObject) -> None:
        """A block has its weights now; `about` says whether they are `kept` ones of the walk, and more."""

    def as_it_came(self) -> AbstractContextManager[None]:
        """Inside, the blocks have the weights that they had before any walk."""


@torch.no_grad()
def walk(
    model: CausalLM,
    rollouts: Sequence[Rollout],
    visit: Callable[[Sites], None],
    *,
    teacher: CausalLM | None = None,
    layer_map: Sequence[int] | None = None,
    precision: AbstractContextManager[object] | None = None,
    title: str = "calibrating block by block",
    journal: Journal | None = None,
) -> Walked:
    """Visit every group of linear layers of the decoder, each with what it sees after the changes in front of it.

    Args:
        model: walked, and changed by `visit`, which may write into `weight_OI` of a matrix.
        rollouts: calibration text; prompts and completions both count. With a teacher, some is held apart
            (`apart`): a block's change stays where its output on that comes no farther from what it ought to be.
        visit: called once a group, in order of execution.
        teacher: a healthy model with the same kinds of blocks; then Sites.cross_OI is given, and what all prompts of a
            forward pass open with counts once in it: repeated, it would outweigh what differs. A norm behind a layer
            that was visited is refitted in the model.
        layer_map: for each block of `model` the teacher's block that it is; by default the same numbers.
        precision: context of the forward passes and sums; what `visit` does is outside it. None changes nothing.
        title: of the progress bar.
        journal: told of each block; what it says was settled before is not visited again.

    Raises:
        InputError: a model whose blocks can't be run one by one (see `walkable`); a layer map that does not fit.
    """
    text = [[*r.prompt, *r.completion] for r in rollouts]
    rollouts, held = divided(rollouts) if teacher is not None else (rollouts, [])
    blocks, kept, how = blocks_of(model, text), modules_of_matrices(model), precision or nullcontext()
    depth, healthy, aside, alone, unexplained = len(blocks.items), None, None, blocks.alone, list[int]()
    if teacher is not None:
        theirs = blocks_of(teacher, text)
        alone = alone or theirs.alone
        placed = layer_map if layer_map is not None else range(depth)
        healthy = teacher_states(theirs, rollouts, placed, how, alone=alone)
        aside = teacher_states(theirs, held, placed, how, alone=alone) if held else None
    probe = start(blocks, rollouts[:1], nullcontext())
    batches = hidden_batches(blocks, rollouts, how, once=healthy is not None, alone=alone)
    apart: Apart | None = None
    if journal and (blocks.before or blocks.after):
        raise InputError(
            f"{type(model).__name__} has matrices outside of its blocks, which can't be repaired with the blocks on "
            "the disk; give placement: device, or repair: false"
        )
    if aside:
        with journal.as_it_came() if journal else nullcontext():
            apart = apart_of(blocks, hidden_batches(blocks, held, how, once=True, alone=alone), aside)

    def visit_outside(index: int, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            x_NI = outside(blocks, batches, module).float()
            visit(Sites(index, tuple(kept[module]), gram(x_NI, precision), None, len(x_NI)))

    if blocks.before:
        visit_outside(-1, blocks.before)
        probe = start(blocks, rollouts[:1], nullcontext())
        batches = hidden_batches(blocks, rollouts, how, once=healthy is not None, alone=alone)
        if apart:
            apart.batches = hidden_batches(blocks, held, how, once=True, alone=alone)
    with stage(title, depth) as advance:
        for index in range(depth):
            theirs_held = healthy.blocks.at(healthy.places[index]) if healthy else nullcontext()
            told = journal.done(index) if journal else None
            with blocks.at(index) as block, theirs_held:
                if told is not None:
                    own = [m for m in block.modules() if m in kept]
                    _go_on(index, block, batches, healthy, apart, told, own)
                    unexplained += [index] if told["unexplained"] else []
                    advance()
                    continue
                groups, parts = groups_of(block, probe, index, kept), dict(block.named_modules())
                inner = {n: m for n, m in parts.items() if m in kept}
                layers = {n: kept[m][0] for n, m in inner.items() if kept[m][0].expert is None}
                taught, targets = healthy.through(index, layers) if healthy else None, None
                if healthy and taught:
                    targets = Targets(parts, kept, taught, real_states(batches), beside=healthy.beside)
                    if not targets.known:
                        unexplained.append(index)
                settled, change = Settled(block, kept, ends_of(block, probe, index, kept)), Change()
                if apart:
                    apart.enter(index)
                for group in groups:
                    if apart:
                        change.add(group, kept, targets.norm_behind(group[0]) if targets else None)
                    if is_stack(kept[group[0]]):
                        for sites in _sites_of_stack(index, kept[group[0]], block, batches, settled, precision):
                            visit(sites)
                        settled.visited.update(group)
                        continue
                    experts = holds_experts(kept[group[0]])
                    fresh = [w for w in targets.written if w not in settled.written] if targets else []
                    seen = look(
                        block,
                        batches,
                        index,
                        into=[] if experts else group[:1],
                        out_of=fresh,
                        experts=group if experts else [],
                        stop_at=group[0],
                        settled=settled,
                    )
                    settled.written.update(seen.outputs)
                    if experts:
                        name = next(n for n, m in inner.items() if m is group[0])
                        their = taught.experts.get(name) if taught else None
                        for sites in _sites_of_experts(index, kept[group[0]], seen.routed[group[0]], their, precision):
                            visit(sites)
                        if targets:
                            targets.passed(group[0])
                    else:
                        visit(_sites_of(index, [kept[m][0] for m in group], seen, targets, settled.written, precision))
                        if targets and len(group) == 1 and group[0] in seen.inputs:
                            targets.refit_norm(kept[group[0]][0], seen.inputs[group[0]].float())
                    settled.visited.update(group)
                keeps = apart is None or apart.judge(index, change)
                for number, batch in enumerate(batches):
                    with settled.at(number) if keeps else nullcontext():
                        batch.states_BTD = run_block(block, batch, index)
                if journal:
                    about = apart.about(index, kept=keeps) if apart else {"kept": True}
                    journal.settle(index, block, {**about, "unexplained": index in unexplained})
                advance()
    visit_outside(depth, blocks.after)
    for module in blocks.idle:
        visit(_unseen(depth, kept[module][0]))
    found = Walked(tuple(unexplained), healthy is None or healthy.beside)
    if apart is None:
        return found
    unchanged = frozenset(m.key for module in apart.unchanged if module in kept for m in kept[module])
    return replace(found, held_back=tuple(apart.held_back), unchanged=unchanged, apart=apart.end())


def _go_on(
    index: int,
    block: nn.Module,
    batches: Sequence[HiddenBatch],
    healthy: TeacherStates | None,
    apart: Apart | None,
    told: JsonObject,
    own: Sequence[nn.Module],
) -> None:
    """Past a block that an earlier process settled."""
    for batch in batches:
        batch.states_BTD = run_block(block, batch, index)
    if healthy:
        healthy.advance(healthy.places[index], healthy.places[index + 1])
    if apart:
        apart.go_on(index, told, own)


def _sites_of(
    index: int,
    group: Sequence[Matrix],
    seen: Seen,
    targets: Targets | None,
    written: Mapping[nn.Module, Tensor],
    precision: AbstractContextManager[object] | None,
) -> Sites:
    if group[0].module not in seen.inputs:
        return _unseen(index, group[0])
    x_NI, cross = seen.inputs[group[0].module].float(), None
    if targets and not sees_some(group[0].name):
        wanted = [targets.wanted(matrix, written) for matrix in group]
        if len(wanted) == 1 and wanted[0] and wanted[0].weight_N1 is not None:  # others share the gram of their input
            x_NI, wanted = x_NI * wanted[0].weight_N1, [wanted[0].weighed()]
        cross = crossed(wanted, x_NI, precision)
    return Sites(index, tuple(group), gram(x_NI, precision), cross, len(x_NI))


def _unseen(index: int, matrix: Matrix) -> Sites:
    """A matrix that no token reached."""
    return Sites(index, (matrix,), torch.zeros(2 * [matrix.in_features], device=matrix.weight_OI.device), None, 0)


def _sites_of_stack(
    index: int,
    own: Sequence[Matrix],
    block: nn.Module,
    batches: Sequence[HiddenBatch],
    settled: Settled,
    precision: AbstractContextManager[object] | None,
) -> Iterator[Sites]:
    """The matrices of a stack, one parameter after the other: each sees what those before it give by then.

    What they ought to give is not known, since the teacher's code may send other tokens to them.
    """
    left = list(own)
    while left:
        seen = inputs_of(left, block, batches, index, settled)
        parameter = next(iter(seen), left[0]).parameter
        for matrix in [m for m in left if m.parameter == parameter]:
            if matrix not in seen or not len(seen[matrix]):
                yield _unseen(index, matrix)
                continue
            x_NI = seen[matrix].float()
            yield Sites(index, (matrix,), gram(x_NI, precision), None, len(x_NI))
        left = [m for m in left if m.parameter != parameter]


def _sites_of_experts(
    index: int,
    own: Sequence[Matrix],
    routed: Routed,
    taught: tuple[Experts, Routed] | None,
    precision: AbstractContextManager[object] | None,
) -> Iterator[Sites]:
    """Each expert's first matrix with the tokens that it got, and then, with what that one gives by then, its second.

    With a teacher each ought to give what the teacher's expert of the same number makes of the teacher's states at the
    same tokens, wherever the teacher's router would have sent them.
    """
    ours, how = Experts(own[0].module, own), precision or nullcontext()
    for second in (False, True):
        for matrix in ours.second if second else ours.first:
            assert matrix.expert is not None
            rows = routed.to(matrix.expert)
            x_NI, y_NO = routed.states_ND[rows], None
            with how:
                x_NI = ours.inner(matrix.expert, x_NI) if second else x_NI
                if taught and len(rows):
                    y_NO = _taught(*taught, matrix, second, rows)
            cross = None if y_NO is None else (products(y_NO, x_NI.float(), precision),)
            yield Sites(index, (matrix,), gram(x_NI.float(), precision), cross, len(rows))


def _taught(theirs: Experts, routed: Routed, matrix: Matrix, second: bool, rows: Tensor) -> Tensor | None:
    """[N, O]: what the teacher's expert gives at these tokens, our bias taken off; None where it has no like expert."""
    expert = matrix.expert
    healthy = theirs.second if second else theirs.first
    if expert is None or expert >= len(healthy) or healthy[expert].out_features != matrix.out_features:
        return None
    t_NI = routed.states_ND[rows]
    given = applied(healthy[expert], theirs.inner(expert, t_NI) if second else t_NI).float()
    return given if matrix.bias_O is None else given - matrix.bias_O.float()


@torch.no_grad()
def block_states(model: CausalLM, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block its number, and the residual stream before and after it: float32 [N, D], real tokens only."""
    blocks = blocks_of(model, [[*r.prompt, *r.completion] for r in rollouts])
    batches = hidden_batches(blocks, rollouts, nullcontext())
    for index in range(len(blocks.items)):
        before_ND = real_states(batches)
        with blocks.at(index) as block:
            for batch in batches:
                batch.states_BTD = run_block(block, batch, index)
        yield index, before_ND, real_states(batches)
