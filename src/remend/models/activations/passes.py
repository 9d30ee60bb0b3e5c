"""Forward passes of one block over calibration text that show what its layers were given and what they gave.

Legend: B batch, T time, D width of the residual stream, N real tokens (no padding), I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from remend.data.order import batches_by_length
from remend.errors import InputError
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import pack

BATCH_TOKENS = 2048
"""Tokens a forward pass of one block: large enough for good products, small enough for a laptop."""

ROWS = 2048
"""Tokens a product: its entries are rounded once where the passes run in bfloat16, and then added in float32."""


@dataclass
class HiddenBatch:
    """Hidden states of some sequences at one point of the model, and which of their positions are real."""

    states_BTD: Tensor
    real_BT: Tensor
    keywords: list[dict[str, object]]  # what each block gets beside the hidden states
    precision: AbstractContextManager[object]  # of forward passes


@torch.no_grad()
def hidden_batches(
    model: CausalLM, rollouts: Sequence[Rollout], precision: AbstractContextManager[object], once: bool = False
) -> list[HiddenBatch]:
    blocks = decoder_layers(model)
    lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
    batches = batches_by_length(lengths, tokens=BATCH_TOKENS)
    return [start(model, blocks, [rollouts[i] for i in batch], precision, once) for batch in batches]


def start(
    model: CausalLM,
    blocks: nn.ModuleList,
    rows: Sequence[Rollout],
    precision: AbstractContextManager[object],
    once: bool = False,
) -> HiddenBatch:
    """What enters the first block, and each block's keywords: the model runs with its blocks passing states through.

    `once`: what all prompts open with (a system prompt) is real in the first row only.
    """
    pairs = [(r.prompt, r.completion) for r in rows]
    tokens_BT = pack(pairs, device=model.device).tokens_BT
    lengths = torch.tensor([len(p) + len(c) for p, c in pairs], device=model.device)
    real_BT = torch.arange(tokens_BT.shape[1], device=model.device) < lengths[:, None]
    if once:
        same_T = (tokens_BT == tokens_BT[:1]).all(dim=0).long().cumprod(0)
        real_BT[1:, : min(int(same_T.sum()), *(len(p) for p, _ in pairs))] = False
    first: list[Tensor] = []
    keywords: list[dict[str, object]] = []

    def record(states_BTD: Tensor, **given: object) -> Tensor:
        first.append(states_BTD)
        keywords.append(given)
        return states_BTD

    with _replaced(blocks, record):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return HiddenBatch(first[0], real_BT, keywords, precision)


@contextmanager
def _replaced(blocks: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class Settled:
    """Children of a block whose linear layers have all been visited: each runs once more and is then replayed.

    Without this every later group of the block would pay for the attention before it again. `written` keeps what the
    settled layers gave that write into the residual stream.
    """

    def __init__(self, block: nn.Module) -> None:
        self._linears = {c: {m for m in c.modules() if isinstance(m, nn.Linear)} for c in block.children()}
        self._given: dict[nn.Module, list[object]] = {}
        self.written: dict[nn.Module, Tensor] = {}
        self.visited: set[nn.Module] = set()

    @contextmanager
    def at(self, batch: int) -> Iterator[None]:
        """Around the block's pass over one batch."""
        with ExitStack() as undo:
            for child, linears in self._linears.items():
                if not linears or not linears <= self.visited:
                    continue
                given = self._given.setdefault(child, [])
                if len(given) > batch:
                    child.forward = partial(_replay, given[batch])
                    undo.callback(delattr, child, "forward")
                else:
                    hook = child.register_forward_hook(lambda _m, _a, output, given=given: given.append(output))
                    undo.callback(hook.remove)
            yield


def _replay(output: object, *_args: object, **_keywords: object) -> object:
    return output


class _Stop(Exception):
    """Raised from a hook: what lies behind it need not be computed."""


def run_block(block: nn.Module, batch: HiddenBatch, index: int) -> Tensor:
    with batch.precision:
        output = block(batch.states_BTD, **batch.keywords[index])
    states_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return states_BTD


@dataclass
class Seen:
    """What one pass through a block showed: inputs and outputs by layer [N, …] in the pass's dtype, what it gives."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    states: list[Tensor]


def look(
    block: nn.Module,
    batches: Sequence[HiddenBatch],
    index: int,
    *,
    into: Sequence[nn.Module] = (),
    out_of: Sequence[nn.Module] = (),
    stop_at: nn.Module | None = None,
    settled: Settled | None = None,
) -> Seen:
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

        def on_output(layer: nn.Module, args: object, output: Tensor, real_BT: Tensor = real_BT) -> None:
            outputs[layer].append(output[real_BT])

        with ExitStack() as hooks:
            for layer in into:
                hooks.callback(layer.register_forward_pre_hook(on_input).remove)
            for layer in out_of:
                hooks.callback(layer.register_forward_hook(on_output).remove)
            with suppress(_Stop), settled.at(number) if settled else nullcontext():
                states.append(run_block(block, batch, index))
    if any(len(parts) != len(batches) for parts in (*inputs.values(), *outputs.values())):
        raise InputError(
            "calibration did not reach a layer once a pass: layers that see some tokens only (experts) "
            "can't be calibrated; use a method without calibration"
        )
    joined = [{m: torch.cat(kind.pop(m)) for m in list(kind)} for kind in (inputs, outputs)]  # parts go one by one
    return Seen(joined[0], joined[1], states)


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
