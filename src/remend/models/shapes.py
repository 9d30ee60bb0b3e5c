"""Shapes of well-known models, so that work and memory can be told before a file of theirs is there.

The numbers are those of each model's published config.json; a test builds every model without weights and counts.
Of models that read images too (Gemma 3 from 4B on) the part that reads and writes text is meant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from remend.errors import InputError, did_you_mean
from remend.models.sizes import FOUR_NORMS, NORMED_HEADS, Size


@dataclass(frozen=True)
class Shape:
    """A decoder with a gated MLP, by the names of config.json.

    name: of the model, without its organisation.
    model_type: of the architecture.
    head_dim: width of a head; num_key_value_heads: heads of keys and values.
    tie_word_embeddings: the head is the embedding.
    """

    name: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    def config(self) -> dict[str, int | str | bool]:
        """The keys of config.json that make the shape, `model_type` among them."""
        return {key: value for key, value in vars(self).items() if key != "name"}

    @property
    def vectors(self) -> int:
        """Numbers of a block that stand in no matrix: norms and biases."""
        keys = self.num_key_value_heads * self.head_dim
        biases = (self.num_attention_heads * self.head_dim + 2 * keys) if self.model_type == "qwen2" else 0
        of_heads = 2 * self.head_dim if self.model_type in NORMED_HEADS else 0
        return (4 if self.model_type in FOUR_NORMS else 2) * self.hidden_size + biases + of_heads

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Of one block, matrices that read one input: (rows of all of them, columns)."""
        width, inner, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return ((heads + 2 * keys, width), (width, heads), (2 * inner, width), (width, inner))

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Of each of the groups: columns of a matrix, and how many matrices it has."""
        return tuple(zip((columns for _, columns in self.groups), (3, 1, 2, 1), strict=True))

    @property
    def size(self) -> Size:
        """How large the model is."""
        block = sum(rows * columns for rows, columns in self.groups)
        table = self.vocab_size * self.hidden_size
        embeddings = table if self.tie_word_embeddings else 2 * table
        layers, columns = self.num_hidden_layers, [i for i, count in self.columns for _ in range(count)]
        return Size(
            parameters=layers * (block + self.vectors) + embeddings + self.hidden_size,
            embeddings=embeddings,
            matrices=layers * block,
            active=layers * block,
            vocabulary=self.vocab_size,
            width=self.hidden_size,
            layers=layers,
            cached=2 * layers * self.num_key_value_heads * self.head_dim,
            grams=layers * sum(i * i for i in columns),
            fits=layers * (sum(i**3 for i in columns) + sum(rows * i * i for rows, i in self.groups)),
            groups=tuple(sorted(set(self.groups))),
            sides=layers * sum(rows + i * n for (rows, _), (i, n) in zip(self.groups, self.columns, strict=True)),
        )


def _qwen25(name: str, layers: int, width: int, inner: int, heads: int, keys: int, *, small: bool = False) -> Shape:
    """The small ones have fewer rows, and tie them."""
    rows = 151_936 if small else 152_064
    return Shape(name, "qwen2", layers, width, inner, heads, keys, width // heads, rows, small)


def _qwen3(name: str, layers: int, width: int, inner: int, heads: int, *, tied: bool) -> Shape:
    return Shape(name, "qwen3", layers, width, inner, heads, 8, 128, 151_936, tied)


def _llama3(name: str, layers: int, width: int, inner: int, heads: int, *, tied: bool = False) -> Shape:
    return Shape(name, "llama", layers, width, inner, heads, 8, width // heads, 128_256, tied)


def _gemma3(name: str, layers: int, width: int, inner: int, heads: int, keys: int, head: int) -> Shape:
    """Those that read images have 64 rows more."""
    rows = 262_144 if width < 2_000 else 262_208
    return Shape(name, "gemma3_text", layers, width, inner, heads, keys, head, rows, True)


SHAPES: tuple[Shape, ...] = (
    _qwen25("Qwen2.5-0.5B", 24, 896, 4_864, 14, 2, small=True),
    _qwen25("Qwen2.5-1.5B", 28, 1_536, 8_960, 12, 2, small=True),
    _qwen25("Qwen2.5-3B", 36, 2_048, 11_008, 16, 2, small=True),
    _qwen25("Qwen2.5-7B", 28, 3_584, 18_944, 28, 4),
    _qwen25("Qwen2.5-14B", 48, 5_120, 13_824, 40, 8),
    _qwen25("Qwen2.5-32B", 64, 5_120, 27_648, 40, 8),
    _qwen25("Qwen2.5-72B", 80, 8_192, 29_568, 64, 8),
    _qwen3("Qwen3-0.6B", 28, 1_024, 3_072, 16, tied=True),
    _qwen3("Qwen3-1.7B", 28, 2_048, 6_144, 16, tied=True),
    _qwen3("Qwen3-4B", 36, 2_560, 9_728, 32, tied=True),
    _qwen3("Qwen3-8B", 36, 4_096, 12_288, 32, tied=False),
    _qwen3("Qwen3-14B", 40, 5_120, 17_408, 40, tied=False),
    _qwen3("Qwen3-32B", 64, 5_120, 25_600, 64, tied=False),
    _llama3("Llama-3.2-1B", 16, 2_048, 8_192, 32, tied=True),
    _llama3("Llama-3.2-3B", 28, 3_072, 8_192, 24, tied=True),
    _llama3("Llama-3.1-8B", 32, 4_096, 14_336, 32),
    _llama3("Llama-3.1-70B", 80, 8_192, 28_672, 64),
    _llama3("Llama-3.1-405B", 126, 16_384, 53_248, 128),
    _gemma3("Gemma-3-270m", 18, 640, 2_048, 4, 1, 256),
    _gemma3("Gemma-3-1b", 26, 1_152, 6_912, 4, 1, 256),
    _gemma3("Gemma-3-4b", 34, 2_560, 10_240, 8, 4, 256),
    _gemma3("Gemma-3-12b", 48, 3_840, 15_360, 16, 8, 256),
    _gemma3("Gemma-3-27b", 62, 5_376, 21_504, 32, 16, 128),
)
"""Llama 3 and 3.3 have the shapes of Llama 3.1."""

ALIKE = 0.25
"""A shape whose parameters differ by no more than this share is taken as it is for a number of parameters."""


def shape_named(name: str) -> Shape:
    """The shape of a model by its name, as `Qwen2.5-7B` or `Qwen/Qwen2.5-7B-Instruct`.

    Raises InputError, with the names that there are, for one that is not known.
    """
    wanted = _plain(name)
    for shape in SHAPES:
        if _plain(shape.name) == wanted:
            return shape
    names = [shape.name for shape in SHAPES]
    near = {_plain(known): known for known in names}
    hint = did_you_mean(wanted, near)
    for plain, known in near.items():
        hint = hint.replace(f'"{plain}"', f'"{known}"')
    raise InputError(f'the shape of "{name}" is not known; allowed: {", ".join(names)}.{hint}')


def shape_of(parameters: int) -> tuple[Shape, str]:
    """The shape nearest to a number of parameters, and what to say of it.

    A known shape of about that size is taken as it is. Elsewhere the nearest one gets as many layers as come nearest.
    """
    nearest = min(SHAPES, key=lambda shape: abs(math.log(shape.size.parameters / parameters)))
    own, name = nearest.size.parameters, nearest.name
    if abs(own - parameters) <= ALIKE * own:
        return nearest, f"taken for {name}, which has {own / 1e9:.2f} billion parameters"
    one = replace(nearest, num_hidden_layers=1).size.parameters
    each = replace(nearest, num_hidden_layers=2).size.parameters - one
    layers = max(1, 1 + round((parameters - one) / each))
    shape = replace(nearest, num_hidden_layers=layers)
    return shape, (
        f"no known shape is near; taken for {name} with {layers} layers in place of {nearest.num_hidden_layers}, which "
        f"has {shape.size.parameters / 1e9:.2f} billion parameters"
    )


_ENDINGS = ("-instruct", "-it", "-pt", "-base", "-hf")


def _plain(name: str) -> str:
    """Small letters, without organisation, revision and endings that name a tuning; Meta- and Llama-3 as 3.1."""
    plain = name.strip().lower().rpartition("/")[2].partition("@")[0].removeprefix("meta-")
    for ending in _ENDINGS:
        plain = plain.removesuffix(ending)
    for other in ("llama-3-", "llama-3.3-"):
        plain = plain.replace(other, "llama-3.1-")
    return plain
