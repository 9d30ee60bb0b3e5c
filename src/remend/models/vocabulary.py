"""Do student and teacher mean the same by a token id? Compared token by token, never by size alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from remend.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class VocabularyMatch:
    """`shared` ids, counted from 0, mean the same in both models; the divergence is taken over these alone."""

    shared: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
    return VocabularyMatch(shared, [], warnings)


def template_warnings(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """Differences of end-of-sequence token and chat template between two tokenizers."""
    warnings = []
    if student.eos_token != teacher.eos_token:
        warnings.append(
            f"the end-of-sequence token differs: {student.eos_token!r} for the student, "
            f"{teacher.eos_token!r} for the teacher; the student's is used"
        )
    if (student.chat_template or "").strip() != (teacher.chat_template or "").strip():
        warnings.append("the chat template differs between student and teacher; both are shown the student's rendering")
    return warnings
