"""Sizes that a configuration names, whatever shape it gives them; and how large a model is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remend.models.matrices import Matrix, matrices
from remend.models.protocols import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def largest(config: PreTrainedConfig, name: str) -> int:
    """A number of the configuration, the largest where there is one per layer; 0 where it has none of that name."""
    value = getattr(config, name, None) or 0
    return int(max(value) if isinstance(value, list | tuple) else value)


_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attention")


def window(config: PreTrainedConfig) -> int:
    """Tokens that the nearest-sighted layers see, as far as the configuration names such a window; else 0."""
    named = [largest(config, name) for name in _WINDOWS]
    return min((size for size in named if size > 0), default=0)


NORMED_HEADS = ("qwen3", "qwen3_moe", "gemma3_text", "gemma3")
"""Architectures in which queries and keys have norms of their own,"""

FOUR_NORMS = ("gemma2", "gemma3_text", "gemma3")
"""and those in which a norm follows attention and MLP too."""


@dataclass(frozen=True)
class Size:
    """How large a model is, as far as work and memory depend on it.

    parameters: all, tied ones once; embeddings: those of the input's and the output's, tied ones once.
    matrices: numbers in the decoder's matrices; active: those that one token meets, which of experts are a share.
    vocabulary, width, layers: rows of the head, columns of it, and blocks.
    cached: numbers that the key-value cache keeps of a token.
    grams: Σ I² over the matrices [O, I], and fits: Σ I³ + O · I², what a closed-form solution multiplies.
    groups: each (rows, columns) that matrices which read one input have together.
    sides: Σ O + I over the matrices that are no experts': an adapter of rank r has r times as many numbers.
    experts: numbers of the matrices that are experts'.
    """

    parameters: int
    embeddings: int
    matrices: int
    active: int
    vocabulary: int
    width: int
    layers: int
    cached: int
    grams: int
    fits: int
    groups: tuple[tuple[int, int], ...] = ()
    sides: int = 0
    experts: int = 0

    @property
    def vectors(self) -> int:
        """Numbers of norms and biases."""
        return self.parameters - self.matrices - self.embeddings

    @property
    def outside(self) -> int:
        """Numbers that stand in no block: embeddings, and the norm before the head."""
        return self.embeddings + self.width

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return (self.parameters - self.outside) // max(1, self.layers)

    @property
    def widest(self) -> int:
        """Numbers of the largest single matrix: the MLP's."""
        return self.width * max((columns for _, columns in self.groups), default=4 * self.width)

    @property
    def largest(self) -> int:
        """Numbers of the largest group."""
        return max((rows * columns for rows, columns in self.groups), default=0)


def size_of(model: CausalLM, config: PreTrainedConfig) -> Size:
    """The size of a model, or of its skeleton, with its configuration."""
    text, named = config.get_text_config(), matrices(model)
    shapes = [(matrix.expert is not None, *matrix.weight_OI.shape) for matrix in named.values()]
    whole = sum(o * i for _, o, i in shapes)
    experts = sum(o * i for routed, o, i in shapes if routed)
    counts = [largest(text, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    share = min(1.0, largest(text, "num_experts_per_tok") / max(counts)) if max(counts) else 1.0
    width, layers = largest(text, "hidden_size"), largest(text, "num_hidden_layers")
    heads = largest(text, "num_attention_heads")
    head = largest(text, "head_dim") or (width // heads if heads else 0)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        embeddings=sum(tables.values()),
        matrices=whole,
        active=whole - experts + int(experts * share),
        vocabulary=text.vocab_size,
        width=width,
        layers=layers,
        cached=2 * layers * (largest(text, "num_key_value_heads") or heads) * head,
        grams=sum(i * i for _, _, i in shapes),
        fits=sum(i**3 + o * i * i for _, o, i in shapes),
        groups=_groups(named.values()),
        sides=sum(o + i for routed, o, i in shapes if not routed),
        experts=experts,
    )


def _groups(known: Iterable[Matrix]) -> tuple[tuple[int, int], ...]:
    """Which matrices read one input, as far as names and shapes tell: those of one module with as many columns, but for
    the last one, which reads what the others made. An expert's stand alone."""
    inside: dict[str, list[Matrix]] = {}
    groups: set[tuple[int, int]] = set()
    for matrix in known:
        if matrix.expert is None:
            inside.setdefault(matrix.name.rpartition(".")[0], []).append(matrix)
        else:
            groups.add((matrix.out_features, matrix.in_features))
    for own in inside.values():
        rows = dict[int, int]()
        for matrix in own[:-1]:
            rows[matrix.in_features] = rows.get(matrix.in_features, 0) + matrix.out_features
        groups |= {(own[-1].out_features, own[-1].in_features), *((o, i) for i, o in rows.items())}
    return tuple(sorted(groups))
