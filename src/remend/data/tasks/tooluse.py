"""tooluse: call the right tools of a documented API with the right input (ToolAlpaca, arXiv 2306.05301).

Rows are read from a file, in the prompt form of the SDFT authors (arXiv 2601.19897):

    {"prompt": [{"role": "user", "content": "Your task is to answer the user's question using available tools. …
                 Documentation:\\ngetDetails: …\\nParameters: {…}\\n…\\nBegin!\\nQuestion: …"}],
     "golden_answer": [{"Action": "getDetails", "Action_Input": "{\\"id\\": 98765}"}]}

`paper` grades as the authors' code does; calls.py tells how, and what that misreads. Some rows that the authors publish
can't be solved under it, not even by their golden answer: those with nested input, which is cut at its first closing
brace, and those with an action whose name is no single word.

`robust` parses the JSON of every call and compares the calls as a multiset of (action, input):

- Objects and lists may be nested; code fences, bold labels and several lines don't count. Single quotes are no JSON:
  the reason says what the parser met.
- The order of calls does not count, since most requests set none; where it differs, the reason says so.
- Numbers are equal by value (1 is 1.0); "1" is not 1, nor is true, since the documentation states each type; texts are
  equal to the letter.
- A golden action marked "[Optional]" may be left out or made, with its input then compared; the mark is no part of
  its name.
- A golden input that is no JSON itself (the published data have some) must be met to the letter.

Rows of ToolAlpaca itself are read too (columns Name, Description, NLDocumentation, Instructions, Golden_Answers, as in
its data/eval_simulated.json): an API with several requests gives a row for each.

remend eval MODEL --task tooluse --data eval_simulated.json --out tools.json
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from remend.data.examples import Row
from remend.data.tasks.calls import grade_calls, parse_calls
from remend.data.tasks.task import TASKS, Grade, Mode, Task, name_of, require
from remend.errors import InputError

PROMPT = """Your task is to answer the user's question using available tools. 
You have access to the following tools:
Name: {name}
Description: {description}
Documentation:
{documentation}

Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format. All of the action input must be realistic and from the \
user.

Begin!
Question: {question}"""

OPTIONAL = "[Optional]"

_MARKED = re.compile(r"(action[*_`]{0,4}[ \t]{0,4}:[*_` \t]{0,8})\[optional\][ \t]{0,4}", re.IGNORECASE)


def grade_tooluse(response: str, row: Row, mode: Mode) -> Grade:
    """Grade tool calls; see the module for the two modes.

    Args:
        response: the completion.
        row: its golden_answer is a list of {Action, Action_Input}, the latter an object or its JSON text.
        mode: paper or robust.

    Raises:
        InputError: golden_answer is missing or malformed; the message names the row.
    """
    require(row, ("golden_answer",), name_of(row))
    golden = row["golden_answer"]
    text = response
    try:
        if mode == "robust" and isinstance(golden, list) and all(isinstance(call, Mapping) for call in golden):
            text, golden = _without_options(*_readable(response, golden))
        grade = grade_calls(text, {"golden_answer": golden}, mode)
    except InputError as error:
        raise InputError(f"{name_of(row)}: {error}") from None
    if not grade.correct and not response.strip():
        return Grade(False, "the response is empty")
    return grade


def _readable(response: str, golden: Sequence[Row]) -> tuple[str, list[Row]]:
    """The same with golden inputs that are no JSON put into JSON, here and in the response: equal if equal as text."""
    calls = []
    for call in golden:
        text = call.get("Action_Input")
        if isinstance(text, str) and text.strip() and not _is_json(text):
            stand_in = json.dumps({"no JSON": text})
            written = re.compile(rf"(Action Input:[ \t]*){re.escape(text)}(?=[ \t]*(?:\n|\Z))")
            response = written.sub(lambda match, new=stand_in: match[1] + new, response)  # type: ignore[misc]
            call = {**call, "Action_Input": stand_in}
        calls.append(call)
    return response, calls


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _without_options(response: str, golden: Sequence[Row]) -> tuple[str, list[Row]]:
    """The same with the marks taken off, and with those optional calls only that the response makes."""
    if not any(_is_optional(call) for call in golden):
        return response, list(golden)
    response = _MARKED.sub(r"\1", response)
    spare = Counter(name for name, _ in parse_calls(response)[0])
    spare.subtract(str(call.get("Action")) for call in golden if not _is_optional(call))
    calls = []
    for call in golden:
        if not _is_optional(call):
            calls.append(call)
            continue
        name = call["Action"][len(OPTIONAL) :].strip()
        if spare[name] > 0:
            spare[name] -= 1
            calls.append({**call, "Action": name})
    return response, calls


def _is_optional(call: Row) -> bool:
    return str(call.get("Action")).lower().startswith(OPTIONAL.lower())


def from_toolalpaca(row: Row) -> Sequence[Row]:
    """A row of tooluse for each request of an API of ToolAlpaca; those without a golden answer are left out.

    Raises InputError when there are not as many golden answers as requests.
    """
    public = ("NLDocumentation", "Instructions", "Golden_Answers")
    if not isinstance(row, Mapping) or not all(key in row for key in public):
        return [row]
    requests, golden = row.get("Instructions") or [], row["Golden_Answers"]
    if len(requests) != len(golden):
        raise InputError(
            f"the API {row.get('Name')} has {len(requests)} Instructions and {len(golden)} Golden_Answers; "
            "ToolAlpaca has one for each"
        )
    about = {
        "name": row["Name"],
        "description": row["Description"],
        "documentation": row["NLDocumentation"].strip("\n"),
    }
    return [
        {
            "prompt": [{"role": "user", "content": PROMPT.format(question=request, **about)}],
            "golden_answer": [{key: call[key] for key in ("Action", "Action_Input")} for call in calls],
            "tool": row["Name"],
        }
        for request, calls in zip(requests, golden, strict=True)
        if calls
    ]


TASKS.register("tooluse", source="ToolAlpaca, arXiv 2306.05301, as prompted and graded beside arXiv 2601.19897")(
    Task(
        "tooluse",
        "call the right tools of a documented API (ToolAlpaca; rows from a file)",
        None,
        grade_tooluse,
        columns=("prompt", "golden_answer"),
        convert=from_toolalpaca,
    )
)
