"""Forward passes of one block over calibration text that show what its layers were given and what they gave.

Legend: B batch, T time, D width of the residual stream, N real tokens (no padding), I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from remend.data.order import batches_by_length
from remend.errors import InputError
from remend.models.activations.experts import Given, Keywords, Routed, joined, routing
from remend.models.blocks import blocks_in
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack

BATCH_TOKENS = 2048
"""Tokens a forward pass of one block: large enough for good products, small enough for a laptop."""

ROWS = 2048
"""Tokens a product: its entries are rounded once where the passes run in bfloat16, and then added in float32."""

INSTEAD = (
    "so methods that go through it block by block can't be used (gptq, wanda, sparsegpt, blocks chosen by influence, "
    "repair); rtn and magnitude need no such walk, and recover does without it by repair: false"
)
"""The end of a sentence that says why a model can't be walked."""


@dataclass(frozen=True)
class Walkable:
    """A decoder's blocks, and what `walkable.blocks_of` found out about them.

    items: the blocks, each run once a pass.
    gives: for each block how many things its tuple holds; None where it gives the hidden states alone.
    before, after: modules with matrices that run before the first block, and after the last, in order of execution.
    idle: modules with matrices outside the blocks that no pass reaches.
    alone: some layers see no more than some of the tokens, so that only a batch without padding shows which.
    """

    model: CausalLM
    items: Sequence[nn.Module]
    gives: tuple[int | None, ...]
    before: tuple[nn.Module, ...] = ()
    after: tuple[nn.Module, ...] = ()
    idle: tuple[nn.Module, ...] = ()
    alone: bool = False

    def at(self, index: int) -> AbstractContextManager[nn.Module]:
        """Inside, a block has its weights, wherever they are kept."""
        return blocks_in(self.model).at(index)


@dataclass(frozen=True)
class Call:
    """How a block is called: what its caller gives beside the hidden states, and whether these come by name."""

    arguments: tuple[object, ...]
    keywords: Mapping[str, object]
    named: bool


@dataclass
class HiddenBatch:
    """Hidden states of some sequences at one point of the model, and which of their positions are real."""

    tokens_BT: Tensor
    states_BTD: Tensor
    real_BT: Tensor
    calls: Sequence[Call]  # one for each block
    precision: AbstractContextManager[object]  # of forward passes


@torch.no_grad()
def hidden_batches(
    blocks: Walkable,
    rollouts: Sequence[Rollout],
    precision: AbstractContextManager[object],
    *,
    once: bool = False,
    alone: bool = False,
) -> list[HiddenBatch]:
    """What enters the first block; `alone` puts each sequence into a batch of its own, and for `once` see `start`."""
    lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
    batches = [[i] for i in range(len(rollouts))] if alone else batches_by_length(lengths, tokens=BATCH_TOKENS)
    return [start(blocks, [rollouts[i] for i in batch], precision, once) for batch in batches]


def start(
    blocks: Walkable, rows: Sequence[Rollout], precision: AbstractContextManager[object], once: bool = False
) -> HiddenBatch:
    """What enters the first block, and each block's call: the model runs with its blocks passing states through.

    `once`: what all prompts open with (a system prompt) is real in the first row only.
    """
    pairs, device = [(r.prompt, r.completion) for r in rows], blocks.model.device
    tokens_BT = pack(pairs, device=device).tokens_BT
    lengths = torch.tensor([len(p) + len(c) for p, c in pairs], device=device)
    real_BT = torch.arange(tokens_BT.shape[1], device=device) < lengths[:, None]
    if once:
        same_T = (tokens_BT == tokens_BT[:1]).all(dim=0).long().cumprod(0)
        real_BT[1:, : min(int(same_T.sum()), *(len(p) for p, _ in pairs))] = False
    entered: list[Tensor] = []
    calls: list[Call] = []

    def record(index: int, states_BTD: Tensor, call: Call) -> Tensor:
        entered.append(states_BTD)
        calls.append(call)
        return states_BTD

    with _replaced(blocks, record):
        blocks.model.base_model(input_ids=tokens_BT, use_cache=False)
    return HiddenBatch(tokens_BT, entered[0], real_BT, calls, precision)


def outside(blocks: Walkable, batches: Sequence[HiddenBatch], module: nn.Module) -> Tensor:
    """What a module before the first block or after the last sees: [N, I]."""
    inputs: list[Tensor] = []
    for batch in batches:

        def pass_on(index: int, states_BTD: Tensor, call: Call, batch: HiddenBatch = batch) -> Tensor:
            return batch.states_BTD if index == len(blocks.items) - 1 else states_BTD

        def note(layer: nn.Module, args: Given, keywords: Keywords, batch: HiddenBatch = batch) -> None:
            inputs.append(real_rows(first_given(args, keywords), batch.real_BT))
            raise _Stop

        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with suppress(_Stop), _replaced(blocks, pass_on):
                blocks.model.base_model(input_ids=batch.tokens_BT, use_cache=False)
        finally:
            handle.remove()
    return torch.cat(inputs)


@contextmanager
def _replaced(blocks: Walkable, forward: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
    """The blocks give what `forward` does, in the form in which their caller expects it."""

    def instead(index: int, *args: Any, **keywords: Any) -> object:
        states, call = taken_apart(args, keywords)
        states_BTD, size = forward(index, states, call), blocks.gives[index]
        return states_BTD if size is None else (states_BTD, *[None] * (size - 1))

    with ExitStack() as undo:
        for index, block in enumerate(blocks.items):
            undo.enter_context(_forward(block, partial(instead, index)))
        yield


@contextmanager
def _forward(module: nn.Module, instead: Callable[..., object]) -> Iterator[None]:
    """The module runs something else. What a library put in place of its class's forward comes back afterwards."""
    before = module.__dict__.get("forward")
    module.forward = instead
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def taken_apart(args: Given, keywords: Keywords) -> tuple[Tensor, Call]:
    """The hidden states that a block was given, and the rest."""
    if args:
        return args[0], Call(args[1:], keywords, named=False)
    rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
    return keywords["hidden_states"], Call((), rest, named=True)


def first_given(args: Given, keywords: Keywords) -> Tensor:
    """What a layer multiplies: its first argument, by position or by name."""
    given: Tensor = args[0] if args else next(iter(keywords.values()))
    return given


def real_rows(tensor: Tensor, real_BT: Tensor) -> Tensor:
    """[N, W]: of a layer's inputs or outputs, whose last dimension is W, those of real tokens, token after token.

    Layers see [B, T, W], [B·T, W], or several rows a token: [B, T, heads, W], [B, heads, T, W], [B·T, heads, W].

    Raises InputError where it can't be told which rows are real.
    """
    width, (rows, time) = tensor.shape[-1], real_BT.shape
    if tensor.ndim > 2 and tensor.shape[:2] == real_BT.shape:
        return tensor[real_BT].reshape(-1, width)
    if tensor.ndim > 2 and tensor.shape[0] == rows and tensor.shape[-2] == time:
        return tensor[real_BT.view(rows, *[1] * (tensor.ndim - 3), time).expand(tensor.shape[:-1])]
    if tensor.shape[0] == rows * time:
        return tensor[real_BT.flatten()].reshape(-1, width)
    if bool(real_BT.all()) and rows == 1:
        return tensor.reshape(-1, width).clone()
    raise InputError(f"a layer is given {tuple(tensor.shape)} for {rows} sequences of {time} tokens; {INSTEAD}")


@dataclass(frozen=True)
class End:
    """Where a child of a block ends in a layer: what the child gives is what the layer gives.

    beside: how many times None stands behind that in the child's tuple; None where it gives no tuple.
    """

    child: nn.Module
    layer: nn.Module
    beside: int | None

    def given(self, inputs: Tensor, *_args: object, **_keywords: object) -> object:
        """What the child gives once the layer sees these inputs."""
        output = self.layer(inputs)
        return output if self.beside is None else (output, *[None] * self.beside)


def ends_of(block: nn.Module, probe: HiddenBatch, index: int, kept: Container[nn.Module]) -> list[End]:
    """The children of a block that end in a layer with matrices, found by running it.

    Args:
        block, index: of the model.
        probe: what enters the block, or anything like it.
        kept: the modules that hold matrices.
    """
    gave: dict[nn.Module, object] = {}
    with ExitStack() as hooks:
        for module in {*block.children(), *(m for m in block.modules() if m in kept)}:
            hooks.callback(module.register_forward_hook(lambda m, _args, output: gave.update({m: output})).remove)
        run_block(block, probe, index)
    ends = []
    for child in block.children():
        output = gave.get(child)
        rest = output[1:] if isinstance(output, tuple) else ()
        inner = [m for m in child.modules() if m in kept and m is not child]
        last = next((m for m in inner if m in gave and gave[m] is first_of(output)), None)
        if last is not None and isinstance(output, Tensor | tuple) and all(part is None for part in rest):
            ends.append(End(child, last, len(rest) if isinstance(output, tuple) else None))
    return ends


MOST_KEPT = 2**30
"""Bytes of inputs of a block's last layers that are kept; what is beyond that is computed again."""


class Settled:
    """Children of a block whose matrices have all been visited: each runs once more and is then replayed.

    Without this every later group of the block would pay for the attention before it again. A child that ends in a
    layer does not run once more: the layer's inputs were seen when it was visited. `written` keeps what the settled
    layers gave that write into the residual stream.
    """

    def __init__(self, block: nn.Module, kept: Container[nn.Module], ends: Sequence[End] = ()) -> None:
        self._inner = {c: {m for m in c.modules() if m in kept} for c in block.children()}
        self._ends = {end.layer: end for end in ends}
        self._kept: dict[tuple[nn.Module, int], Callable[..., object]] = {}
        self._free = MOST_KEPT
        self._given: dict[nn.Module, list[object]] = {}
        self.written: dict[nn.Module, Tensor] = {}
        self.visited: set[nn.Module] = set()

    def keep(self, layer: nn.Module, batch: int, inputs: Tensor) -> None:
        """Note what a layer that is about to be visited sees, padding and all."""
        end, size = self._ends.get(layer), inputs.numel() * inputs.element_size()
        if end is not None and size <= self._free:
            self._free -= size
            self._kept[end.child, batch] = partial(end.given, inputs)

    @contextmanager
    def at(self, batch: int) -> Iterator[None]:
        """Around the block's pass over one batch."""
        with ExitStack() as undo:
            for child, inner in self._inner.items():
                if not inner or not inner <= self.visited:
                    continue
                given = self._given.setdefault(child, [])
                if len(given) > batch:
                    undo.enter_context(_forward(child, partial(_replay, given[batch])))
                else:
                    if instead := self._kept.pop((child, batch), None):
                        undo.enter_context(_forward(child, instead))
                    hook = child.register_forward_hook(lambda _m, _a, out, given=given: given.append(_copied(out)))
                    undo.callback(hook.remove)
            yield


def _replay(output: object, *_args: object, **_keywords: object) -> object:
    return _copied(output)


def _copied(output: object) -> object:
    """A copy, since some blocks add to what a child gave in place (Falcon's)."""
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


class _Stop(Exception):
    """Raised from a hook: what lies behind it need not be computed."""


def run_block(block: nn.Module, batch: HiddenBatch, index: int) -> Tensor:
    """The hidden states after a block, which gets a copy: some blocks write into what they are given."""
    call, states_BTD = batch.calls[index], batch.states_BTD.clone()
    with batch.precision:
        if call.named:
            output = block(hidden_states=states_BTD, **call.keywords)
        else:
            output = block(states_BTD, *call.arguments, **call.keywords)
    given: Tensor = first_of(output)
    return given


def first_of(output: object) -> Any:
    """The hidden states among what a block gives: all of it, or the first of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


@dataclass
class Seen:
    """What one pass through a block showed, by module, in the pass's dtype; modules that no token reached are left out.

    inputs, outputs: [N, …] of layers.
    routed: what modules of experts were given.
    states: that the block gives, by batch.
    """

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    routed: dict[nn.Module, Routed]
    states: list[Tensor]


def look(
    block: nn.Module,
    batches: Sequence[HiddenBatch],
    index: int,
    *,
    into: Sequence[nn.Module] = (),
    out_of: Sequence[nn.Module] = (),
    experts: Sequence[nn.Module] = (),
    stop_at: nn.Module | None = None,
    settled: Settled | None = None,
) -> Seen:
    """Run the block and keep inputs of `into` and `experts` and outputs of `out_of`.

    Nothing behind `stop_at`'s input is computed.
    """
    inputs: dict[nn.Module, list[Tensor]] = {m: [] for m in into}
    outputs: dict[nn.Module, list[Tensor]] = {m: [] for m in out_of}
    routed: dict[nn.Module, list[Routed]] = {m: [] for m in experts}
    states = []
    for number, batch in enumerate(batches):
        real_BT = batch.real_BT

        def on_input(
            layer: nn.Module, args: Given, keywords: Keywords, real_BT: Tensor = real_BT, number: int = number
        ) -> None:
            if layer in routed:
                given = routing(layer, args, keywords)
                routed[layer].append(Routed(real_rows(given[0], real_BT), real_rows(given[1], real_BT)))
            else:
                inputs[layer].append(real_rows(first_given(args, keywords), real_BT))
            if layer is stop_at:
                if settled and layer in inputs:
                    settled.keep(layer, number, first_given(args, keywords))
                raise _Stop

        def on_output(layer: nn.Module, args: object, output: Tensor, real_BT: Tensor = real_BT) -> None:
            outputs[layer].append(real_rows(output, real_BT))

        with ExitStack() as hooks:
            for layer in (*into, *experts):
                hooks.callback(layer.register_forward_pre_hook(on_input, with_kwargs=True).remove)
            for layer in out_of:
                hooks.callback(layer.register_forward_hook(on_output).remove)
            with suppress(_Stop), settled.at(number) if settled else nullcontext():
                states.append(run_block(block, batch, index))
    return Seen(_joined(inputs), _joined(outputs), {m: joined(parts) for m, parts in routed.items()}, states)


def _joined(parts: dict[nn.Module, list[Tensor]]) -> dict[nn.Module, Tensor]:
    return {m: torch.cat(tensors) for m in list(parts) if (tensors := parts.pop(m))}  # parts go one by one


def real_states(batches: Sequence[HiddenBatch]) -> Tensor:
    return torch.cat([b.states_BTD[b.real_BT].float() for b in batches])


def products(outputs_NO: Tensor, inputs_NI: Tensor, precision: AbstractContextManager[object] | None = None) -> Tensor:
    """Σ y xᵀ over the tokens: float32 [O, I].

    A layer that multiplies in bfloat16 sees its inputs rounded to it, so the sum may as well; every partial sum is off
    by up to 2⁻⁹ of itself, far less than what other text changes.

    Args:
        outputs_NO, inputs_NI: float32.
        precision: context in which a product of two float32 matrices is taken on a CPU; None keeps float32, and so does
            a GPU, which is fast enough in it.
    """
    if precision is None or inputs_NI.device.type != "cpu":
        return outputs_NO.T @ inputs_NI
    total_OI = inputs_NI.new_zeros(outputs_NO.shape[1], inputs_NI.shape[1])
    for start in range(0, len(inputs_NI), ROWS):
        with precision:
            part_OI = torch.mm(outputs_NO[start : start + ROWS].T, inputs_NI[start : start + ROWS])
        total_OI += part_OI
    return total_OI


STRIPS = 4
"""Into so many a Gram matrix is cut, since what lies below its diagonal need not be multiplied: 5/8 of the work."""


def gram(inputs_NI: Tensor, precision: AbstractContextManager[object] | None = None) -> Tensor:
    """Σ x xᵀ over the tokens: float32 [I, I], symmetric; as `products` of the inputs with themselves."""
    if inputs_NI.device.type != "cpu":
        return inputs_NI.T @ inputs_NI
    width = inputs_NI.shape[1]
    strip, upper_II = -(-width // STRIPS), inputs_NI.new_zeros(width, width)
    for start in range(0, width, strip):
        upper_II[start : start + strip, start:] = products(
            inputs_NI[:, start : start + strip], inputs_NI[:, start:], precision
        )
    return upper_II.triu() + upper_II.triu(1).T
