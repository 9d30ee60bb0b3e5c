"""Grade tool calls: as the SDFT authors do (paper), and by what was meant (robust).

Paper mode follows the evaluation code beside arXiv 2601.19897 with what it misreads: an `Action Input` ends at the
first closing brace, so nested JSON is dropped; all inputs are merged into one object, so neither their order nor the
action that they belong to counts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from remend.data.examples import Row
from remend.data.tasks.task import Grade, Mode, shorten
from remend.errors import InputError
from remend.files.atomic import JsonObject
from remend.files.reading import parsed

_PAPER_ACTION = re.compile(r"Action:\s*(\w+)")
_PAPER_INPUT = re.compile(r"Action Input:\s*({.*?})", re.DOTALL)

# Where a line starts with the label, or where name and input follow it on one line: prose may say "the action: …".
_ACTION = re.compile(
    r"(?:^[ \t>*_`#-]*|(?<=[ \t])(?=action:[ \t]*\S+[ \t]+action input:))action[*_`]*[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_INPUT = re.compile(r"[*_`]*action[ _]input[*_`]*[ \t]*:[*_]*", re.IGNORECASE)
_OBJECT = re.compile(r"\s*(?:```\w*\s*|`)?(?=\{)")
_NAME = re.compile(r"[^\s`'\"*()]+")


def grade_calls(response: str, row: Row, mode: Mode) -> Grade:
    """Grade tool calls in the form `Action: name` / `Action Input: {…}` against row["golden_answer"].

    paper: the multiset of actions is equal, and so is the union of all inputs (of an equal key the last value counts).
    robust: the multiset of pairs (action, input) is equal, JSON being parsed whole. Numbers are equal by value, and
    true is no 1. The order of calls does not count: where it differs, the reason says so.

    Args:
        response: the completion.
        row: golden_answer is a list of {Action, Action_Input}, the latter an object or its JSON text.
        mode: see above.

    Raises:
        InputError: golden_answer is missing or malformed; for robust, an Action_Input of it is no JSON object.
    """
    golden = row.get("golden_answer")
    if not isinstance(golden, list) or not all(
        isinstance(c, Mapping) and {"Action", "Action_Input"} <= set(c) for c in golden
    ):
        raise InputError("the row needs golden_answer, a list of {Action, Action_Input}")
    if mode == "paper":
        return _paper_calls(response, golden)
    wanted = [(str(call["Action"]), _golden_input(call)) for call in golden]
    return _compare(*parse_calls(response), wanted)


def _paper_calls(response: str, golden: Sequence[Row]) -> Grade:
    got, wanted = _PAPER_ACTION.findall(response), [call["Action"] for call in golden]
    if Counter(got) != Counter(wanted):
        return Grade(False, f"actions are {shorten(got)}, wanted {shorten(wanted)}")
    inputs, wanted_inputs = _merged(_PAPER_INPUT.findall(response)), _merged(call["Action_Input"] for call in golden)
    if inputs != wanted_inputs:
        return Grade(False, f"merged inputs are {shorten(inputs)}, wanted {shorten(wanted_inputs)}")
    return Grade(True, "correct")


def _merged(blocks: Iterable[str | Row]) -> JsonObject:
    """The union of all blocks that are JSON objects; the others are passed over."""
    merged: JsonObject = {}
    for block in blocks:
        try:
            merged.update(json.loads(block) if isinstance(block, str) else block)
        except (ValueError, TypeError, RecursionError):
            continue
    return merged


def _golden_input(call: Row) -> JsonObject:
    value = call["Action_Input"]
    try:
        value = parsed(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"the golden Action_Input of {call['Action']} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"the golden Action_Input of {call['Action']} must be an object, got {type(value).__name__}")
    return value


def parse_calls(response: str) -> tuple[list[tuple[str, JsonObject]], list[str]]:
    """All calls in a response, in order, with their inputs: (calls, problems).

    Labels may be in any case and in bold, inputs in a code fence and over several lines; an action without input has
    the input {}. What stands before the last `</think>` is not read. An input that is no JSON object is a problem.
    """
    text = response.rpartition("</think>")[2]
    calls: list[tuple[str, JsonObject]] = []
    problems: list[str] = []
    at = 0
    while match := _ACTION.search(text, at):
        following = _ACTION.search(text, match.end())
        limit = following.start() if following else len(text)
        label = _INPUT.search(text, match.end(), limit)
        line = text[match.end() : label.start() if label else limit].strip().partition("\n")[0]
        word = _NAME.search(line)
        name = word[0].rstrip(".,;:") if word else ""
        value, problem, at = _decode(text, label.end(), limit) if label else ({}, None, limit)
        calls.append((name, value))
        if problem:
            problems.append(f"the Action Input of {name or 'an action'} {problem}")
    return calls, problems


def _decode(text: str, at: int, limit: int) -> tuple[JsonObject, str | None, int]:
    """The JSON object at `at`: (value, problem, where it ends). Nothing at all is an empty object."""
    opening = _OBJECT.match(text, at)
    if not opening:
        rest = text[at:limit].strip().partition("\n")[0].strip("`* \t")
        blank = not text[at:limit].partition("\n")[0].strip("`* \t\r")
        return {}, None if blank else f"is no JSON object: {shorten(rest)}", limit
    try:
        value, end = json.JSONDecoder().raw_decode(text, opening.end())
        _canonical(value)  # what can be read may still be nested too deeply to compare
    except (ValueError, RecursionError) as error:
        return {}, f"is not valid JSON: {getattr(error, 'msg', None) or type(error).__name__}", limit
    assert isinstance(value, dict)
    return value, None, end


def _compare(calls: list[tuple[str, JsonObject]], problems: list[str], wanted: list[tuple[str, JsonObject]]) -> Grade:
    got, want = [name for name, _ in calls], [name for name, _ in wanted]
    if Counter(got) != Counter(want):
        return Grade(False, f"actions are {shorten(got)}, wanted {shorten(want)}")
    if problems:
        return Grade(False, "; ".join(problems))
    ours, theirs = [_canonical([*call]) for call in calls], [_canonical([*call]) for call in wanted]
    if Counter(ours) != Counter(theirs):
        extra = (Counter(ours) - Counter(theirs)).elements()
        missing = (Counter(theirs) - Counter(ours)).elements()
        return Grade(False, f"calls are {shorten(' '.join(extra))}, wanted {shorten(' '.join(missing))}")
    return Grade(
        True, "correct" if ours == theirs else "correct; the calls came in another order, which does not count"
    )


def _canonical(value: object) -> str:
    """Text that is equal for equal JSON: 5.0 is 5, true is not 1."""

    def plain(x: object) -> object:
        if isinstance(x, dict):
            return {key: plain(item) for key, item in x.items()}
        if isinstance(x, list):
            return [plain(item) for item in x]
        return int(x) if isinstance(x, float) and x.is_integer() else x

    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
