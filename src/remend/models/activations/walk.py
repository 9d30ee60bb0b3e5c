"""What a model's layers see on calibration text: inputs, Gram matrices and targets, block after block.

Closed-form methods (GPTQ, SparseGPT, Wanda, least squares) need Σ x xᵀ over the inputs x of every linear layer. The
walk goes through the decoder once: before a group of layers that read one input is visited, everything in front of it
has been changed already, so each group compensates what the ones before it got wrong ("true-sequential" in GPTQ's
code, arXiv 2210.17323).

With a teacher the walk carries the teacher's hidden states along and also gives Σ y xᵀ, y being what the layer ought
to put out. For a layer that writes into the residual stream y is what is missing there: the teacher's stream after the
block minus the student's stream so far. So a later layer can make good what an earlier one lost, and the layer before
removed blocks takes over what they did.

Legend: N real tokens (no padding), D width of the residual stream, I inputs and O outputs of a linear layer, B batch,
T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from remend.console import stage
from remend.data.order import derive_seed
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.models.activations.passes import Settled, hidden_batches, look, products, real_states, run_block, start
from remend.models.activations.targets import Targets, anatomy_of, teacher_states
from remend.models.layers import decoder_layers
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Draws, Rollout


@dataclass(frozen=True)
class Sites:
    """Matrices of one block that read the same input.

    index: the block, counted in the model that is walked.
    matrices: in order of execution.
    gram_II: float32, Σ x xᵀ over the N calibration tokens.
    cross_OI: with a teacher, for each layer Σ y xᵀ, where y is what the layer should give (its bias taken off); None
        for a layer whose outputs are not all among the teacher's.
    rows: N.
    """

    index: int
    matrices: tuple[Matrix, ...]
    gram_II: Tensor
    cross_OI: tuple[Tensor | None, ...] | None
    rows: int


@torch.no_grad()
def completions(
    reference: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    seed: int,
    shared: int | None = None,
) -> list[Rollout]:
    """The reference's own answers to prompts, sampled at temperature 1: the text that it lives on.

    Only ids below `shared` are sampled; None is the reference's whole vocabulary.

    Raises InputError when there is no prompt.
    """
    if not prompts:
        raise InputError("the calibration set is empty; give at least one prompt")
    title = "the reference writes calibration text"
    seeds = [derive_seed(seed, "calibration", i) for i in range(len(prompts))]
    return answer(
        reference, tokenizer, prompts, title, max_new_tokens=max_new_tokens, shared=shared, draws=Draws(1.0, seeds)
    )


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
) -> None:
    """Visit every group of linear layers of the decoder, each with what it sees after the changes in front of it.

    Args:
        model: walked, and changed by `visit`, which may write into `weight_OI` of a matrix.
        rollouts: calibration text; prompts and completions both count.
        visit: called once a group, in order of execution.
        teacher: a healthy model with the same kinds of blocks; then Sites.cross_OI is given, and what all prompts of a
            forward pass open with counts once in it: repeated, it would outweigh what differs.
        layer_map: for each block of `model` the teacher's block that it is; by default the same numbers.
        precision: context of the forward passes and sums; what `visit` does is outside it. None changes nothing.
        title: of the progress bar.

    Raises:
        InputError: blocks or inputs that can't be found; a layer map that does not fit.
    """
    blocks = decoder_layers(model)
    by_module = {matrix.module: matrix for matrix in matrices(model).values()}
    healthy, how = None, precision or nullcontext()
    if teacher is not None:
        healthy = teacher_states(teacher, rollouts, layer_map if layer_map is not None else range(len(blocks)), how)
    probe = start(model, blocks, rollouts[:1], nullcontext())
    batches = hidden_batches(model, rollouts, how, once=healthy is not None)
    with stage(title, len(blocks)) as advance:
        for index, block in enumerate(blocks):
            anatomy = anatomy_of(block, probe, index)
            targets = Targets(block, anatomy, *healthy.through(index, block), real_states(batches)) if healthy else None
            settled = Settled(block)
            for group in anatomy.groups:
                fresh = [w for w in targets.written if w not in settled.written] if targets else []
                seen = look(block, batches, index, into=group[:1], out_of=fresh, stop_at=group[0], settled=settled)
                settled.written.update(seen.outputs)
                x_NI, cross = seen.inputs[group[0]].float(), None
                if targets:
                    wanted = (targets.wanted(m, settled.written) for m in group)
                    cross = tuple(None if y_NO is None else products(y_NO, x_NI, precision) for y_NO in wanted)
                gram_II = products(x_NI, x_NI, precision)
                visit(Sites(index, tuple(by_module[m] for m in group), gram_II, cross, len(x_NI)))
                settled.visited.update(group)
            for number, batch in enumerate(batches):
                with settled.at(number):
                    batch.states_BTD = run_block(block, batch, index)
            advance()


@torch.no_grad()
def block_states(model: CausalLM, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block its number, and the residual stream before and after it: float32 [N, D], real tokens only."""
    batches = hidden_batches(model, rollouts, nullcontext())
    for index, block in enumerate(decoder_layers(model)):
        before_ND = real_states(batches)
        for batch in batches:
            batch.states_BTD = run_block(block, batch, index)
        yield index, before_ND, real_states(batches)
