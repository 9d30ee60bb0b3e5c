"""Grade multiple choice: as the SDFT authors do (paper), and by what was meant (robust).

Paper mode follows the evaluation code beside arXiv 2601.19897: it compares what stands after the last `<answer>` as it
is, so "(B)" or "b" is wrong.
"""

from __future__ import annotations

import re

from remend.data.examples import Row
from remend.data.tasks.task import Grade, Mode, shorten
from remend.errors import InputError

LETTERS = "ABCD"

_TAG = re.compile(r"<\s?answer\s?>", re.IGNORECASE)
_CLOSE = re.compile(r"<\s?/\s?answer\s?>", re.IGNORECASE)
# Runs are bounded: a damaged model may write thousands of blanks or stars, and \s*\s* would take forever on them.
_SAID = r"(?:(?:correct|final|right|best) )?(?:answer|option|choice)\b[*_]{0,3}\s?(?:is|:|=)?\s?[*_]{0,3}:?\s?"
_SAYS = r"(?:answer|(?:correct|right|best) (?:option|choice))[*_]{0,3}\s?(?:is|:|=)[*_]{0,3}:?\s?"
_OPEN, _SHUT = r"(?:\\boxed|\\text|option\s|[\s(\[{*_`\"'$]){0,8}", r"[)\]}*_`\"'$.:;,!\s]*"
_ALONE = re.compile(rf"(?:(?:the )?{_SAID})?{_OPEN}([A-D]){_SHUT}", re.IGNORECASE)
_WITH_TEXT = re.compile(r"[(\[*_]{0,4}([A-D])[)\]*_]{0,4}(?:\s?[:.)=]\s?|\s-\s)\S.*", re.IGNORECASE)
_OPTION = re.compile(r"(?<![A-Za-z0-9])[A-D]\s?[:.)]")
# "the answer is a gas": a small letter, or an A, counts where nothing is said after it
_MORE = r"(?!\s?(?:or|and|,|/)\s?(?-i:[A-D])(?![A-Za-z0-9]))"
_IN_PROSE = re.compile(
    rf"{_SAYS}{_OPEN}(?:((?-i:[B-D]))(?![A-Za-z0-9])|([A-D])(?=[)\]}}*_`\"'$]{{0,8}}\s?(?:[.,;:!]|\n|$))){_MORE}",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{\s?(?:\\text\{)?\s?\(?([A-D])[)}\s]", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")


def grade_letter(response: str, row: Row, mode: Mode) -> Grade:
    """Grade a multiple choice (A to D) against the letter in row["answer"].

    paper: the text between the last `<answer>` and the next `</answer>`, stripped, is the letter; without a tag the
    whole stripped response is taken. robust: see `read_letter`.

    Raises InputError when the row's answer is no letter.
    """
    answer = row.get("answer")
    if not isinstance(answer, str) or answer not in set(LETTERS):
        raise InputError(f"the row needs an answer, one of {', '.join(LETTERS)}; it has {shorten(answer)}")
    if mode == "paper":
        said = response.split("<answer>")[-1].split("</answer>")[0].strip()
    else:
        said = read_letter(response) or ""
        if not said:
            return Grade(False, f'no single letter can be read from "{shorten(response[-160:])}"')
    return Grade(True, "correct") if said == answer else Grade(False, f'answered "{shorten(said)}", wanted {answer}')


def read_letter(response: str) -> str | None:
    """The one letter that a response settles on, or None.

    In the last answer tag (any case, spaces, closed or not): a letter of any case, in brackets or bold, after "Answer:"
    or "option", alone or before the option's text. Without a tag: the whole response (up to a closing tag, if one was
    never opened) in one of these forms, else the last "the answer is B", "Answer: B" or "\\boxed{B}". Two letters are
    no answer.
    """
    text = _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", response.rpartition("</think>")[2]).strip()
    tags = list(_TAG.finditer(text))
    if tags:
        inside = _CLOSE.split(text[tags[-1].end() :])[0].strip()
        match = _ALONE.fullmatch(inside) or _before_its_text(inside)
    else:
        text = _CLOSE.split(text)[0].strip()  # a tag that is closed and never opened: a prompt may end in the open one
        said = [*_IN_PROSE.finditer(text), *_BOXED.finditer(text)]
        last = max(said, key=re.Match.start, default=None)
        match = _ALONE.fullmatch(text) or last or _before_its_text(text)
    return next(group for group in match.groups() if group).upper() if match else None


def _before_its_text(text: str) -> re.Match[str] | None:
    return _WITH_TEXT.fullmatch(text) if len(_OPTION.findall(text)) < 2 else None
