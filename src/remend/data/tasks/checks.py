"""Instructions that a program can verify, as IFEval (arXiv 2311.07911) has them: kinds of checks under their names.

A kind is a short function `check(response, **arguments) -> bool` with the sentence that asks for it:

    @check("words_at_least", "Use at least {n} words.", group="words", draw=one_of(n=(80, 100)))
    def words_at_least(response: str, n: int) -> bool: ...

In a row a check is {"kind": "words_at_least", "n": 80}. `holds` applies one strictly; `holds_loosely` also takes the
response without its first line, without its last, without both, and each of these without asterisks. Definitions are
this project's own and simpler than IFEval's (no sentence splitter, no language check): don't compare scores with its.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import TypeVar

from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.registry import Registry

IFEVAL = "arXiv 2311.07911"
OWN = "remend"

Draw = Callable[[Random, Sequence[str]], JsonObject]
Check = Mapping[str, object]
"""An item of a row's `checks`: its kind and that kind's arguments."""

F = TypeVar("F", bound=Callable[..., bool])


@dataclass(frozen=True)
class Kind:
    """A kind of check.

    Args:
        name: as in the registry and in rows.
        test: (response, **arguments) → whether the response follows it.
        template: the instruction, with the arguments' names in braces.
        draw: (generator, the topic's words) → arguments that JSON can hold.
        group: kinds of one group ask for the same thing, so one prompt has one of them at most.
        clashes: names or groups that it can't be combined with; one side's word is enough.
    """

    name: str
    test: Callable[..., bool]
    template: str
    draw: Draw
    group: str
    clashes: frozenset[str]

    def describe(self, arguments: Mapping[str, object]) -> str:
        """The instruction in words; lists are quoted and joined."""
        return self.template.format(**{key: _in_words(value) for key, value in arguments.items()})


CHECKS: Registry[Kind] = Registry("check")


def one_of(**options: Sequence[object]) -> Draw:
    """A draw that chooses each argument among its options."""
    return lambda rng, words: {name: rng.choice(values) for name, values in options.items()}


def check(
    name: str,
    template: str,
    *,
    group: str,
    draw: Draw = one_of(),  # noqa: B008 (a pure function without arguments)
    clashes: Iterable[str] = (),
    source: str = IFEVAL,
) -> Callable[[F], F]:
    """Decorator that registers a function as a kind of check; see Kind."""

    def add(test: F) -> F:
        CHECKS.register(name, source=source)(Kind(name, test, template, draw, group, frozenset(clashes)))
        return test

    return add


def compatible(kinds: Iterable[str]) -> bool:
    """Whether one response can follow all of these kinds, whatever their arguments (as `draw` gives them).

    Raises InputError that lists the known kinds.
    """
    return all(not _clash(a, b) for a, b in combinations([CHECKS.get(name) for name in kinds], 2))


def _clash(a: Kind, b: Kind) -> bool:
    return a.group == b.group or bool(a.clashes & {b.name, b.group}) or bool(b.clashes & {a.name, a.group})


def read_check(item: object) -> tuple[Kind, dict[str, object]]:
    """(kind, arguments) of one item of a row's `checks`.

    Raises InputError when it is no {"kind": …} with that kind's arguments.
    """
    if not isinstance(item, Mapping) or not isinstance(item.get("kind"), str):
        raise InputError(f'a check must be an object like {{"kind": "words_at_least", "n": 80}}, got {item!r:.80}')
    kind = CHECKS.get(item["kind"])
    arguments = {str(key): value for key, value in item.items() if key != "kind"}
    try:
        inspect.signature(kind.test).bind("", **arguments)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(kind.test).parameters)[1:]) or "no arguments"
        raise InputError(f"the check {kind.name}: {error}; it takes {takes}") from None
    return kind, arguments


def describe(item: Check) -> str:
    """The instruction of one check in words. Raises InputError as `read_check`."""
    kind, arguments = read_check(item)
    return kind.describe(arguments)


def holds(response: str, item: Check) -> bool:
    """Whether the response, as it is, follows one check; an empty response follows none.

    Raises InputError as `read_check`, or when an argument has a type that the check can't use.
    """
    kind, arguments = read_check(item)
    if not response.strip():
        return False
    try:
        return bool(kind.test(response, **arguments))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the check {kind.name} can't use {arguments}: {error}") from None


def holds_loosely(response: str, item: Check) -> bool:
    """Whether any of the response's variants follows one check (IFEval's loose criterion)."""
    return any(holds(variant, item) for variant in variants(response))


def variants(response: str) -> list[str]:
    """The response; without its first line, its last, both; and these four without asterisks. Distinct ones only."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)]))


def _in_words(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    quoted = [f'"{item}"' for item in value]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
