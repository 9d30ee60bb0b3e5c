"""One teacher-forced pass over a model: one row a sequence of every layer, and the states behind every answer token.

Of what the layers put out only the chosen row of each sequence is kept; of the last states, which become logits,
nothing outlives its batch.

Legend: B batch, T time, S sequences, L layers, D width, N completion tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from remend.data.order import batches_by_length
from remend.errors import InputError
from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Packed, Scorer, pack

SITES = ("residual", "attention", "mlp")
"""What a block puts out: its whole output (the residual stream, before the final norm), its attention's, its MLP's."""

_PARTS = {
    "attention": ("self_attn", "attn", "attention", "self_attention", "linear_attn"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
}

BATCH_TOKENS = 2048
"""Tokens a forward pass, padding included."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass: their numbers among all, and their tokens laid out."""

    number: int
    sequences: tuple[int, ...]
    packed: Packed

    def of_first(self, count: int) -> Tensor:
        """[N] bool: completion tokens that belong to one of the first `count` of all sequences."""
        first_B = torch.tensor([i < count for i in self.sequences], device=self.packed.rows_N.device)
        return first_B[self.packed.rows_N]


LEAST_ROWS = 4
"""The debiased estimator needs 4 rows."""

MASSIVE = 3.0
"""A row whose norm is above so many times its layer's median is left out: a few such tokens decide a CKA. At 10 six
tokens of 256, at 3 to 8 times the median, held about half of the variance of SmolLM2's layers 2 to 7, and the intervals
there were wider than 0.3."""

Consume = Callable[[Batch, Tensor], None]
"""Gets each batch with the states [N, D] that predict its completion tokens, after the final norm."""


def plan(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    """Sequences grouped by length into batches of at most BATCH_TOKENS; settled by the lengths alone."""
    lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
    return [tuple(batch) for batch in batches_by_length(lengths, tokens=BATCH_TOKENS)]


def modules_of(model: CausalLM, site: str) -> list[nn.Module]:
    """The modules whose outputs are the site's layers. Raises InputError where the model's blocks have no such part."""
    blocks = list(decoder_layers(model))
    if site == "residual":
        return blocks
    parts = [next((m for n in _PARTS[site] if (m := getattr(b, n, None)) is not None), None) for b in blocks]
    missing = [i for i, module in enumerate(parts) if module is None]
    if missing:
        raise InputError(
            f"layer {missing[0]} of {type(model).__name__} has no part that remend knows as {site} "
            f"({', '.join(_PARTS[site])}); leave {site} out of --sites"
        )
    return [module for module in parts if module is not None]


def by_token(output: Tensor | tuple[Tensor, ...], tokens_BT: Tensor) -> Tensor:
    """A layer's output as [B, T, D]: streams that stand side by side (Gemma 3n has four) follow each other in D.

    Raises InputError for an output without one state per token.
    """
    states = output[0] if isinstance(output, tuple) else output
    batch, time = tokens_BT.shape
    if states.ndim == 2 and len(states) == batch * time:
        return states.view(batch, time, -1)
    if states.ndim == 4 and states.shape[1:3] == tokens_BT.shape:
        states = states.permute(1, 2, 0, 3)
    if states.ndim < 3 or states.shape[:2] != tokens_BT.shape:
        raise InputError(
            f"a layer puts out {list(states.shape)} for {batch} sequences of {time} tokens, where remend looks for one "
            "state per token; this model's layers can't be compared"
        )
    return states.flatten(2)


@dataclass
class _Recorder:
    """Keeps one position of each sequence, layer after layer, of the pass that is running."""

    name: str
    tokens_BT: Tensor | None = None
    columns_B: Tensor | None = None
    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def hook(self, site: str, layer: int) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            assert self.tokens_BT is not None
            states_BTD = by_token(output, self.tokens_BT)
            if not bool(states_BTD.isfinite().all()):
                raise InputError(
                    f"{self.name} yields numbers that are not finite, first in the {site} output of layer {layer}: its "
                    "weights are damaged beyond measuring; look at that layer's tensors"
                )
            rows_B = torch.arange(len(states_BTD), device=states_BTD.device)
            self.rows[site, layer] = states_BTD[rows_B, self.columns_B].float().cpu()

        return record


@contextmanager
def _recording(model: CausalLM, name: str, sites: Sequence[str]) -> Iterator[_Recorder]:
    recorder = _Recorder(name)
    with ExitStack() as hooks:
        for site in sites:
            for layer, module in enumerate(modules_of(model, site)):
                hooks.callback(module.register_forward_hook(recorder.hook(site, layer)).remove)
        yield recorder


@torch.no_grad()
def capture(
    parts: Scorer,
    name: str,
    rollouts: Sequence[Rollout],
    picks: Sequence[int],
    *,
    sites: Sequence[str] = ("residual",),
    consume: Consume | None = None,
    turn: tuple[int, int] = (0, 1),
    on_rows: Callable[[int], None] | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Run the model over all sequences once.

    Args:
        name: of the model, for messages.
        rollouts: prompts with the reference's completions.
        picks: for each sequence the completion token whose states are kept.
        sites: of SITES.
        consume: gets the states that become logits, batch by batch.
        turn: this process's number and how many there are; it runs every so many-th batch.

    Returns:
        For each site and each sequence that this process ran: float32 [L, D] on the CPU.

    Raises:
        InputError: a layer's output is not finite (named); a site that the model does not have.
    """
    kept: dict[str, dict[int, Tensor]] = {site: {} for site in sites}
    with _recording(parts.model, name, sites) as recorder:
        for number, sequences in list(enumerate(plan(rollouts)))[turn[0] :: turn[1]]:
            part = [rollouts[i] for i in sequences]
            packed = pack([(r.prompt, r.completion) for r in part], device=parts.device)
            columns = [len(r.prompt) + picks[i] for r, i in zip(part, sequences, strict=True)]
            recorder.tokens_BT, recorder.columns_B = packed.tokens_BT, torch.tensor(columns, device=parts.device)
            states_BTD = parts.hidden(packed.tokens_BT)
            for site in sites:
                layers = sorted(layer for s, layer in recorder.rows if s == site)
                stacked_LBD = torch.stack([recorder.rows[site, layer] for layer in layers])
                # a copy: a view would keep the whole batch alive
                kept[site] |= {i: stacked_LBD[:, row].clone() for row, i in enumerate(sequences)}
            if consume:
                consume(Batch(number, sequences, packed), packed.gather(states_BTD))
            if on_rows:
                on_rows(len(part))
    return kept


def as_layers(rows: Mapping[int, Tensor], count: int) -> Tensor:
    """[L, S, D] of the rows of all sequences, each [L, D]. Every sequence must be there."""
    return torch.stack([rows[i] for i in range(count)], dim=1)


def massive(states_LSD: Tensor) -> Tensor:
    """[L, S] bool: rows whose norm is above MASSIVE times the median of their layer."""
    norms_LS = torch.linalg.vector_norm(states_LSD, dim=-1)
    median_L1: Tensor = norms_LS.median(dim=1, keepdim=True).values
    above_LS: Tensor = norms_LS > MASSIVE * median_L1
    return above_LS


def usable(reference: Tensor, student: Tensor, least: int = LEAST_ROWS) -> Tensor:
    """[S] bool: sequences whose row is massive at no layer of either model. InputError where too few are left."""
    keep_S = ~(massive(reference).any(0) | massive(student).any(0))
    if int(keep_S.sum()) < least:
        raise InputError(
            f"{int(keep_S.sum())} of {len(keep_S)} rows are left once tokens with a norm above {MASSIVE:g} times their "
            f"layer's median are out, and {least} is the least; give more prompts (--rows, --data)"
        )
    return keep_S


def pick_positions(lengths: Sequence[int], draws: Sequence[float]) -> list[int]:
    """For each sequence one of its completion tokens: draw in [0, 1) times its length."""
    return [min(int(draw * length), length - 1) for draw, length in zip(draws, lengths, strict=True)]
