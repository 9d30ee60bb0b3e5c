"""Which of a decoder's weights a degradation reached: computed from the tensors, not from what it meant to do.

A model whose experts were left at 16 bits is no 4-bit model. So the shares of the decoder's matrix weights stand in
degradation.json, and a share that nothing explains is a refusal.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from fnmatch import fnmatchcase

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.models.matrices import Account, account
from remend.models.protocols import CausalLM

MOST_UNEXPLAINED = 0.01
"""Of the decoder's matrix weights."""


def require_known(parts: Account, skip: Sequence[str], model: CausalLM) -> None:
    """Raise InputError where more than a hundredth of the decoder's weights lies in parameters that nobody can read.

    Asked before work is spent. A skip pattern that names them says that they may stay.
    """
    strange = {name: size for name, size in parts.unknown.items() if not skipped(name, parts, skip)}
    if sum(strange.values()) > MOST_UNEXPLAINED * _size(parts):
        raise InputError(
            f"{sum(strange.values()) / _size(parts):.0%} of the decoder's weights of {type(model).__name__} lie in "
            f"parameters that remend does not know as matrices: {_named(list(strange))}. They would stay as they are; "
            "name them with --skip to leave them so"
        )


def shares(
    student: CausalLM, word: str, reached: Container[str], skip: Sequence[str], *, refuse: bool = True
) -> JsonObject:
    """What of the decoder's matrix weights was reached, for degradation.json.

    Args:
        student: the changed model.
        word: what they are now: 'on_grid' or 'masked'.
        reached: keys of the matrices of which that was seen.
        skip: patterns of names that were to stay.
        refuse: whether a matrix that was not reached and not skipped is an error.

    Returns:
        'weights' of the decoder's matrices, the share `word` and 'untouched' of them, the number of 'routers' (they
        stay dense) and 'towers' (weights outside the decoder).

    Raises InputError that names what was left out, where it is more than a hundredth.
    """
    parts = account(student)
    sizes = {matrix.name: matrix.weight_OI.numel() for matrix in parts.matrices.values()}
    missed = [name for name, matrix in parts.matrices.items() if matrix.key not in reached] + list(parts.unknown)
    size = {**sizes, **parts.unknown}
    left = [name for name in missed if not skipped(name, parts, skip)]
    if refuse and sum(size[name] for name in left) > MOST_UNEXPLAINED * _size(parts):
        raise InputError(
            f"{sum(size[name] for name in left) / _size(parts):.0%} of the decoder's matrix weights were not reached: "
            f"{_named(left)}. Name them with --skip to leave them as they are, or choose a method without calibration"
        )
    untouched = sum(size[name] for name in missed) / _size(parts)
    return {
        "weights": _size(parts),
        word: 1 - untouched,
        "untouched": untouched,
        "routers": sum(parts.routers.values()),
        "towers": sum(parts.towers.values()),
    }


def _size(parts: Account) -> int:
    return sum(m.weight_OI.numel() for m in parts.matrices.values()) + sum(parts.unknown.values())


def skipped(name: str, parts: Account, skip: Sequence[str]) -> bool:
    """Whether a pattern names a matrix or a parameter that is unknown: by its name, or its parameter's.

    So '*.down_proj' names 'experts.down_proj.3' too.
    """
    matrix = parts.matrices.get(name)
    parameter = (matrix.parameter if matrix else name).removesuffix(".weight")
    return any(fnmatchcase(name, pattern) or fnmatchcase(parameter, pattern) for pattern in skip)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
