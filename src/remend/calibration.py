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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remend.answers import answer
from remend.errors import InputError
from remend.layer_map import decoder_layers, infer_rows
from remend.progress import stage
from remend.prompts import Encoded
from remend.replay import Settled
from remend.rollout import Rollout, derive_seed
from remend.scoring import pack
from remend.sums import products

BATCH_TOKENS = 2048
"""Tokens a forward pass of one block: large enough for good products, small enough for a laptop."""


@dataclass(frozen=True)
class Sites:
    """Linear layers of one block that read the same input.

    index: the block, counted in the model that is walked.
    names, layers: full module names and the modules, in order of execution.
    gram_II: float32, Σ x xᵀ over the N calibration tokens.
    cross_OI: with a teacher, for each layer Σ y xᵀ, where y is what the layer should give (its bias taken off); None
        for a layer whose outputs are not all among the teacher's.
    rows: N.
    """

    index: int
    names: tuple[str, ...]
    layers: tuple[nn.Linear, ...]
    gram_II: Tensor
    cross_OI: tuple[Tensor | None, ...] | None
    rows: int


@torch.no_grad()
def completions(
    reference: Any,
    tokenizer: Any,
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
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "seeds": seeds, "shared": shared}
    return answer(reference, tokenizer, prompts, title, **settings)


@dataclass
class _Batch:
    """Hidden states of some sequences at one point of the model, and which of their positions are real."""

    states_BTD: Tensor
    real_BT: Tensor
    keywords: list[dict[str, Any]]  # what each block gets beside the hidden states
    precision: AbstractContextManager[Any]  # of forward passes


@torch.no_grad()
def _batches(
    model: Any, rollouts: Sequence[Rollout], pad_id: int, precision: AbstractContextManager[Any], once: bool = False
) -> list[_Batch]:
    blocks, result = decoder_layers(model), []
    order = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.completion))
    rows: list[Rollout] = []
    for rollout in order:
        if rows and (len(rows) + 1) * (len(rollout.prompt) + len(rollout.completion)) > BATCH_TOKENS:
            result.append(_start(model, blocks, rows, pad_id, precision, once))
            rows = []
        rows.append(rollout)
    return [*result, _start(model, blocks, rows, pad_id, precision, once)]


def _start(
    model: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Rollout],
    pad_id: int,
    precision: AbstractContextManager[Any],
    once: bool = False,
) -> _Batch:
    """What enters the first block, and each block's keywords: the model runs with its blocks passing states through.

    `once`: what all prompts open with (a system prompt) is real in the first row only.
    """
    pairs = [(r.prompt, r.completion) for r in rows]
    tokens_BT = pack(pairs, pad_id=pad_id, device=model.device).tokens_BT
    lengths = torch.tensor([len(p) + len(c) for p, c in pairs], device=model.device)
    real_BT = torch.arange(tokens_BT.shape[1], device=model.device) < lengths[:, None]
    if once:
        same_T = (tokens_BT == tokens_BT[:1]).all(dim=0).long().cumprod(0)
        real_BT[1:, : min(int(same_T.sum()), *(len(p) for p, _ in pairs))] = False
    first: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def record(states_BTD: Tensor, **given: Any) -> Tensor:
        first.append(states_BTD)
        keywords.append(given)
        return states_BTD

    with _replaced(blocks, record):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return _Batch(first[0], real_BT, keywords, precision)


@contextmanager
def _replaced(blocks: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Stop(Exception):
    """Raised from a hook: what lies behind it need not be computed."""


def _run(block: nn.Module, batch: _Batch, index: int) -> Tensor:
    with batch.precision:
        output = block(batch.states_BTD, **batch.keywords[index])
    states_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return states_BTD


@dataclass
class _Seen:
    """What one pass through a block showed: inputs and outputs by layer [N, …] in the pass's dtype, what it gives."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    states: list[Tensor]


def _look(
    block: nn.Module,
    batches: Sequence[_Batch],
    index: int,
    *,
    into: Sequence[nn.Module] = (),
    out_of: Sequence[nn.Module] = (),
    stop_at: nn.Module | None = None,
    settled: Settled | None = None,
) -> _Seen:
    """Run the block and keep inputs of `into` and outputs of `out_of`; nothing behind `stop_at`'s input is computed."""
    inputs: dict[nn.Module, list[Tensor]] = {m: [] for m in into}
    outputs: dict[nn.Module, list[Tensor]] = {m: [] for m in out_of}
    states = []
    for number, batch in enumerate(batches):
        real_BT = batch.real_BT

        def on_input(layer: nn.Module, args: tuple[Tensor, ...], real_BT: Tensor = real_BT) -> None:
            inputs[layer].append(args[0][real_BT])
            if layer is stop_at:
                raise _Stop

        def on_output(layer: nn.Module, args: Any, output: Tensor, real_BT: Tensor = real_BT) -> None:
            outputs[layer].append(output[real_BT])

        with ExitStack() as hooks:
            for layer in into:
                hooks.callback(layer.register_forward_pre_hook(on_input).remove)
            for layer in out_of:
                hooks.callback(layer.register_forward_hook(on_output).remove)
            with suppress(_Stop), settled.at(number) if settled else nullcontext():
                states.append(_run(block, batch, index))
    found = {**inputs, **outputs}
    if any(len(parts) != len(batches) for parts in found.values()):
        raise InputError(
            "calibration did not reach a layer once a pass: layers that see some tokens only (experts) "
            "can't be calibrated; use a method without calibration"
        )
    joined = [{m: torch.cat(kind.pop(m)) for m in list(kind)} for kind in (inputs, outputs)]  # parts go one by one
    return _Seen(joined[0], joined[1], states)


@dataclass(frozen=True)
class _Anatomy:
    """A block's linear layers: `groups` share an input, in order of execution; `writers` add to the residual stream."""

    groups: list[list[nn.Linear]]
    writers: list[nn.Linear]


def _anatomy(block: nn.Module, probe: _Batch, index: int) -> _Anatomy:
    """Find out by running the block on a few tokens. Writers are trusted only when they explain all that it adds."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, args[0], output))  # type: ignore[arg-type]

    with ExitStack() as hooks:
        for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
            hooks.callback(layer.register_forward_hook(note).remove)
        added_BTD = _run(block, probe, index) - probe.states_BTD
    groups: dict[int, list[nn.Linear]] = {}
    for layer, given, _ in calls:  # calls keeps the tensors alive, so no address is used twice
        groups.setdefault(given.data_ptr(), []).append(layer)
    alone = {group[0] for group in groups.values() if len(group) == 1}
    parts = [(layer, out) for layer, _, out in calls if layer in alone and out.shape == added_BTD.shape]
    explained = sum((out for _, out in parts), torch.zeros_like(added_BTD))
    close = float((added_BTD - explained).norm()) <= 1e-3 * float(added_BTD.norm())
    return _Anatomy(list(groups.values()), [layer for layer, _ in parts] if close else [])


def _real(batches: Sequence[_Batch]) -> Tensor:
    return torch.cat([b.states_BTD[b.real_BT].float() for b in batches])


class _Teacher:
    """The teacher's side of the walk: carries its states, and tells what each layer of a block should give."""

    def __init__(
        self,
        model: Any,
        rollouts: Sequence[Rollout],
        pad_id: int,
        layer_map: Sequence[int],
        precision: AbstractContextManager[Any],
    ) -> None:
        self.blocks = decoder_layers(model)
        if not layer_map or max(layer_map) >= len(self.blocks) or list(layer_map) != sorted(set(layer_map)):
            raise InputError(
                f"the layer map {list(layer_map)} does not fit a teacher of {len(self.blocks)} layers: it must rise "
                "and stay below that number"
            )
        self.map = [*layer_map, len(self.blocks)]
        self.batches = _batches(model, rollouts, pad_id, precision, once=True)
        self._advance(0, self.map[0])

    def _advance(self, start: int, stop: int) -> None:
        for at in range(start, stop):
            for batch in self.batches:
                batch.states_BTD = _run(self.blocks[at], batch, at)

    def block(self, index: int, ours: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Outputs that linear layers of `ours` have too, by name; the stream before and after the whole span [N, D]."""
        at = self.map[index]
        layers = {n: m for n, m in self.blocks[at].named_modules() if isinstance(m, nn.Linear)}
        before_ND = _real(self.batches)
        seen = _look(self.blocks[at], self.batches, at, out_of=list(layers.values()))
        for batch, states_BTD in zip(self.batches, seen.states, strict=True):
            batch.states_BTD = states_BTD
        self._advance(at + 1, self.map[index + 1])
        narrow = {n: m for n, m in ours.named_modules() if n in layers and isinstance(m, nn.Linear)}
        kept = {n: _kept(seen.outputs[layers[n]], m, layers[n]) for n, m in narrow.items()}
        return {n: y_NO for n, y_NO in kept.items() if y_NO is not None}, before_ND, _real(self.batches)


def _kept(outputs_NP: Tensor, ours: nn.Linear, theirs: nn.Linear) -> Tensor | None:
    """Of the teacher's outputs those that a narrower layer kept."""
    if ours.out_features == theirs.out_features:
        return outputs_NP
    rows_O = infer_rows(ours.weight, theirs.weight)
    return None if rows_O is None else outputs_NP[:, rows_O]


@torch.no_grad()
def walk(
    model: Any,
    rollouts: Sequence[Rollout],
    visit: Callable[[Sites], None],
    *,
    pad_id: int,
    teacher: Any = None,
    layer_map: Sequence[int] | None = None,
    precision: AbstractContextManager[Any] | None = None,
    title: str = "calibrating block by block",
) -> None:
    """Visit every group of linear layers of the decoder, each with what it sees after the changes in front of it.

    Args:
        model: walked, and changed by `visit`, which may write into `layer.weight`.
        rollouts: calibration text; prompts and completions both count.
        visit: called once a group, in order of execution.
        pad_id: any valid id.
        teacher: a healthy model with the same kinds of blocks; then Sites.cross_OI is given, and what all prompts of a
            forward pass open with counts once in it: repeated, it would outweigh what differs.
        layer_map: for each block of `model` the teacher's block that it is; by default the same numbers.
        precision: context of the forward passes and sums; what `visit` does is outside it. None changes nothing.
        title: of the progress bar.

    Raises:
        InputError: blocks or inputs that can't be found; a layer map that does not fit.
    """
    blocks = decoder_layers(model)
    names = {m: n for n, m in model.named_modules()}
    healthy, how = None, precision or nullcontext()
    if teacher is not None:
        healthy = _Teacher(teacher, rollouts, pad_id, layer_map if layer_map is not None else range(len(blocks)), how)
    probe = _start(model, blocks, rollouts[:1], pad_id, nullcontext())
    batches = _batches(model, rollouts, pad_id, how, once=healthy is not None)
    with stage(title, len(blocks)) as advance:
        for index, block in enumerate(blocks):
            anatomy = _anatomy(block, probe, index)
            targets = _Targets(block, anatomy, *healthy.block(index, block), _real(batches)) if healthy else None
            settled = Settled(block)
            for group in anatomy.groups:
                fresh = [w for w in targets.written if w not in settled.written] if targets else []
                seen = _look(block, batches, index, into=group[:1], out_of=fresh, stop_at=group[0], settled=settled)
                settled.written.update(seen.outputs)
                x_NI, cross = seen.inputs[group[0]].float(), None
                if targets:
                    wanted = (targets.wanted(m, settled.written) for m in group)
                    cross = tuple(None if y_NO is None else products(y_NO, x_NI, precision) for y_NO in wanted)
                gram_II = products(x_NI, x_NI, precision)
                visit(Sites(index, tuple(names[m] for m in group), tuple(group), gram_II, cross, len(x_NI)))
                settled.visited.update(group)
            for number, batch in enumerate(batches):
                with settled.at(number):
                    batch.states_BTD = _run(block, batch, index)
            advance()


class _Targets:
    """What the layers of one block ought to give, from the teacher's outputs and streams."""

    def __init__(
        self,
        block: nn.Module,
        anatomy: _Anatomy,
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


@torch.no_grad()
def block_states(model: Any, rollouts: Sequence[Rollout], pad_id: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block its number, and the residual stream before and after it: float32 [N, D], real tokens only."""
    batches = _batches(model, rollouts, pad_id, nullcontext())
    for index, block in enumerate(decoder_layers(model)):
        before_ND = _real(batches)
        for batch in batches:
            batch.states_BTD = _run(block, batch, index)
        yield index, before_ND, _real(batches)
