"""science-short: four-choice questions about the periodic table, in prompts under 200 tokens.

The form is that of the paper's science task (SciKnowEval, arXiv 2406.09098, as prompted beside arXiv 2601.19897). Facts
are computed from the table in molmass (BSD-3-Clause; masses and abundances are NIST's), not written down here. A row
looks like this:

    Select the right answer among the four options. Respond in the following format:
    <reasoning>
    ...
    </reasoning>
    <answer>
    the letter only
    </answer>

    Which element has the atomic number 26?

    A: Copper
    B: Iron
    …

An item is a fact about an element: its number (with what is counted from it: neutrons, electrons of an ion), its symbol
or its mass (with molar masses). Of every four neighbours in the table one is held out, fact by fact. All that a row
tells, its demonstration too, is of its own split: the mass of iron may be in training and its number held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import lcm
from random import Random

from remend.data.tasks.choice import LETTERS, grade_letter
from remend.data.tasks.task import TASKS, Draw, Task
from remend.errors import FileError
from remend.files.atomic import JsonObject


@dataclass(frozen=True)
class Element:
    """What the questions need of an element.

    Args:
        mass: relative atomic mass, to two decimals; None where no isotope is stable.
        mass_number: of the commonest natural isotope; None unless it makes up more than half.
        charge: of its usual ion where the group settles it, else None.
    """

    number: int
    symbol: str
    name: str
    mass: float | None
    mass_number: int | None
    charge: int | None


UNSTABLE = {43, 61, *range(84, 93)}
CHARGES = {1: 1, 2: 2, 3: 3, 12: 2, 13: 3, 15: -3, 16: -2, 17: -1}
"""Charge of an element's ion by group, for the elements in IONS."""
_METALS = "Li Na K Rb Cs Be Mg Ca Sr Ba Sc Y La Ce Pr Nd Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Zn Cd Al Ga In"
_NONMETALS = "N P O S Se Te F Cl Br I"
IONS = frozenset(f"{_METALS} {_NONMETALS}".split())


@cache
def table() -> tuple[Element, ...]:
    """Hydrogen to uranium. Raises FileError with the line that installs molmass when it is absent."""
    if find_spec("molmass") is None:
        raise FileError(
            "the task science-short computes its facts with the package molmass, which is not installed. "
            "Install it with: pip install 'remend[tasks]'"
        )
    from molmass import ELEMENTS

    elements_by_number = []
    for number in range(1, 93):
        entry = ELEMENTS[number]
        stable = number not in UNSTABLE
        common = max(entry.isotopes.values(), key=lambda isotope: isotope.abundance)
        elements_by_number.append(
            Element(
                number=number,
                symbol=entry.symbol,
                name=entry.name.lower(),
                mass=round(entry.mass, 2) if stable else None,
                mass_number=common.massnumber if stable and common.abundance > 0.5 else None,
                charge=CHARGES[entry.group] if entry.symbol in IONS else None,
            )
        )
    return tuple(elements_by_number)


@dataclass(frozen=True)
class Compound:
    """A binary compound of a metal's and a nonmetal's ion, neutral as a whole."""

    metal: Element
    other: Element

    @property
    def counts(self) -> tuple[int, int]:
        """Atoms of each in the formula."""
        assert self.metal.charge
        assert self.other.charge
        charges = lcm(self.metal.charge, self.other.charge)
        return charges // self.metal.charge, charges // -self.other.charge

    @property
    def formula(self) -> str:
        """As it is written: CaCl2."""
        return "".join(
            f"{e.symbol}{n if n > 1 else ''}" for e, n in zip((self.metal, self.other), self.counts, strict=True)
        )


@dataclass(frozen=True)
class Question:
    """A question without letters.

    Args:
        items: what it is about, each "fact:symbol".
        text, right: question and answer.
        wrong: three options, none equal to another or to `right`.
        why: the reasoning of the demonstration.
    """

    items: Sequence[str]
    text: str
    right: str
    wrong: Sequence[str]
    why: str


@cache
def held_out(fact: str) -> frozenset[str]:
    """Symbols of the elements whose `fact` is held out: of four neighbours the one with the smallest hash."""
    blocks = [table()[at : at + 4] for at in range(0, len(table()), 4)]
    return frozenset(
        min((e.symbol for e in block), key=lambda symbol: hashlib.sha256(f"{fact}:{symbol}".encode()).digest())
        for block in blocks
    )


def elements(fact: str, split: str, known: Callable[[Element], object] = lambda element: True) -> list[Element]:
    """The elements whose `fact` is in the split, of those for which it is `known`."""
    return [e for e in table() if known(e) and (e.symbol in held_out(fact)) == (split == "held_out")]


def near(pool: Sequence[Element], right: Element, rng: Random, first: Callable[[Element], bool]) -> list[Element]:
    """Three others from the pool: those that fit `first` before those that don't, the nearest in the table first."""
    others = sorted(
        (e for e in pool if e is not right), key=lambda e: (not first(e), abs(e.number - right.number), e.number)
    )
    fitting = max(3, min(6, sum(map(first, others))))
    return rng.sample(others[:fitting], 3)


def around(right: int, rng: Random) -> list[str]:
    """Three other whole numbers near `right`, of which none to three are below it: its rank tells nothing."""
    below = min(rng.randrange(4), right)
    low, high = range(max(0, right - 4), right), range(right + 1, right + 5)
    return [str(n) for n in (*rng.sample(low, below), *rng.sample(high, 3 - below))]


def by_number(split: str, rng: Random) -> Question:
    """Atomic number → name."""
    pool = elements("number", split)
    e = rng.choice(pool)
    text = rng.choice(("Which element has the atomic number {}?", "Which element has {} protons in its nucleus?"))
    return Question(
        [f"number:{e.symbol}"], text.format(e.number), e.name.capitalize(),
        [x.name.capitalize() for x in near(pool, e, rng, lambda x: abs(x.number - e.number) < 20)],
        f"Element number {e.number} of the periodic table is {e.name}.",
    )  # fmt: skip


def number_of(split: str, rng: Random) -> Question:
    """Name → atomic number."""
    e = rng.choice(elements("number", split))
    text = rng.choice(("What is the atomic number of {}?", "How many protons has an atom of {}?"))
    why = f"In the periodic table {e.name} is element number {e.number}: so many protons it has."
    return Question([f"number:{e.symbol}"], text.format(e.name), str(e.number), around(e.number, rng), why)


def by_symbol(split: str, rng: Random) -> Question:
    """Symbol → name; the options begin like the symbol or like the name where there are such."""
    pool = elements("symbol", split)
    e = rng.choice(pool)
    text = rng.choice(("Which element has the symbol {}?", "Which element does {} stand for?"))
    initials = {e.symbol[0], e.name[0].upper()}
    wrong = near(pool, e, rng, lambda x: x.name[0].upper() in initials)
    why = f"{e.symbol} is the symbol of {e.name}."
    return Question(
        [f"symbol:{e.symbol}"], text.format(e.symbol), e.name.capitalize(), [x.name.capitalize() for x in wrong], why
    )


def symbol_of(split: str, rng: Random) -> Question:
    """Name → symbol."""
    pool = elements("symbol", split)
    e = rng.choice(pool)
    text = rng.choice(("What is the symbol of {}?", "Which symbol stands for {}?"))
    wrong = near(pool, e, rng, lambda x: x.symbol[0] in {e.symbol[0], e.name[0].upper()})
    why = f"The element {e.name} is written {e.symbol}."
    return Question([f"symbol:{e.symbol}"], text.format(e.name), e.symbol, [x.symbol for x in wrong], why)


def heaviest(split: str, rng: Random) -> Question:
    """Which of four neighbours in the split has the largest (or smallest) atomic mass."""
    pool = elements("mass", split, lambda e: e.mass)
    start = rng.randrange(len(pool) - 7)
    four = rng.sample(pool[start : start + 8], 4)
    most = rng.random() < 0.5
    e = (max if most else min)(four, key=lambda x: x.mass or 0)
    listed = ", ".join(f"{x.name} {x.mass:.2f}" for x in four)
    word = "heaviest" if most else "lightest"
    return Question(
        [f"mass:{x.symbol}" for x in four], f"Which of these elements has the {word} atoms?", e.name.capitalize(),
        [x.name.capitalize() for x in four if x is not e],
        f"The atomic masses are {listed}. The {'largest' if most else 'smallest'} is that of {e.name}.",
    )  # fmt: skip


def neutrons(split: str, rng: Random) -> Question:
    """Neutrons of the commonest natural isotope: mass number less atomic number."""
    e = rng.choice(elements("number", split, lambda e: e.mass_number))
    assert e.mass_number
    right = e.mass_number - e.number
    return Question(
        [f"number:{e.symbol}"], f"How many neutrons has the most common natural isotope of {e.name}?", str(right),
        around(right, rng),
        f"The most common isotope is {e.name}-{e.mass_number}, and {e.name} has {e.number} protons. "
        f"{e.mass_number} - {e.number} = {right}.",
    )  # fmt: skip


def electrons(split: str, rng: Random) -> Question:
    """Electrons of an ion: atomic number less charge."""
    e = rng.choice(elements("number", split, lambda e: e.charge))
    assert e.charge
    right, size = e.number - e.charge, abs(e.charge)
    verb, sign, charge = ("lost", "-", f"{size}+") if e.charge > 0 else ("gained", "+", f"{size}-")
    return Question(
        [f"number:{e.symbol}"], f"How many electrons has an ion of {e.name} with the charge {charge}?", str(right),
        around(right, rng),
        f"An atom of {e.name} has {e.number} electrons, and the ion has {verb} {size}. "
        f"{e.number} {sign} {size} = {right}.",
    )  # fmt: skip


def compounds(split: str) -> list[Compound]:
    """The split's compounds of two ions."""
    ions = elements("mass", split, lambda e: e.charge)
    return [Compound(a, b) for a in ions for b in ions if (a.charge or 0) > 0 > (b.charge or 0)]


def molar_mass(split: str, rng: Random) -> Question:
    """Molar mass of a binary compound; the other options are those of a miscounted or mistaken atom."""
    c = rng.choice(compounds(split))
    parts = list(zip((c.metal, c.other), c.counts, strict=True))
    right = sum(n * (e.mass or 0) for e, n in parts)
    steps = [1.01, 2.02, 12.01, 16.00, *(e.mass or 0 for e, _ in parts)]
    ways = {sign: sorted({round(right + sign * step, 2) for step in steps}) for sign in (-1, 1)}
    low = [value for value in ways[-1] if value > 5]
    below = min(rng.randrange(4), len(low))
    wrong = rng.sample(low, below) + rng.sample(ways[1], 3 - below)
    held = " and ".join(f"{n} {e.symbol} ({e.mass:.2f})" for e, n in parts)
    total = " + ".join(f"{n} × {e.mass:.2f}" if n > 1 else f"{e.mass:.2f}" for e, n in parts)
    return Question(
        [f"mass:{e.symbol}" for e, _ in parts], f"What is the molar mass (g/mol) of {c.formula}?", f"{right:.2f}",
        [f"{value:.2f}" for value in wrong], f"{c.formula} holds {held}. {total} = {right:.2f}.",
    )  # fmt: skip


KINDS: dict[str, Callable[[str, Random], Question]] = {
    "name_by_number": by_number,
    "number_of_element": number_of,
    "name_by_symbol": by_symbol,
    "symbol_of_element": symbol_of,
    "heaviest_atom": heaviest,
    "neutrons_of_isotope": neutrons,
    "electrons_of_ion": electrons,
    "molar_mass": molar_mass,
}

PROMPT = """Select the right answer among the four options. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
the letter only
</answer>

{question}

{options}"""


def make(draw: Draw) -> JsonObject:
    """One row; kinds take turns, and so do the letters of the right answer."""
    rng = draw.random()
    kind = draw.turn(tuple(KINDS), "kind")
    letter = draw.turn(LETTERS, "letter")
    question = KINDS[kind](draw.split, rng)
    options = rng.sample(list(question.wrong), 3)
    options.insert(LETTERS.index(letter), question.right)
    listed = "\n".join(f"{name}: {text}" for name, text in zip(LETTERS, options, strict=True))
    reasoning = f"{question.why} That is option {letter}."
    return {
        "prompt": PROMPT.format(question=question.text, options=listed),
        "demonstration": f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{letter}\n</answer>",
        "answer": letter,
        "subtask": kind,
        "items": list(question.items),
    }


TASKS.register(
    "science-short", source="form: SciKnowEval, arXiv 2406.09098, as in arXiv 2601.19897; facts from molmass"
)(
    Task(
        "science-short",
        "four-choice questions about the periodic table",
        make,
        grade_letter,
        columns=("prompt", "answer"),
        letters=True,
    )
)
