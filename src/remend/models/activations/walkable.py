"""Whether a model can be walked block by block, found out on a few tokens before any work is spent.

The walk runs blocks by themselves on what the model's own pass gives them, and takes it that it knows which rows of a
layer's input are which token's. Here that is tried: the blocks one by one give what the model's own pass gives, a layer
sees of a sequence in a padded batch what it sees of it alone, and experts give what their matrices say. So a model that
computes in another way is refused by name, and never calibrated on the wrong tokens.

Legend: B batch, T time, D width of the residual stream.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from remend.errors import InputError
from remend.models.activations.experts import Experts, Given, Keywords, routing
from remend.models.activations.passes import (
    INSTEAD,
    HiddenBatch,
    Walkable,
    first_given,
    first_of,
    real_rows,
    run_block,
    start,
)
from remend.models.activations.stacks import inputs_of
from remend.models.layers import decoder_layers
from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack

LONG, SHORT = 8, 5
"""Tokens of the two sequences that are tried."""

CLOSE, CLOSE_ENOUGH = 1e-3, 0.05
"""Largest relative difference, in float32 and in shorter types, of what ought to be equal. Other tokens differ by 1."""


_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
"""In the name of a layer that only the tokens of its expert reach, where experts are modules of their own."""


def modules_of_matrices(model: CausalLM) -> dict[nn.Module, list[Matrix]]:
    """The modules that hold the decoder's matrices, each with its own: one, or those of all its experts."""
    kept: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices(model).values():
        kept.setdefault(matrix.module, []).append(matrix)
    return kept


def holds_experts(own: Sequence[Matrix]) -> bool:
    """Whether these matrices of one module are those of experts that transformers calls in its common way."""
    return own[0].expert is not None and hasattr(own[0].module, "is_transposed")


def is_stack(own: Sequence[Matrix]) -> bool:
    """Whether these matrices of one module are several that the model's own code multiplies."""
    return own[0].expert is not None and not holds_experts(own)


def sees_some(name: str) -> bool:
    """Whether a layer of this name is one expert's, which only its own tokens reach."""
    return bool(_ONE_EXPERT.search(name))


@torch.no_grad()
def blocks_of(model: CausalLM, text: Sequence[Sequence[int]]) -> Walkable:
    """The model's blocks, once it is sure that the walk sees what the model computes.

    Args:
        model: any.
        text: token ids of some sequences; of the first and the last a few tokens are tried.

    Raises:
        InputError: the model can't be walked; why, and what needs no walk.
    """
    items, parts = list(decoder_layers(model)), modules_of_matrices(model)
    long, short = tuple(text[0][:LONG]), tuple(text[-1][:SHORT])
    rows = [Rollout("long", long, (), False), Rollout("short", short, (), False)]
    own = _own_pass(model, items, parts, rows)
    _once_each(model, parts, own, len(items), torch.Size((len(rows), max(len(long), len(short)))))
    inside = {m for block in items for m in block.modules()}
    blocks = Walkable(
        model,
        items,
        gives=tuple(len(output) if isinstance(output, (tuple, list)) else None for output in own.gave),
        before=tuple(m for m, block in own.outside if block < 0),
        after=tuple(m for m, block in own.outside if block >= 0),
        idle=tuple(m for m in parts if m not in inside and not own.calls[m]),
    )
    names = {m: n for n, m in model.named_modules()}
    batch, alone = start(blocks, rows, nullcontext()), [start(blocks, [row], nullcontext()) for row in rows]
    partly, proven = False, set[type]()
    for index in range(len(items)):
        with blocks.at(index) as block:
            for at, single in enumerate(alone):
                single.states_BTD = batch.states_BTD[at : at + 1, : single.tokens_BT.shape[1]]
            seen, given = _given_to(block, index, batch, parts)
            apart, by_itself = zip(*(_given_to(block, index, single, parts) for single in alone), strict=True)
            if _differ(first_of(own.gave[index])[batch.real_BT], given[batch.real_BT]):
                raise _refusal(model, f"computes more between its blocks than hidden states (at block {index})")
            # where numbers are short, a token between two experts may go to either
            exact = given.dtype == torch.float32
            if exact and any(_differ(ours[0], given[at, : ours.shape[1]]) for at, ours in enumerate(by_itself)):
                raise _refusal(
                    model, f"computes of a sequence in a batch something else than of it alone (block {index})"
                )
            for module in (m for m in block.modules() if m in parts):
                if holds_experts(parts[module]):
                    if module not in seen:
                        raise _refusal(model, f"runs the experts of {names[module]} in one kernel")
                    if type(module) not in proven and not _explained(Experts(module, parts[module]), seen[module]):
                        raise _refusal(model, f"makes of the products of {names[module]} what remend does not know")
                    proven.add(type(module))
                elif is_stack(parts[module]):
                    seen_of_stack = inputs_of(parts[module], block, alone, index)
                    unseen = {m.parameter for m in parts[module]} - {m.parameter for m in seen_of_stack}
                    if unseen:
                        raise _refusal(model, f"multiplies {min(unseen)} in a way that remend does not see")
                    partly = True
                elif sees_some(names[module]):
                    partly = True
                elif module in seen and _mixed(seen[module], [other.get(module) for other in apart], batch, alone):
                    raise _refusal(model, f"does not give {names[module]} each token once, in their order")
            batch.states_BTD = given
    return replace(blocks, alone=partly)


def seen_of_skeleton(model: CausalLM) -> str | None:
    """Why a model without weights (on the meta device) can't be walked, or None, as far as shapes alone tell.

    A model whose pass asks for numbers tells nothing; `blocks_of` tries it once it is loaded.
    """
    rows = [Rollout(str(length), tuple(range(1, length + 1)), (), False) for length in (LONG, SHORT)]
    try:
        items, parts = list(decoder_layers(model)), modules_of_matrices(model)
        # transformers asks its tensors for fewer numbers then
        with _unlogged("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True):
            own = _own_pass(model, items, parts, rows)
        _once_each(model, parts, own, len(items), torch.Size((len(rows), LONG)))
    except InputError as error:
        return str(error)
    except Exception:  # of the model's own code nothing is known, nor what of it runs without numbers
        return None
    return None


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Without what the logger of that name writes: torch tells of each kernel that has no rule for shapes."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@dataclass
class _OwnPass:
    """What a plain pass of the model showed: blocks in order and what they gave, how often each module ran."""

    order: list[int] = field(default_factory=list)
    gave: list[object] = field(default_factory=list)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    uses: Counter[int] = field(default_factory=Counter)  # by the address of a matrix, which modules may share
    outside: list[tuple[nn.Module, int]] = field(default_factory=list)  # with the last block before it


def _own_pass(
    model: CausalLM, items: Sequence[nn.Module], parts: Mapping[nn.Module, list[Matrix]], rows: Sequence[Rollout]
) -> _OwnPass:
    own, inside = _OwnPass(), {m for block in items for m in block.modules()}
    addresses = {_address(matrices) for matrices in parts.values()}
    holders = {  # those that share another's weights are none of `parts`
        module: _place(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if _place(parameter) in addresses and parameter.ndim > 1
    }

    def note_block(block: nn.Module, args: object, output: object) -> None:
        own.order.append(next(i for i, item in enumerate(items) if item is block))
        own.gave.append(output)

    def note_module(module: nn.Module, args: object) -> None:
        own.calls[module] += 1
        if module not in parts or not is_stack(parts[module]):  # its code may call a stack once an expert
            own.uses[holders[module]] += 1
        if module not in inside and module in parts:
            own.outside.append((module, max(own.order, default=-1)))

    with ExitStack() as hooks:
        for block in items:
            hooks.callback(block.register_forward_hook(note_block).remove)
        for module in holders:
            hooks.callback(module.register_forward_pre_hook(note_module).remove)
        tokens_BT = pack([(r.prompt, r.completion) for r in rows], device=model.device).tokens_BT
        with torch.no_grad():
            model.base_model(input_ids=tokens_BT, use_cache=False)
    return own


def _address(own: Sequence[Matrix]) -> int:
    """The same for modules that share a matrix."""
    return _place(getattr(own[0].module, own[0].parameter.rpartition(".")[2]))


def _place(parameter: Tensor) -> int:
    return id(parameter) if parameter.is_meta else parameter.data_ptr()  # without weights there is no address


def _once_each(
    model: CausalLM, parts: Mapping[nn.Module, list[Matrix]], own: _OwnPass, blocks: int, shape: torch.Size
) -> None:
    if own.order != list(range(blocks)):
        raise _refusal(model, "does not run each of its blocks once, in their order")
    for output in own.gave:
        states = first_of(output)
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != shape:
            what = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise _refusal(model, f"has blocks that give {what} in place of hidden states [batch, time, width]")
    names = {_address(parts[m]): n for n, m in reversed(list(model.named_modules())) if m in parts}
    again = [f"{names[address]} ({count} times)" for address, count in own.uses.items() if count > 1]
    if again:
        more = f" and {len(again) - 3} more" if len(again) > 3 else ""
        raise _refusal(model, f"runs layers several times a pass, {', '.join(again[:3])}{more}")


@dataclass
class _Met:
    """What one module was given, and what a module of experts gave."""

    given: tuple[Tensor, ...]
    gave: Tensor | None = None


def _given_to(
    block: nn.Module, index: int, batch: HiddenBatch, parts: Mapping[nn.Module, list[Matrix]]
) -> tuple[dict[nn.Module, _Met], Tensor]:
    """What the block's modules with matrices are given in a pass over the batch, and what the block gives."""
    met: dict[nn.Module, _Met] = {}

    def note(module: nn.Module, args: Given, keywords: Keywords, output: Tensor) -> None:
        if holds_experts(parts[module]):
            met[module] = _Met(routing(module, args, keywords), output.clone())
        elif not is_stack(parts[module]):
            met[module] = _Met((first_given(args, keywords).clone(),))

    with ExitStack() as hooks:
        for module in (m for m in block.modules() if m in parts):
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        states_BTD = run_block(block, batch, index)
    return met, states_BTD


def _mixed(together: _Met, apart: Sequence[_Met | None], batch: HiddenBatch, alone: Sequence[HiddenBatch]) -> bool:
    """Whether what a layer sees in a batch is not, row by row, what it sees of the sequences by themselves."""
    if any(met is None for met in apart):
        return True
    try:
        ours = real_rows(together.given[0], batch.real_BT)
        theirs = [real_rows(met.given[0], one.real_BT) for met, one in zip(apart, alone, strict=True) if met]
    except InputError:
        return True
    return _differ(ours, torch.cat(theirs))


def _explained(experts: Experts, met: _Met) -> bool:
    """Whether a module of experts gave what follows from its matrices."""
    states, chosen, shares = (t.reshape(-1, t.shape[-1]) for t in met.given)
    assert met.gave is not None
    same = chosen.shape == shares.shape and len(chosen) == len(states)
    return same and not _differ(experts.output(states, chosen, shares), met.gave.reshape(states.shape))


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    """By more than rounding; of numbers that are not finite nothing is said here."""
    if ours.shape != theirs.shape:
        return True
    most = CLOSE if ours.dtype == theirs.dtype == torch.float32 else CLOSE_ENOUGH
    gap, size = float((ours.float() - theirs.float()).norm()), float(theirs.float().norm())
    return gap > most * size


def _refusal(model: CausalLM, why: str) -> InputError:
    return InputError(f"{type(model).__name__} {why}, {INSTEAD}")
