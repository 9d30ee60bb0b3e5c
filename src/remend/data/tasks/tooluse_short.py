"""tooluse-short: pick the right action of a small invented API and fill in its parameters.

The form is that of the paper's tool use (ToolAlpaca, arXiv 2306.05301, as prompted beside arXiv 2601.19897), in prompts
under 200 tokens. A row looks like this:

    Answer the user's question with these tools.
    Name: Velmora Tents
    Description: Find and manage tents
    Documentation:
    fetchTent: Show one tent
    Parameters: {"itemId": "Required. integer."}
    …
    Question: Please show me tent 482.

    Thought: The user wants to show one tent, so I call fetchTent with itemId 482.
    Action: fetchTent
    Action Input: {"itemId": 482}

An API is about one kind of thing, and the two splits have different things: no API, action name or brand is in both.
Verbs, parameter names and spelling (fetchTent, fetch_tent, FetchTent) are drawn anew for every API, so the names
have to be read from the prompt. One row in eight asks for two things at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from remend.data.tasks.calls import grade_calls
from remend.data.tasks.task import TASKS, Draw, Task
from remend.files.atomic import JsonObject


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# Every thing can be hired, sent and painted, begins with a consonant and takes a plain s, so that one template serves
# all; and it is one token or two, for it stands in a prompt a dozen times.
THINGS = {
    "train": words(
        "tent lamp poster puzzle camera bicycle carpet drone telescope balloon ladder printer jacket "
        "helmet tractor lantern vase basket pillow globe drum table bowl plant phone coat shirt boat truck cable "
        "desk rope doll toy bag plate lock fan pump drill hammer towel tablet speaker keyboard flag map"
    ),
    "held_out": words("canoe clock robot blanket mirror statue chair backpack cup microphone kite hat bell"),
}
BRANDS = {
    "train": (words("Vel Tor Mar Quin Bel Dor Fen Gal Har Jun Kas Lum"), words("mora dale vex nik sora tide pen rion")),
    "held_out": (words("Nor Pax Rel Sil Tam Wex"), words("wick bay zen holt")),
}
CITIES = words("Oslo Lima Cairo Kyoto Quito Porto Delhi Turin Perth Lyon Dakar Leeds Osaka Basel Tunis Bergen")
COLOURS = words("red green blue yellow purple orange white black grey brown")
PEOPLE = words("Maria Ahmed Chloe Diego Fatima Henrik Ines Jamal Keiko Lars Mina Nadia Oscar Priya")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TITLES = words("Juniper Bluebird Comet Harvest Marble Nimbus Pebble Saffron Thistle Willow Ember Coral")
NOTES = ("needs repair", "ready today", "check size", "too expensive", "best seller", "keep dry")
CURRENCIES = words("EUR USD JPY GBP CHF SEK")


@dataclass(frozen=True)
class Slot:
    """A parameter: the names that it may go by, its JSON type, and the values that a request may name."""

    names: tuple[str, ...]
    type: str
    values: tuple[str | int, ...]


SLOTS = {
    "id": Slot(("id", "item_id", "number"), "integer", tuple(range(10, 1000))),
    "city": Slot(("city", "town", "place"), "string", CITIES),
    "limit": Slot(("limit", "most", "top"), "integer", tuple(range(2, 16))),
    "colour": Slot(("colour", "shade"), "string", COLOURS),
    "stars": Slot(("stars", "rating"), "integer", tuple(range(1, 6))),
    "day": Slot(("day", "weekday"), "string", DAYS),
    "person": Slot(("person", "recipient"), "string", PEOPLE),
    "title": Slot(("title", "new_name", "label"), "string", TITLES),
    "note": Slot(("note", "text"), "string", NOTES),
    "currency": Slot(("currency", "unit"), "string", CURRENCIES),
    "price": Slot(("budget", "price"), "integer", tuple(range(15, 500, 5))),
}


@dataclass(frozen=True)
class Kind:
    """A kind of action.

    Args:
        verbs: what its name may begin with.
        ending: what follows the verb in its name.
        about: its description.
        asks: requests, as what follows "Please".
        optional: a parameter that a request names only when the text in `more` is added to it.
    """

    verbs: tuple[str, ...]
    ending: str
    about: str
    slots: tuple[str, ...]
    asks: tuple[str, ...]
    optional: str = ""
    more: str = ""

    @property
    def parameters(self) -> int:
        """How many it documents."""
        return len(self.slots) + bool(self.optional)


KINDS = (
    Kind(("get", "fetch", "show"), "{thing}", "Show one {thing}", ("id",),
         ("show me {thing} {id}", "pull up {thing} number {id}", "open the page of {thing} {id}")),
    Kind(("list", "find", "browse"), "{things}", "List {things} in a city", ("city",),
         ("list the {things} in {city}", "find {things} in {city}"), "limit", ", at most {limit}"),
    Kind(("count", "total"), "{things}", "Count the {things} in a city", ("city",),
         ("count the {things} in {city}", "tell me how many {things} there are in {city}")),
    Kind(("search", "match", "filter"), "{things}", "Search {things} of one colour", ("colour",),
         ("look for {colour} {things}", "search for {colour} {things}"), "limit", ", no more than {limit}"),
    Kind(("rate", "score", "review"), "{thing}", "Rate a {thing}", ("id", "stars"),
         ("give {thing} {id} a rating of {stars}", "rate {thing} {id} with {stars} out of 5")),
    Kind(("reserve", "book", "hold"), "{thing}", "Reserve a {thing}", ("id", "day"),
         ("reserve {thing} {id} for {day}", "book {thing} {id} for me on {day}")),
    Kind(("send", "share", "forward"), "{thing}", "Send a {thing} to a person", ("id", "person"),
         ("send {thing} {id} to {person}", "make sure that {person} gets {thing} {id}")),
    Kind(("rename", "retitle"), "{thing}", "Rename a {thing}", ("id", "title"),
         ("rename {thing} {id} to {title}", "call {thing} {id} {title} from now on")),
    Kind(("remove", "delete", "drop"), "{thing}", "Remove a {thing}", ("id",),
         ("remove {thing} {id}", "take {thing} {id} out of the catalogue")),
    Kind(("quote", "price"), "{thing}", "Tell the price of a {thing}", ("id", "currency"),
         ("tell me what {thing} {id} costs in {currency}", "quote {thing} {id} in {currency}")),
    Kind(("suggest", "pick"), "{things}", "Suggest cheap {things}", ("price",),
         ("suggest a {thing} for at most {price} dollars", "pick a {thing} for {price} dollars or less")),
    Kind(("note", "mark"), "{thing}", "Add a note to a {thing}", ("id", "note"),
         ('add the note "{note}" to {thing} {id}', 'write "{note}" on {thing} {id}')),
    Kind(("paint", "recolour"), "{thing}", "Give a {thing} a colour", ("id", "colour"),
         ("make {thing} {id} {colour}", "change the colour of {thing} {id} to {colour}")),
)  # fmt: skip

OPENINGS = ("Please {ask}.", "Could you {ask}?", "Can you {ask}?", "I need you to {ask}.", "Hi, please {ask}.",
            "{ask}, please.", "I want you to {ask}.")  # fmt: skip
ABOUTS = (
    "Find and manage {things}",
    "Sharing {things}",
    "Everything about {things}",
    "All your {things}",
)

PROMPT = """Answer the user's question with these tools.
Name: {name}
Description: {about}
Documentation:
{documentation}

Use the following format:
Thought: what to do
Action: a tool's name
Action Input: its input as JSON

Begin!
Question: {question}"""


@dataclass(frozen=True)
class Action:
    """One action of an API, with the name that each slot has there."""

    kind: Kind
    name: str
    names: Mapping[str, str]

    def documentation(self, about: str) -> str:
        """Its two lines in the prompt."""
        needs = {self.names[s]: f"Required. {SLOTS[s].type}." for s in self.kind.slots}
        if self.kind.optional:
            needs[self.names[self.kind.optional]] = f"{SLOTS[self.kind.optional].type}."
        return f"{self.name}: {about}\nParameters: {json.dumps(needs)}"


def spell(text: str, style: str) -> str:
    """fetch_tent as it is (snake), as fetchTent (camel) or as FetchTent (pascal)."""
    parts = text.split("_")
    if style == "snake":
        return text
    first = parts[0].capitalize() if style == "pascal" else parts[0]
    return first + "".join(part.capitalize() for part in parts[1:])


PARAMETERS = 4
"""At most so many in one API: what fits the prompt's 200 tokens."""


def choose_kinds(rng: Random, count: int, calls: int) -> list[Kind]:
    """`count` kinds, of which the first `calls` are asked for; these share no parameter.

    Inputs of one name would overwrite each other where the paper's grader merges them.
    """
    kinds: list[Kind] = []
    room = PARAMETERS - count  # beyond the one that every action has
    while len(kinds) < count:
        taken = {slot for kind in kinds for slot in kind.slots} if len(kinds) < calls else set()
        fitting = [k for k in KINDS if k not in kinds and not taken & set(k.slots) and k.parameters - 1 <= room]
        kinds.append(rng.choice(fitting))
        room -= kinds[-1].parameters - 1
    return kinds


def request(kind: Kind, rng: Random, *, may_add: bool) -> tuple[str, dict[str, str | int]]:
    """(what is asked for, with {thing} still open; the value of each slot that is named)."""
    values = {slot: rng.choice(SLOTS[slot].values) for slot in kind.slots}
    ask = rng.choice(kind.asks)
    if may_add and kind.optional and rng.random() < 0.5:
        values[kind.optional] = rng.choice(SLOTS[kind.optional].values)
        ask += kind.more
    return ask.format(thing="{thing}", things="{things}", **values), values


def make(draw: Draw) -> JsonObject:
    """One row: an API of one to three actions, a request for one of them (in every eighth row two), and the calls."""
    rng = draw.random()
    calls = draw.turn((1, 1, 1, 1, 1, 1, 1, 2), "calls")
    count = draw.turn((1, 2, 2, 3, 3), "actions") if calls == 1 else 2
    thing = rng.choice(THINGS[draw.split])
    both = {"thing": thing, "things": f"{thing}s"}
    style = rng.choice(("camel", "snake", "pascal"))
    names = {slot: spell(rng.choice(SLOTS[slot].names), "snake" if style == "snake" else "camel") for slot in SLOTS}
    actions = [
        Action(kind, spell(f"{rng.choice(kind.verbs)}_{kind.ending.format(**both)}", style), names)
        for kind in choose_kinds(rng, count, calls)
    ]
    asked = [(action, *request(action.kind, rng, may_add=calls == 1)) for action in actions[:calls]]
    question = rng.choice(OPENINGS).format(ask=" and ".join(ask for _, ask, _ in asked).format(**both))
    brand = "".join(rng.choice(part) for part in BRANDS[draw.split]) + f" {thing.capitalize()}s"
    rng.shuffle(actions)
    golden, thoughts = [], []
    for action, _, values in asked:
        inputs = {names[slot]: value for slot, value in values.items()}
        given = " and ".join(f"{name} {value}" for name, value in inputs.items())
        about = action.kind.about.format(**both)
        thoughts.append(f"to {about[0].lower()}{about[1:]}, so I call {action.name} with {given}")
        golden.append({"Action": action.name, "Action_Input": json.dumps(inputs, ensure_ascii=False)})
    lines = [f"Thought: The user wants {', and '.join(thoughts)}."]
    for call in golden:
        lines += [f"Action: {call['Action']}", f"Action Input: {call['Action_Input']}"]
    return {
        "prompt": PROMPT.format(
            name=brand,
            about=rng.choice(ABOUTS).format(**both),
            documentation="\n".join(a.documentation(a.kind.about.format(**both)) for a in actions),
            question=question[0].upper() + question[1:],
        ),
        "demonstration": "\n".join(lines),
        "golden_answer": golden,
        "tool": brand,
    }


TASKS.register("tooluse-short", source="form: ToolAlpaca, arXiv 2306.05301, as in arXiv 2601.19897; rows are invented")(
    Task(
        "tooluse-short",
        "call the right action of a small invented API, with its parameters",
        make,
        grade_calls,
        columns=("prompt", "golden_answer"),
        max_new_tokens=128,
    )
)
