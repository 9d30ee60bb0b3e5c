"""Do student and teacher mean the same by a token id? Compared token by token, never by size alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from remend.data.templates import Encoded, row_names, template_text
from remend.data.tokenizer import Tokenizer

PROBES = (
    "\n\n1. In 2024, 1234567 people (12%) paid $3.50 at 10:45.\n  2. it's\n\n\n\tx = 12   # y != 34\r\n",
    "| a   | 12 |\n|-----|---:|\n    return f'{a}'  // <b>i'LL</b> camelCase HTTPServer ... !!! 🙂👩‍💻 ½ Ⅷ",
    "Ça va, naïve Übergröße. Привет, мойДом! مرحبا ٣٤. 你好，世界！日本語のテキスト。한국어 สวัสดีวันที่ नमस्ते שָׁלוֹם",
)
"""Texts on which tokenizers of one vocabulary differ, by their rules for digits, blanks, marks or scripts."""


@dataclass(frozen=True)
class VocabularyMatch:
    """`shared` ids, counted from 0, mean the same in both models; the divergence is taken over these alone.

    `unknown` are ids that the student's tokenizer names and the teacher has no row or no name for.
    """

    shared: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: frozenset[int] = frozenset()


def compare_vocabularies(
    student: Mapping[str, int], teacher: Mapping[str, int], student_rows: int, teacher_rows: int
) -> VocabularyMatch:
    """Find the leading ids that both models share.

    Args:
        student, teacher: token → id, as `tokenizer.get_vocab()` gives it.
        student_rows, teacher_rows: rows of the models' output embeddings (often padded above the tokenizer's size).

    Returns:
        The match. An id below both sizes that stands for different tokens is a problem; rows that only one model has,
        or that only one tokenizer names, are left out with a warning.
    """
    of_student = {i: token for token, i in student.items()}
    of_teacher = {i: token for token, i in teacher.items()}
    rows = min(student_rows, teacher_rows)
    different = [i for i in range(rows) if i in of_student and i in of_teacher and of_student[i] != of_teacher[i]]
    if different:
        i = different[0]
        problem = (
            f"student and teacher use different tokenizers: {len(different)} of {rows} shared token ids have "
            f"different meanings (id {i} is {of_student[i]!r} for the student, {of_teacher[i]!r} for the teacher). "
            "Distillation needs one vocabulary; choose a teacher of the same family."
        )
        return VocabularyMatch(0, [problem])
    one_sided = (i for i in range(rows) if (i in of_student) != (i in of_teacher))
    shared = next(one_sided, rows)
    if 2 * shared < max(len(student), len(teacher)):
        problem = (
            f"student ({len(student)} tokens, {student_rows} rows) and teacher ({len(teacher)} tokens, {teacher_rows} "
            f"rows) share only the first {shared} token ids; they can't be matched"
        )
        return VocabularyMatch(shared, [problem])
    warnings = []
    if shared < max(student_rows, teacher_rows):
        warnings.append(
            f"vocabularies are aligned on the first {shared} ids (student has {student_rows} rows, "
            f"teacher {teacher_rows}): the rest is padding or named by one tokenizer only, and is neither sampled nor "
            "scored"
        )
    return VocabularyMatch(shared, [], warnings, unknown_ids(student, teacher, teacher_rows))


def unknown_ids(asked: Mapping[str, int], model: Mapping[str, int], rows: int) -> frozenset[int]:
    """Ids of the tokenizer that writes the prompts which a model has no row for, or which its own does not name."""
    named = set(model.values())
    return frozenset(i for i in asked.values() if i >= rows or i not in named)


def unreadable(tokenizer: Tokenizer, prompts: Iterable[Encoded], unknown: frozenset[int], who: str) -> list[str]:
    """A sentence for the rows whose prompts hold the same tokens that `who` does not know."""
    holding: dict[tuple[int, ...], list[str]] = {}
    for prompt in prompts:
        tokens = unknown.intersection((*prompt.tokens, *(prompt.shown or ())))
        if tokens:
            holding.setdefault(tuple(sorted(tokens)), []).append(prompt.id)
    return [
        f"{row_names(names)}: the prompt holds {', '.join(f'{tokenizer.decode([t])!r} ({t})' for t in tokens)}, and "
        f"{who} knows no such token; take a model of the same tokens, or a chat template without it"
        for tokens, names in holding.items()
    ]


def ending_problem(tokenizer: Tokenizer, eos: Iterable[int], shared: int, rows: int) -> str | None:
    """Why answers can't end as they do when the model is served: a token that ends them is none of the shared ones.

    Args:
        eos: all ids that end an answer; those of no row never come.
        shared: ids, from 0, that are sampled and scored.
        rows: of the model's embedding.
    """
    own = tokenizer.eos_token_id
    lost = [i for i in sorted(eos) if i >= shared and (i < rows or i == own)]
    if not lost:
        return None
    return (
        f"answers end at {tokenizer.decode([lost[0]])!r}, token {lost[0]}, which is none of the {shared} token ids "
        "that can be sampled and scored here, so no answer would end; take models that share it, or a tokenizer whose "
        "end-of-sequence token they share"
    )


def template_warnings(student: Tokenizer, teacher: Tokenizer, used: str = "student") -> list[str]:
    """Differences of end-of-sequence token and chat template between two tokenizers, of which one's are `used`."""
    warnings = []
    if student.eos_token != teacher.eos_token:
        warnings.append(
            f"the end-of-sequence token differs: {student.eos_token!r} for the student, "
            f"{teacher.eos_token!r} for the teacher; the {used}'s is used"
        )
    if template_text(student) != template_text(teacher):
        warnings.append(f"the chat template differs between student and teacher; both are shown the {used}'s rendering")
    return warnings


def cutting_warnings(student: Tokenizer, teacher: Tokenizer, used: str = "student") -> list[str]:
    """Whether two tokenizers of one vocabulary cut text otherwise; of the two one's are `used`."""
    for text in PROBES:
        if student.encode(text, add_special_tokens=False) != teacher.encode(text, add_special_tokens=False):
            return [
                f"student and teacher cut text otherwise ({text[:40]!r}, say): the {used}'s tokens are used, and the "
                "other model was trained with its own. Make a directory anew that an older remend made of a GGUF file"
            ]
    return []
